// The runs view: the list at the left, one run in the middle, one of its steps at the right.

import * as api from "./api.js";
import { h, href, keep, put } from "./dom.js";
import { between, chip, duration, moment, money, number, statusClass, when } from "./format.js";
import { stepPanel } from "./step.js";
import { cutText } from "./values.js";
import { waterfall } from "./waterfall.js";

const PAGE = 50;
const MOST = 400; // list items on the page
const STATUSES = ["running", "waiting", "completed", "failed", "interrupted", "cancelled"];
const LIVE = ["running"]; // its process may die without a word; all else is told by a commit

export function runsView() {
  const list = runList();
  const middle = h("section", { class: "run", "aria-label": "Run" });
  const close = (event) => {
    if (event.key === "Escape") location.hash = href("runs", runId);
  };
  const right = h("aside", { class: "step", "aria-label": "Step", hidden: true, on: { keydown: close } });
  const node = h("div", { class: "runs" }, list.node, middle, right);
  let runId = null;
  let stepId = null;
  let page = null;
  let panel = null;

  return {
    node,
    run: () => runId,
    async show([id, , step]) {
      const other = (id || null) !== runId;
      runId = id || null;
      stepId = step || null;
      node.dataset.level = stepId ? "step" : runId ? "run" : "list";
      if (list.empty()) await list.load();
      list.select(runId);
      if (runId === null) {
        page?.leave();
        page = null;
        put(middle, list.empty() ? noRuns() : h("p", { class: "empty" }, "Choose a run to see its steps."));
      } else if (other || page === null) {
        page?.leave();
        page = runPage(runId);
        put(middle, page.node);
        await page.load();
        if (page.id() !== runId) {
          // named by a part of its id
          runId = page.id();
          history.replaceState(null, "", href("runs", runId, ...(stepId ? ["steps", stepId] : [])));
          list.select(runId);
        }
      }
      page?.select(stepId);
      right.hidden = stepId === null;
      if (stepId === null) {
        panel = null;
        put(right);
      } else if (panel?.id !== stepId || other) {
        panel = stepPanel(runId, stepId);
        put(right, panel.node);
        await panel.load();
      }
    },
    async refresh(what) {
      if (what === "look" && !list.any(LIVE) && !page?.live()) return;
      await Promise.all([list.load(), page?.load(), panel?.load()]);
      if (runId === null && !list.empty()) put(middle, h("p", { class: "empty" }, "Choose a run to see its steps."));
    },
    leave: () => page?.leave(),
  };
}

function noRuns() {
  return h(
    "div",
    { class: "empty" },
    h("h2", null, "No runs yet"),
    h("p", null, "Run a program with a ", h("code", null, "@workflow"), " in this project and it appears here:"),
    h("pre", null, "python your_program.py"),
    h("p", null, "Or look at another journal: ", h("code", null, "AGENTFLOW_PATH=other/.agentflow agentflow ui")),
  );
}

// -- the list ------------------------------------------------------------------------------------

function runList() {
  let found = [];
  let next = null;
  let looked = 0;
  let selected = null;
  let asked = 0;
  const status = h(
    "select",
    { "aria-label": "Status", on: { change: () => anew() } },
    h("option", { value: "" }, "all statuses"),
    STATUSES.map((each) => h("option", { value: each }, each)),
  );
  let typing = null;
  const workflow = h("input", {
    type: "search",
    placeholder: "workflow",
    "aria-label": "Workflow",
    autocomplete: "off",
    spellcheck: "false",
    on: {
      input: () => {
        clearTimeout(typing);
        typing = setTimeout(anew, 200);
      },
    },
  });
  const items = h("ul", { class: "items", "aria-label": "Runs" });
  const foot = h("div", { class: "foot" });
  const node = h(
    "section",
    { class: "list", "aria-label": "Runs" },
    h("div", { class: "filter" }, status, workflow),
    items,
    foot,
  );

  async function anew() {
    found = [];
    await load();
  }

  /** The newest runs, and those that were there beyond them. */
  async function load() {
    const turn = ++asked;
    const limit = Math.min(Math.max(PAGE, found.length), 200);
    const query = { status: status.value, workflow: workflow.value.trim(), limit };
    const came = await api.get("runs", query);
    if (turn !== asked) return;
    const older = found.slice(came.runs.length);
    const known = new Set(came.runs.map((run) => run.id));
    if (older.length === 0 || came.next === null) {
      next = came.next;
      found = came.runs;
    } else {
      found = [...came.runs, ...older.filter((run) => !known.has(run.id))];
    }
    looked = came.looked_at;
    render();
  }

  async function more() {
    const turn = ++asked;
    const query = { status: status.value, workflow: workflow.value.trim(), limit: PAGE, before: next };
    const came = await api.get("runs", query);
    if (turn !== asked) return;
    const known = new Set(found.map((run) => run.id));
    found = [...found, ...came.runs.filter((run) => !known.has(run.id))];
    next = came.next;
    looked += came.looked_at;
    render();
  }

  function render() {
    keep(items, found.slice(0, MOST), (run) => run.id, item, update);
    const filtered = status.value || workflow.value.trim();
    const full = found.length >= MOST;
    put(
      foot,
      found.length === 0 && h("p", null, filtered ? "No run fits." : "No runs yet."),
      next !== null &&
        !full &&
        h(
          "button",
          { type: "button", on: { click: more } },
          filtered ? `Look further back (${number(looked)} looked at)` : "Older runs",
        ),
      full && h("p", null, `The newest ${MOST} are shown. A status or a workflow narrows them down.`),
    );
  }

  function item(run) {
    return h(
      "li",
      null,
      h(
        "a",
        { href: href("runs", run.id) },
        h("span", { class: "line" }, h("b", { class: "id" }, run.id), h("span", { class: "at" })),
        h("span", { class: "line sub" }, h("span", { class: "what" }), h("span", { class: "much" })),
      ),
    );
  }

  function update(li, run) {
    const a = li.firstElementChild;
    a.className = statusClass(run.status);
    if (run.id === selected) a.setAttribute("aria-current", "true");
    else a.removeAttribute("aria-current");
    const saved = run.saved ? ` · saved ${money(run.saved)}` : "";
    a.title = `${run.id} · ${run.workflow} · ${run.status}${saved}`;
    li.querySelector(".at").textContent = when(run.started_at);
    const took = run.completed_at ? duration(between(run.started_at, run.completed_at)) : "";
    put(li.querySelector(".what"), chip(run.status), " ", run.workflow);
    const paid = run.cost ? money(run.cost) : "";
    li.querySelector(".much").textContent = [took, paid].filter(Boolean).join(" · ");
  }

  return {
    node,
    load,
    empty: () => found.length === 0,
    any: (statuses) => found.some((run) => statuses.includes(run.status)),
    select(id) {
      selected = id;
      for (const li of items.children) {
        if (li.dataset.key === id) li.firstElementChild.setAttribute("aria-current", "true");
        else li.firstElementChild.removeAttribute("aria-current");
      }
    },
  };
}

