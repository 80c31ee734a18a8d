// The approval inbox: open tasks at the left, one with what it shows and its form at the right.

import * as api from "./api.js";
import { decide } from "./decide.js";
import { announce, h, href, keep, put } from "./dom.js";
import { chip, moment, names, number, when } from "./format.js";
import { body } from "./values.js";

export function inboxView() {
  let which = "open";
  let selected = null;
  let pane = null;
  let found = null;
  const mine = h("input", {
    type: "search",
    placeholder: "for whom",
    "aria-label": "For whom",
    on: { change: () => load() },
  });
  const kind = h(
    "select",
    {
      "aria-label": "Which tasks",
      on: {
        change: () => {
          which = kind.value;
          load();
        },
      },
    },
    h("option", { value: "open" }, "open"),
    h("option", { value: "all" }, "all"),
  );
  const items = h("ul", { class: "items", "aria-label": "Tasks" });
  const foot = h("div", { class: "foot" });
  const right = h("section", { class: "task", "aria-label": "Task" });
  const node = h(
    "div",
    { class: "inbox" },
    h("section", { class: "list", "aria-label": "Tasks" }, h("div", { class: "filter" }, kind, mine), items, foot),
    right,
  );

  async function load() {
    found = await api.get("tasks", { status: which, for: mine.value.trim() });
    keep(items, found.tasks, (task) => task.id, item, update);
    put(
      foot,
      found.tasks.length === 0 && h("p", null, which === "open" ? "Nothing is open." : "No tasks yet."),
      found.more &&
        h(
          "p",
          null,
          `${number(found.tasks.length)} are shown`,
          which === "open" && `, of ${number(found.open)} open`,
          '. "For whom" narrows them down.',
        ),
    );
    if (selected === null && pane === null) put(right, nothing());
  }

  function item(task) {
    return h(
      "li",
      null,
      h(
        "a",
        { href: href("tasks", task.id) },
        h("span", { class: "line" }, h("b", { class: "title" }), h("span", { class: "at" })),
        h("span", { class: "line sub" }, h("span", { class: "what" }), h("span", { class: "much" })),
      ),
    );
  }

  function update(li, task) {
    const a = li.firstElementChild;
    a.className = `s-${task.status}`;
    if (task.id === selected) a.setAttribute("aria-current", "true");
    else a.removeAttribute("aria-current");
    put(li.querySelector(".title"), task.title || task.type);
    li.querySelector(".at").textContent = when(task.created_at);
    put(li.querySelector(".what"), chip(task.status), " for ", names(task.assign_to));
    put(li.querySelector(".much"), task.run_id);
  }

  function nothing() {
    const tasks = found?.tasks.length ?? 0;
    if (tasks > 0) return h("p", { class: "empty" }, "Choose a task.");
    return h(
      "div",
      { class: "empty" },
      h("h2", null, "Nothing waits for you"),
      h("p", null, "A workflow that asks somebody appears here:"),
      h("pre", null, 'decision = await human_task("approve", assign_to="manager", data=draft)'),
      h("p", null, "The same list in a terminal: ", h("code", null, "agentflow tasks list")),
    );
  }

  return {
    node,
    async show([id]) {
      selected = id || null;
      node.dataset.level = selected ? "task" : "list";
      await load();
      if (selected === null) {
        pane = null;
        put(right, nothing());
      } else if (pane?.id !== selected) {
        pane = taskPane(selected, load);
        put(right, pane.node);
        await pane.load();
      }
    },
    async refresh(what) {
      if (what === "change") await Promise.all([load(), pane?.load()]);
    },
  };
}

function taskPane(id, changed) {
  const node = h("div", { class: "pane" });
  let shown = null;
  let done = false; // decided here: the pane says what follows

  async function load() {
    const task = await api.get("task", { id });
    const state = JSON.stringify([task.status, task.digest, task.assign_to, task.deadline, task.refused.length]);
    if (done || state === shown) return; // what is being typed stays
    shown = state;
    put(
      node,
      head(task),
      refusals(task),
      data(task),
      task.status === "open" ? decide(task, decided) : outcome(task),
      trail(task),
    );
  }

  async function decided(answer) {
    done = true;
    const task = answer.task;
    put(node, head(task), outcome(task), follows(task, answer.goes_on), data(task), trail(task));
    announce(`${task.title || task.type}: ${task.status}`);
    node.querySelector("h1").focus();
    await changed();
  }

  return { node, id, load };
}

