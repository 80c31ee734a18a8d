// A form from the JSON schema that pydantic makes of a type. What has no form of its own is a JSON text area.
//
// Each editor has a `node`, the `path` that the server's messages call it by, and `read()`: a value, `undefined` where
// nothing was filled in; it throws what keeps the text from being one. The server checks all of it.

import { fromJson, isNumber, numberText, typedNumber } from "./api.js";
import { h, put } from "./dom.js";

let ids = 0;

/** A form for `schema`, filled in with `value` where that is not undefined. */
export function makeForm(schema, value) {
  const fields = new Map(); // by path
  const root = schema;
  const top = editor(schema, "answer", value, true, "");
  const general = h("p", { class: "error", role: "alert", hidden: true });
  const node = h("div", { class: "form" }, top.node, general);

  function editor(schema, path, value, required, label) {
    const shape = simple(schema, root);
    const made =
      (shape.nullable && value === null ? kinds(shape, path, undefined) : kinds(shape, path, value)) ??
      json(shape, path, value);
    return field(made, shape, path, required && !shape.nullable, label, required);
  }

  /** A labelled field around an input, or a group around several. */
  function field(made, shape, path, needed, label, present) {
    const error = h("span", { class: "error", id: `e${++ids}`, role: "alert", hidden: true });
    const help = shape.description && h("span", { class: "help", id: `d${ids}` }, shape.description);
    if (made.input) {
      made.input.id = `i${ids}`;
      made.input.setAttribute("aria-describedby", [error.id, help?.id].filter(Boolean).join(" "));
      if (!label) made.input.setAttribute("aria-label", path.replace(/^answer\.?/, "") || "Answer");
      if (needed) made.input.setAttribute("aria-required", "true");
    }
    const mark = !needed && label && h("span", { class: "muted" }, " optional");
    const title =
      label &&
      (made.input ? h("label", { for: made.input.id }, label, mark) : h("span", { class: "label" }, label, mark));
    const node = made.group
      ? h("fieldset", { "data-path": path }, label && h("legend", null, label, mark), help, error, made.node)
      : h(
          "div",
          {
            class: "field",
            "data-path": path,
            role: made.input ? null : "group",
            "aria-label": made.input ? null : label || "answer",
          },
          title,
          help,
          made.node,
          error,
        );
    const own = {
      node,
      read() {
        const value = made.read();
        return value === undefined && shape.nullable && present ? null : value;
      },
      say(message) {
        error.textContent = message;
        error.hidden = false;
        made.input?.setAttribute("aria-invalid", "true");
        (made.input ?? node.querySelector("input, textarea, select, button"))?.focus();
      },
      quiet() {
        error.hidden = true;
        made.input?.removeAttribute("aria-invalid");
      },
    };
    fields.set(path, own);
    return own;
  }

  function kinds(shape, path, value) {
    if ("const" in shape) return fixed(shape.const);
    if (shape.enum) return choice(shape.enum, value, shape.default);
    const known = value === undefined ? shape.default : value;
    if (shape.type === "boolean") return yesNo(known);
    if (shape.type === "integer" || shape.type === "number") return numeric(known, shape.type);
    if (shape.type === "string") return textual(known, shape);
    if (shape.type === "object" && shape.properties) return group(shape, path, known);
    if (shape.type === "array" && shape.items && !shape.prefixItems) return list(shape, path, known);
    return null;
  }

  function group(shape, path, value) {
    const given = value !== null && typeof value === "object" && !isNumber(value) ? value : {};
    const needed = new Set(shape.required ?? []);
    const inner = Object.entries(shape.properties).map(([name, each]) => [
      name,
      editor(each, `${path}.${name}`, given[name], needed.has(name), each.title ?? words(name)),
    ]);
    return {
      group: true,
      node: h(
        "div",
        { class: "group" },
        inner.map(([, each]) => each.node),
      ),
      read() {
        const made = {};
        for (const [name, each] of inner) {
          const value = each.read();
          if (value !== undefined) made[name] = value;
        }
        return made;
      },
    };
  }

  function list(shape, path, value) {
    let items = [];
    const rows = h("ol", { class: "list-items" });
    const render = () =>
      put(
        rows,
        items.map((item, at) =>
          h(
            "li",
            null,
            item.node,
            h(
              "button",
              { type: "button", class: "plain", "aria-label": `Remove item ${at + 1}`, on: { click: () => drop(at) } },
              "Remove",
            ),
          ),
        ),
      );
    // Removed ones take their places along, so the others are made anew with what was typed.
    const drop = (at) => fill(values().filter((_, index) => index !== at));
    const values = () =>
      items.map((item) => {
        try {
          return item.read();
        } catch {
          return undefined;
        }
      });
    const make = (value, at) => editor(shape.items, `${path}[${at}]`, value, true, "");
    function fill(list) {
      for (const key of [...fields.keys()]) if (key.startsWith(`${path}[`)) fields.delete(key);
      items = list.map(make);
      render();
    }
    fill(Array.isArray(value) ? value : []);
    const add = h(
      "button",
      {
        type: "button",
        on: {
          click: () => {
            items.push(make(undefined, items.length));
            render();
            rows.lastElementChild.querySelector("input, textarea, select")?.focus();
          },
        },
      },
      "Add an item",
    );
    return { group: true, node: h("div", null, rows, add), read: () => items.map((item) => item.read() ?? null) };
  }

  return {
    node,
    /** The answer, or undefined when a field's text is no JSON; the field says so. */
    read() {
      this.quiet();
      try {
        return top.read() ?? null;
      } catch (error) {
        if (!(error instanceof Unreadable)) throw error;
        fields.get(error.path).say(error.message);
        return undefined;
      }
    },
    quiet() {
      general.hidden = true;
      for (const each of fields.values()) each.quiet();
    },
    /** Say what the server found wrong, at the field that it is about. */
    refuse(message) {
      const text = message.replace(/^task \S+: /, "");
      let best = "";
      for (const path of fields.keys()) {
        const end = text[path.length];
        if (path.length > best.length && text.startsWith(path) && (end === undefined || "= .[:".includes(end)))
          best = path;
      }
      const lacks = /^ lacks (.*?)\.?$/.exec(text.slice(best.length));
      const missing = lacks ? lacks[1].split(", ").map((name) => fields.get(`${best}.${name}`)) : [];
      if (missing.length > 0 && missing.every(Boolean)) {
        for (const each of missing.toReversed()) each.say("This is needed.");
      } else if (best !== "" && !(best === "answer" && fields.size > 1)) {
        fields.get(best).say(text.slice(best.length).replace(/^=/, ""));
      } else {
        general.textContent = text;
        general.hidden = false;
      }
    },
  };
}

