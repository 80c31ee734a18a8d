// What model calls came to.

import * as api from "./api.js";
import { h, href, put } from "./dom.js";
import { money, number } from "./format.js";

const BY = ["model", "workflow", "step", "day"];

export function costsView() {
  const tabs = h("nav", { class: "tabs", "aria-label": "Grouped by" });
  const table = h("div", { class: "scroll" });
  const node = h("section", { class: "costs" }, h("h1", null, "Costs"), tabs, table);
  let by = "model";

  async function load() {
    const found = await api.get("costs", { by });
    put(
      tabs,
      BY.map((each) =>
        h("a", { href: href("costs", each), "aria-current": each === by ? "page" : null }, `by ${each}`),
      ),
    );
    if (found.lines.length === 0) {
      put(
        table,
        h("p", { class: "empty" }, "Nothing was paid or saved yet. The first model call of a workflow appears here."),
      );
      return;
    }
    const names = by === "step" ? ["workflow", "step"] : [by];
    const row = (line, first) =>
      h(
        "tr",
        null,
        first,
        [number(line.calls), number(line.input_tokens), number(line.output_tokens)].map((text) =>
          h("td", { class: "num" }, text),
        ),
        h(
          "td",
          { class: "num" },
          money(line.paid),
          line.unknown > 0 && line.paid !== null && ` + ${line.unknown} unknown`,
        ),
        h("td", { class: "num" }, money(line.saved)),
        h(
          "td",
          { class: "num" },
          line.in_doubt > 0
            ? [line.in_doubt, line.in_doubt_at_most === null ? ", unknown" : `, up to ${money(line.in_doubt_at_most)}`]
            : "–",
        ),
        h("td", { class: "num" }, line.wasted ? money(line.wasted) : "–"),
      );
    put(
      table,
      h(
        "table",
        null,
        h(
          "thead",
          null,
          h(
            "tr",
            null,
            names.map((name) => h("th", { scope: "col" }, name)),
            ["calls", "in", "out", "paid", "saved", "in doubt", "wasted"].map((name) =>
              h("th", { scope: "col", class: "num" }, name),
            ),
          ),
        ),
        h(
          "tbody",
          null,
          found.lines.map((line) =>
            row(
              line,
              names.map((name, at) => h(at ? "td" : "th", { scope: at ? null : "row" }, line[name])),
            ),
          ),
        ),
        h("tfoot", null, row(found.total, h("th", { scope: "row", colspan: names.length }, "total"))),
      ),
      h(
        "p",
        { class: "muted" },
        "Saved is what replays did not pay again. In doubt are calls that were sent and brought no answer. ",
        "Wasted is the part of paid that attempts which failed had cost.",
      ),
    );
  }

  return {
    node,
    async show([wanted]) {
      by = BY.includes(wanted) ? wanted : "model";
      await load();
    },
    // The whole ledger is added up: not at each commit, but when somebody asks.
  };
}