function head(task) {
  const facts = [
    `for ${names(task.assign_to)}`,
    ["since ", moment(task.created_at)],
    task.deadline && ["until ", moment(task.deadline)],
    [task.workflow, " · ", h("a", { href: href("runs", task.run_id) }, task.run_id)],
    h("code", null, task.id),
  ];
  return h(
    "div",
    { class: "head" },
    h(
      "h1",
      { tabindex: "-1" },
      h("a", { class: "back", href: "#/tasks", "aria-label": "All tasks" }, "←"),
      h("span", { class: "title" }, task.title || task.type),
      chip(task.status),
    ),
    h(
      "p",
      { class: "facts" },
      facts.filter(Boolean).map((fact) => h("span", null, fact)),
    ),
  );
}

function refusals(task) {
  return task.refused.map((each) =>
    h("p", { class: "error" }, `The answer of ${each.by || "somebody"} did not fit: ${each.why}`),
  );
}

// -- what is shown -------------------------------------------------------------------------------

/** The data that is decided on: nested names and values, and the same as JSON. */
function data(task) {
  const value = task.texts.data;
  if (!value) return h("p", { class: "muted" }, "No data is shown with this task.");
  const query = { task: task.id, name: "data" };
  if (value.cut || !value.json)
    return h(
      "section",
      { class: "shown", "aria-label": "What is decided on" },
      h("h2", null, "What is decided on"),
      body(value, query),
    );
  return h(
    "section",
    { class: "shown", "aria-label": "What is decided on" },
    h("h2", null, "What is decided on"),
    tree(api.fromJson(value.text)),
    h("details", { class: "value" }, h("summary", null, "as JSON"), body(value, query)),
  );
}

function tree(value) {
  if (api.isNumber(value)) return api.numberText(value);
  if (typeof value === "string")
    return h("span", { class: "str" }, value === "" ? h("i", { class: "muted" }, "empty") : value);
  if (value === null || typeof value !== "object")
    return h("i", null, value === null ? "nothing" : value ? "yes" : "no");
  if (Array.isArray(value))
    return value.length === 0
      ? h("i", { class: "muted" }, "none")
      : h(
          "ol",
          null,
          value.map((each) => h("li", null, tree(each))),
        );
  const pairs = Object.entries(value);
  if (pairs.length === 0) return h("i", { class: "muted" }, "empty");
  return h(
    "dl",
    { class: "pairs" },
    pairs.map(([name, each]) => [h("dt", null, name), h("dd", null, tree(each))]),
  );
}

// -- decided -------------------------------------------------------------------------------------

function outcome(task) {
  const decision = task.decision;
  const last = task.trail.at(-1);
  if (!decision) return h("p", { class: "note" }, `This task is ${task.status}: it takes no answer any more.`);
  return h(
    "div",
    { class: "note" },
    h("p", null, h("b", null, `${task.status} by ${decision.by || "somebody"}`), last && [" · ", moment(last.at)]),
    decision.comment && h("p", null, decision.comment),
    task.texts.answer && body(task.texts.answer, { task: task.id, name: "answer" }),
  );
}

/** Who goes on with the run now. */
function follows(task, next) {
  const run = h("a", { href: href("runs", task.run_id) }, task.run_id);
  if (next.running) return h("p", { class: "next" }, "Run ", run, " is in hand: its process goes on by itself.");
  if (next.workers.length > 0)
    return h("p", { class: "next" }, "Run ", run, ` goes on with worker ${next.workers.join(", ")}.`);
  return h(
    "div",
    { class: "next" },
    h("p", null, "Run ", run, " goes on when its program runs again, or with:"),
    h("pre", null, next.command),
    h("p", null, "A worker goes on with every run that was answered:"),
    h("pre", null, next.worker),
  );
}

function trail(task) {
  if (task.trail.length < 2) return null;
  const line = (each) =>
    h(
      "li",
      null,
      moment(each.at),
      " ",
      h("b", null, each.what),
      each.by && ` by ${each.by}`,
      each.assign_to && ` for ${names(each.assign_to)}`,
      (each.comment || each.why) && h("span", { class: "muted" }, ` ${each.comment || each.why}`),
    );
  return h(
    "details",
    { class: "value" },
    h("summary", null, "what happened to it"),
    h("ul", { class: "trail" }, task.trail.map(line)),
  );
}