/** A field's name as its label, where pydantic has made none of it. */
const words = (name) => (name.charAt(0).toUpperCase() + name.slice(1)).replaceAll("_", " ");

class Unreadable extends Error {
  constructor(path, message) {
    super(message);
    this.path = path;
  }
}

/** References followed; `X | None` as X that is nullable; text that is read as a number as that text. */
function simple(schema, root) {
  let form = schema === true ? {} : schema;
  for (let depth = 0; depth < 50; depth++) {
    if (form.$ref) {
      const { $ref, ...rest } = form;
      form = { ...(root.$defs?.[$ref.split("/").at(-1).replaceAll("~1", "/").replaceAll("~0", "~")] ?? {}), ...rest };
    } else if (form.allOf?.length === 1) {
      const { allOf, ...rest } = form;
      form = { ...allOf[0], ...rest };
    } else if (form.anyOf) {
      const { anyOf, ...rest } = form;
      const others = anyOf.filter((each) => each.type !== "null");
      const nullable = rest.nullable || others.length < anyOf.length;
      const decimal = others.length === 2 && others.find((each) => each.type === "string" && each.format === "decimal");
      if (decimal) form = { ...decimal, ...rest, nullable };
      else if (others.length === 1) form = { ...others[0], ...rest, nullable };
      else return { ...rest, nullable, union: true };
    } else {
      return form;
    }
  }
  return {};
}

