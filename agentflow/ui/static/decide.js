// What a person fills in to decide a task: a form, words or nothing but the decision, with a name and a comment.

import * as api from "./api.js";
import { h, put } from "./dom.js";
import { makeForm } from "./form.js";

const NAME = "agentflow-by";

/** The form of an open task; `decided` is given the server's answer. */
export function decide(task, decided) {
  const by = h("input", { type: "text", id: "by", autocomplete: "name" });
  by.value = localStorage.getItem(NAME) ?? "";
  const comment = h("textarea", { id: "comment", rows: 2 });
  const error = h("p", { class: "error", role: "alert", hidden: true });
  const buttons = h("div", { class: "buttons" });
  const input = answerInput(task);
  const form = h(
    "form",
    {
      class: "decide",
      novalidate: true,
      "aria-label": "Decision",
      on: {
        submit: (event) => {
          event.preventDefault();
          send(input.how());
        },
      },
    },
    input.node,
    h(
      "div",
      { class: "who" },
      h("div", { class: "field" }, h("label", { for: "by" }, "By ", h("span", { class: "muted" }, "your name")), by),
      h(
        "div",
        { class: "field" },
        h("label", { for: "comment" }, "Comment ", h("span", { class: "muted" }, "optional")),
        comment,
      ),
    ),
    error,
    buttons,
    h("p", { class: "muted" }, "In a terminal: ", h("code", null, task.command)),
  );
  put(
    buttons,
    h("button", { type: "submit", class: "yes" }, input.word),
    h("button", { type: "button", class: "no", on: { click: () => send("reject") } }, "Reject"),
  );

  async function send(how) {
    error.hidden = true;
    const given = { id: task.id, by: by.value, comment: comment.value };
    if (how === "answer") {
      given.data = input.read();
      if (given.data === undefined) return;
    }
    localStorage.setItem(NAME, by.value);
    for (const each of buttons.children) each.disabled = true;
    try {
      await decided(await api.post(`task/${how}`, given));
    } catch (refused) {
      if (!(refused instanceof api.Refused)) throw refused;
      if (refused.status === 422 && how === "answer" && input.refuse) {
        input.refuse(refused.message);
      } else {
        error.textContent = refused.message;
        error.hidden = false;
      }
      if (refused.status !== 409) for (const each of buttons.children) each.disabled = false;
    }
  }

  return form;
}

/** What is filled in: a form, an answer in words, or nothing but the decision. */
function answerInput(task) {
  if (task.schema) {
    const value = task.texts.data?.json && !task.texts.data.cut ? api.fromJson(task.texts.data.text) : undefined;
    const form = makeForm(task.schema, filled(task.schema, value));
    return {
      node: h("section", { "aria-label": "Answer" }, h("h2", null, "Answer"), form.node),
      word: "Answer",
      how: () => "answer",
      read: () => form.read(),
      refuse: (text) => form.refuse(text),
    };
  }
  if (task.type === "input") {
    const input = h("textarea", { id: "answer", rows: 4, "aria-describedby": "answer-error" });
    const asJson = h("input", { type: "checkbox" });
    const wrong = h("span", { class: "error", id: "answer-error", role: "alert", hidden: true });
    const refuse = (text) => {
      wrong.textContent = text;
      wrong.hidden = false;
    };
    const node = h(
      "div",
      { class: "field" },
      h("label", { for: "answer" }, "Answer"),
      input,
      wrong,
      h("label", { class: "radio" }, asJson, " it is JSON"),
    );
    const read = () => {
      wrong.hidden = true;
      if (!asJson.checked) return input.value;
      try {
        return api.fromJson(input.value);
      } catch (error) {
        refuse(`This is not JSON: ${error.message}`);
        return undefined;
      }
    };
    return { node, word: "Answer", how: () => "answer", read, refuse };
  }
  const form = makeForm({}, undefined);
  const node = h(
    "details",
    { class: "value", open: task.type === "in_doubt" },
    h("summary", null, task.type === "in_doubt" ? "its result, as JSON" : "approve with data"),
    form.node,
  );
  const area = form.node.querySelector("textarea");
  area.setAttribute("aria-label", "Data as JSON");
  return {
    node,
    word: "Approve",
    how: () => (area.value.trim() === "" ? "approve" : "answer"),
    read: () => form.read(),
    refuse: (text) => form.refuse(text),
  };
}

/** The data shown, where it is such a form itself: then it is filled in with it. */
function filled(schema, value) {
  if (value === null || typeof value !== "object" || Array.isArray(value)) return undefined;
  const root = schema.$ref ? schema.$defs?.[schema.$ref.split("/").at(-1)] : schema;
  const known = Object.keys(root?.properties ?? {});
  const names = Object.keys(value);
  return names.length > 0 && names.every((name) => known.includes(name)) ? value : undefined;
}
