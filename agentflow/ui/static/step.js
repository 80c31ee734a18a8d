// One step at the right: what it was given and gave, its attempts, its model calls.

import * as api from "./api.js";
import { h, href, put } from "./dom.js";
import { between, chip, duration, moment, money, number } from "./format.js";
import { body, cutText } from "./values.js";

const KINDS = {
  ai: "model call",
  agent: "model call with tools",
  human: "question to a person",
  event: "wait for an event",
};

export function stepPanel(run, id) {
  const node = h("div", { class: "panel" });
  let shown = "";

  async function load() {
    const step = await api.get("step", { run, id });
    const state = JSON.stringify({ ...step, at: null });
    if (state === shown) return; // what people opened and selected stays
    shown = state;
    put(
      node,
      head(run, step),
      facts(run, step),
      step.error && h("p", { class: "error" }, step.error),
      tries(step),
      calls(run, step),
      values(run, step),
    );
  }

  return { node, id, load };
}

function head(run, step) {
  return h(
    "div",
    { class: "head" },
    h(
      "h2",
      null,
      h("a", { class: "close", href: href("runs", run), "aria-label": "Close the step", title: "Close (Esc)" }, "×"),
      h("span", { class: "id" }, step.name),
      chip(step.status),
    ),
  );
}

function facts(run, step) {
  const usage = step.usage;
  const tokens =
    usage &&
    [
      `${number(usage.input_tokens)} in`,
      usage.cached_tokens > 0 && `(${number(usage.cached_tokens)} cached)`,
      `· ${number(usage.output_tokens)} out`,
      usage.reasoning_tokens > 0 && `(${number(usage.reasoning_tokens)} reasoning)`,
    ]
      .filter(Boolean)
      .join(" ");
  // A person was asked when the task was opened; the step itself began anew whenever the run was taken up.
  const since = step.kind === "human" ? step.tries[0]?.started_at : step.started_at;
  const pairs = [
    ["kind", KINDS[step.kind] ?? step.kind],
    ["model", step.model],
    ["tokens", tokens],
    ["cost", step.cost !== null || step.model ? money(step.cost) : null],
    ["started", since && moment(since)],
    ["took", step.completed_at ? duration(between(since, step.completed_at)) : null],
    ["attempts", step.attempts],
    ["inside", step.parent],
    ["task", step.task && h("a", { href: href("tasks", step.task) }, step.task)],
    ["run", step.run && h("a", { href: href("runs", step.run) }, step.run)],
    ["replayed", step.replayed ? `recorded by execution ${step.epoch}, handed out again since` : null],
    ["reused from", step.reused_from && h("a", { href: href("runs", step.reused_from) }, step.reused_from)],
    [
      "result",
      step.supplied
        ? "given by hand; the step was not run"
        : step.late
          ? "came after the step had been given up"
          : step.secret
            ? "secret: not recorded"
            : null,
    ],
    ["in doubt", step.in_doubt > 0 ? `${step.in_doubt} times: its process ended half-way` : null],
    ["idempotency key", step.idempotency_key && h("code", null, step.idempotency_key)],
    ["id", h("code", null, step.id)],
  ];
  return h(
    "dl",
    { class: "pairs" },
    pairs
      .filter(([, value]) => value !== null && value !== undefined && value !== "" && value !== false)
      .map(([name, value]) => [h("dt", null, name), h("dd", null, value)]),
  );
}

function tries(step) {
  if (step.tries.length < 2 && !step.tries.some((each) => each.error)) return null;
  const row = (each) =>
    h(
      "tr",
      null,
      h("td", null, each.attempt),
      h("td", null, chip(each.status)),
      h("td", null, moment(each.started_at)),
      h("td", { class: "num" }, each.ended_at ? duration(between(each.started_at, each.ended_at)) : ""),
      h(
        "td",
        { class: "why" },
        each.error ?? "",
        each.delay !== null &&
          each.delay !== undefined &&
          h("span", { class: "muted" }, ` next after ${duration(each.delay)}`),
      ),
    );
  return h(
    "details",
    { class: "value", open: true },
    h("summary", null, "attempts"),
    h(
      "table",
      { class: "tries" },
      h(
        "thead",
        null,
        h(
          "tr",
          null,
          ["", "status", "started", "took", "error"].map((name) => h("th", { scope: "col" }, name)),
        ),
      ),
      h("tbody", null, step.tries.map(row)),
    ),
  );
}

function calls(run, step) {
  return step.calls.map((call, index) => {
    const query = (name) => ({ run, step: step.id, name: `calls.${index}.${name}` });
    const title = step.calls.length > 1 ? ` ${index + 1}` : "";
    const usage = call.usage ?? {};
    const line = [
      call.provider && `${call.provider}:${call.model}`,
      call.at && moment(call.at),
      `${number(usage.input_tokens ?? 0)} in · ${number(usage.output_tokens ?? 0)} out`,
      money(call.cost),
      call.request_id,
    ]
      .filter(Boolean)
      .map((fact) => h("span", null, fact));
    return h(
      "section",
      { class: "call", "aria-label": `Model call${title}` },
      h("h3", null, `Model call${title}`),
      h("p", { class: "facts" }, line),
      h(
        "details",
        { class: "value", open: true },
        h("summary", null, "prompt"),
        call.prompt.map((message, at) =>
          h(
            "div",
            { class: "message" },
            h("span", { class: "role" }, message.role),
            body(message, query(`prompt.${at}`)),
          ),
        ),
      ),
      cutText("reply", call.reply, query("reply")),
      cutText("request as sent", call.texts.request, query("request"), { open: false }),
      cutText("reply as received", call.texts.body, query("body"), { open: false }),
    );
  });
}

function values(run, step) {
  const made = ["output", "given"].map(
    (name) =>
      step.texts[name] &&
      step.texts[name].text !== "{}" &&
      cutText(
        name,
        step.texts[name],
        { run, step: step.id, name },
        { open: name === "output" ? step.calls.length === 0 : step.kind !== "ai" },
      ),
  );
  return made.some(Boolean) ? made : null;
}