const fixed = (value) => ({
  node: h("output", null, typeof value === "string" ? value : JSON.stringify(value)),
  read: () => value,
});

function choice(options, value, initial) {
  const known = value ?? initial;
  const input = h(
    "select",
    null,
    h("option", { value: "" }, ""),
    options.map((each, at) => h("option", { value: String(at) }, String(each))),
  );
  input.value = known === undefined ? "" : String(options.indexOf(known));
  return { input, node: input, read: () => (input.value === "" ? undefined : options[Number(input.value)]) };
}

function yesNo(value) {
  const name = `r${++ids}`;
  const radio = (text, set) => {
    const input = h("input", { type: "radio", name, value: text });
    input.checked = value === set;
    return [input, h("label", { class: "radio" }, input, ` ${text}`)];
  };
  const [yes, first] = radio("yes", true);
  const [no, second] = radio("no", false);
  return {
    node: h("span", { class: "radios" }, first, second),
    read: () => (yes.checked ? true : no.checked ? false : undefined),
  };
}

function numeric(value, type) {
  const input = h("input", {
    type: "text",
    inputmode: type === "integer" ? "numeric" : "decimal",
    autocomplete: "off",
  });
  input.value = value === undefined || value === null ? "" : isNumber(value) ? numberText(value) : String(value);
  return { input, node: input, read: () => (input.value.trim() === "" ? undefined : typedNumber(input.value.trim())) };
}

const PICKERS = { date: "date", time: "time", "date-time": "datetime-local" };

function textual(value, shape) {
  const picker = PICKERS[shape.format];
  const known = value === undefined || value === null ? "" : isNumber(value) ? numberText(value) : String(value);
  if (picker) {
    const input = h("input", { type: picker, step: picker === "date" ? null : "1" });
    input.value = picker === "datetime-local" && known ? local(known) : known;
    const read = () => (picker === "datetime-local" ? withZone(input.value) : input.value);
    return { input, node: input, read: () => (input.value === "" ? undefined : read()) };
  }
  const long = known.includes("\n") || known.length > 60 || (shape.maxLength ?? 0) > 120;
  const short = shape.format || shape.pattern;
  const input = short
    ? h("input", { type: "text", autocomplete: "off" })
    : h("textarea", { rows: long ? Math.min(16, known.split("\n").length + 3) : 1 });
  input.value = known;
  let touched = known !== "";
  input.addEventListener("input", () => {
    touched = true;
  });
  return { input, node: input, read: () => (input.value === "" && (!touched || short) ? undefined : input.value) };
}

const local = (text) => {
  const at = new Date(text);
  return Number.isNaN(at.getTime())
    ? ""
    : new Date(at.getTime() - at.getTimezoneOffset() * 60000).toISOString().slice(0, 19);
};

/** A time of this place with its distance from UTC. */
function withZone(text) {
  const minutes = -new Date(text).getTimezoneOffset();
  const two = (count) => String(Math.floor(Math.abs(count))).padStart(2, "0");
  const seconds = text.length === 16 ? ":00" : "";
  return `${text}${seconds}${minutes < 0 ? "-" : "+"}${two(Math.abs(minutes) / 60)}:${two(Math.abs(minutes) % 60)}`;
}

/** A text area for JSON. */
export function json(shape, path, value) {
  const input = h("textarea", { rows: 4, class: "code", spellcheck: "false", placeholder: "JSON" });
  const known = value === undefined ? shape.default : value;
  input.value = known === undefined || known === null ? "" : JSON.stringify(known, null, 2);
  return {
    input,
    node: input,
    read() {
      if (input.value.trim() === "") return undefined;
      try {
        return fromJson(input.value);
      } catch (error) {
        throw new Unreadable(path, `This is not JSON: ${error.message}. Text needs its quotes: "text".`);
      }
    },
  };
}