// -- one run -------------------------------------------------------------------------------------

function runPage(id) {
  const head = h("div", { class: "head" });
  const values = h("div", { class: "values" });
  const chart = waterfall();
  const node = h("div", { class: "page" }, head, values, chart.node);
  let first = null;
  let found = null;
  let shownValues = "";

  async function load() {
    found = await api.get("run", { id, first });
    const run = found;
    put(
      head,
      h(
        "h1",
        null,
        h("a", { class: "back", href: "#/runs", "aria-label": "All runs" }, "←"),
        h("span", { class: "id" }, run.id),
        chip(run.status),
      ),
      h("p", { class: "facts" }, facts(run)),
      run.error && h("p", { class: "error", role: "alert" }, run.error),
      waits(run),
    );
    const texts = JSON.stringify(run.texts);
    if (texts !== shownValues) {
      shownValues = texts;
      put(
        values,
        ["input", "output"].map(
          (name) => run.texts[name] && cutText(name, run.texts[name], { run: id, name }, { open: false }),
        ),
      );
    }
    chart.update(run, (at) => {
      first = at;
      return load();
    });
  }

  return {
    node,
    load,
    id: () => found.id,
    select: (step) => chart.select(step),
    live: () => found !== null && LIVE.includes(found.status),
    leave: () => chart.leave(),
  };
}

function facts(run) {
  const took = run.completed_at ? duration(between(run.started_at, run.completed_at)) : null;
  const facts = [
    run.workflow,
    ["started ", moment(run.started_at)],
    took && `took ${took}`,
    run.executions > 1 && `taken up ${run.executions} times`,
    run.deadline && !run.completed_at && ["deadline ", moment(run.deadline)],
    `paid ${money(run.cost)}`,
    run.saved > 0 && `saved ${money(run.saved)}`,
    run.parent && [
      "fork of ",
      h("a", { href: href("runs", run.parent) }, run.parent),
      run.forked_at && ` from ${run.forked_at} on`,
    ],
    run.tick && ["tick ", moment(run.tick)],
  ];
  return facts.filter(Boolean).map((fact) => h("span", null, fact));
}

/** What a run waits for, with what answers it. */
function waits(run) {
  if (run.status === "interrupted") {
    return h(
      "p",
      { class: "note" },
      "No process has it in hand. Run its program again, keep a worker running, or type ",
      h("code", null, `agentflow runs resume ${run.id} --module app:flow`),
    );
  }
  const open = run.tasks.filter((task) => task.status === "open");
  const lines = open.map((task) =>
    h(
      "li",
      null,
      h("a", { href: href("tasks", task.id) }, task.title || task.type),
      ` · for ${Array.isArray(task.assign_to) ? task.assign_to.join(", ") : task.assign_to || "anybody"}`,
    ),
  );
  if (run.status === "waiting") {
    for (const wait of run.waiting_on.filter((each) => each.kind !== "task")) {
      if (wait.kind === "batch")
        lines.push(h("li", null, `batch ${wait.id}: ${wait.requests} requests to ${wait.model}, ${wait.status}`));
      else if (wait.command)
        lines.push(h("li", null, `${wait.kind} ${wait.name ?? ""} · `, h("code", null, wait.command)));
      else lines.push(h("li", null, wait.kind, wait.until && [" until ", moment(wait.until)]));
    }
  }
  return lines.length > 0 && h("div", { class: "waits" }, h("b", null, "Waits for"), h("ul", null, lines));
}
