// Values as text, cut where they are large, with the rest on demand.

import * as api from "./api.js";
import { h, put } from "./dom.js";
import { size } from "./format.js";

const MOST = 2_000_000; // characters on the page; what is larger opens by itself

/** A value under a heading that opens and closes. `query` names where all of it is. */
export function cutText(title, value, query, { open = true } = {}) {
  return h(
    "details",
    { class: "value", open },
    h("summary", null, title, h("span", { class: "size" }, value.size > 200 ? size(value.size) : "")),
    body(value, query),
  );
}

/** The text itself, and where it is cut the rest of it. */
export function body(value, query) {
  const pre = h("pre", { class: value.json ? "json" : "text", tabindex: "0" }, value.text);
  if (!value.cut) return pre;
  const note = h("p", { class: "cut" });
  const all = async () => {
    note.textContent = "…";
    const whole = await api.text(query);
    put(pre, whole);
    note.remove();
  };
  const rest = h("a", { href: api.link(query), target: "_blank", rel: "noopener" }, "open all of it");
  put(
    note,
    `The first ${size(value.text.length)} of ${size(value.size)}. `,
    value.size <= MOST ? h("button", { type: "button", on: { click: all } }, "Show all") : rest,
  );
  return [pre, note];
}
