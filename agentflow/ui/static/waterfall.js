// The steps of a run by time: nested, each attempt a segment of its own, what runs growing. Only rows in sight are in
// the page, so that a run may have thousands.

import { clean, h, href, keep, put } from "./dom.js";
import { between, duration, money, number, statusClass } from "./format.js";
import { makeScale } from "./scale.js";
import { arrange } from "./tree.js";

const ROW = 26; // pixels, as in app.css
const OVERSCAN = 10;
const GROWING = new Set(["running", "waiting", "retrying"]);
const PROBLEMS = new Set(["failed", "in doubt", "undone", "interrupted"]);
const KIND = {
  ai: "model call",
  agent: "model call with tools",
  human: "person",
  run: "run",
  tool: "tool",
  event: "event",
  sleep: "sleep",
  compensation: "compensation",
  value: "value",
};

export function waterfall() {
  let run = null;
  let rows = []; // what is shown of the tree: {step, depth, inner, open}
  let scale = null;
  let selected = null;
  let active = -1;
  let truly = false;
  let offset = 0; // the server's clock minus ours
  let page = null;
  let timer = null;
  const closed = new Set();

  const filter = h("input", {
    type: "search",
    placeholder: "find steps",
    "aria-label": "Find steps",
    on: { input: () => build() },
  });
  const problems = h("input", { type: "checkbox", on: { change: () => build() } });
  const real = h("input", {
    type: "checkbox",
    on: {
      change: () => {
        truly = real.checked;
        render();
      },
    },
  });
  const values = h("input", { type: "checkbox", on: { change: () => build() } });
  const valuesLabel = h("label", { hidden: true, title: "ctx.now(), ctx.uuid4(), ctx.random()" }, values, " values");
  const count = h("span", { class: "muted count-steps", role: "status" });
  const bar = h(
    "div",
    { class: "bar" },
    filter,
    h("label", null, problems, " problems only"),
    valuesLabel,
    h("label", { title: "Do not fold the time in which nothing worked" }, real, " true time"),
    count,
  );
  const axis = h("div", { class: "axis", "aria-hidden": "true" });
  const band = h("div", { class: "folds", "aria-hidden": "true" });
  const space = h("div", { class: "space", role: "presentation" });
  const empty = h("p", { class: "empty", hidden: true });
  const scroller = h(
    "div",
    {
      class: "rows",
      role: "treegrid",
      tabindex: "0",
      "aria-label": "Steps by time",
      on: {
        scroll: () => requestAnimationFrame(draw),
        keydown: key,
        focus: () => {
          if (active < 0 && rows.length) move(0, false);
        },
      },
    },
    band,
    space,
    empty,
  );
  const note = h("div", { class: "note", hidden: true });
  const chart = h("div", { class: "chart" }, axis, scroller);
  const node = h("div", { class: "waterfall" }, bar, note, chart);
  const resized = new ResizeObserver(() => render());
  resized.observe(scroller);

  // -- the tree ------------------------------------------------------------------------------------

  function build() {
    const hidden = run.steps.filter((step) => step.kind === "value").length;
    valuesLabel.hidden = hidden === 0;
    const at = rows[active]?.step.id ?? selected;
    rows = arrange(values.checked ? run.steps : run.steps.filter((step) => step.kind !== "value"), closed, wanted());
    const shown = rows.length;
    const all = run.steps_total - (values.checked ? 0 : hidden);
    count.textContent =
      shown === all
        ? `${number(all)} ${all === 1 ? "step" : "steps"}`
        : `${number(shown)} of ${number(all)} steps shown`;
    active = rows.findIndex((row) => row.step.id === at);
    paged();
    render();
  }

  function wanted() {
    const text = filter.value.trim().toLowerCase();
    if (!text && !problems.checked) return null;
    return (step) =>
      (!problems.checked || PROBLEMS.has(step.status) || step.tries.some((each) => each.status === "failed")) &&
      (!text ||
        [step.name, step.kind, step.status, step.model, step.error].some((fact) => fact?.toLowerCase().includes(text)));
  }

  /** What is not shown of a run that has more steps than are sent at once. */
  function paged() {
    const { steps_first: first, steps_total: total, steps } = run;
    note.hidden = steps.length === total;
    if (note.hidden) return;
    const to = (at, text) => h("button", { type: "button", on: { click: () => page(at) } }, text);
    put(
      note,
      `Steps ${number(first + 1)} to ${number(first + steps.length)} of ${number(total)} are shown. `,
      first > 0 && to(Math.max(0, first - steps.length), "Earlier"),
      " ",
      first + steps.length < total && to(first + steps.length, "Later"),
    );
  }

  // -- drawing -------------------------------------------------------------------------------------

  const now = () => Date.now() + offset;

  function render() {
    if (run === null) return;
    const live = ["running", "waiting"].includes(run.status);
    const starts = run.steps
      .filter((step) => !step.reused_from && step.started_at)
      .map((step) => Date.parse(step.started_at));
    const begin = starts.reduce((least, each) => Math.min(least, each), Date.parse(run.started_at));
    let end = run.completed_at ? Date.parse(run.completed_at) : live ? now() : begin;
    for (const step of run.steps) {
      if (!step.reused_from)
        for (const each of step.tries) if (each.ended_at) end = Math.max(end, Date.parse(each.ended_at));
    }
    const width = Math.max(120, axis.firstElementChild?.clientWidth ?? 600);
    scale = makeScale(run.steps, begin, Math.max(end, begin + 1), now(), truly, width);
    space.style.height = `${rows.length * ROW}px`;
    band.style.height = `${Math.max(rows.length * ROW, scroller.clientHeight)}px`;
    const folded = (fold, text) =>
      h(
        "div",
        {
          class: "fold",
          title: `${duration(fold.seconds)} in which nothing worked`,
          style: { left: `${fold.from * 100}%`, width: `${(fold.to - fold.from) * 100}%` },
        },
        text,
      );
    const near = (at) => scale.folds.some((fold) => at > fold.from - 80 / width && at < fold.to + 20 / width);
    put(
      axis,
      h(
        "div",
        { class: "track" },
        scale
          .ticks(Math.max(1, Math.floor(width / 90)))
          .filter((tick) => !near(tick.at))
          .map((tick) =>
            h(
              "span",
              { class: "tick", style: { left: `${tick.at * 100}%` } },
              tick.seconds === 0 ? "0" : duration(tick.seconds),
            ),
          ),
        scale.folds.map((fold) => folded(fold, h("span", null, duration(fold.seconds)))),
      ),
    );
    put(
      band,
      h(
        "div",
        { class: "track" },
        scale.folds.map((fold) => folded(fold, "")),
      ),
    );
    draw();
    clearInterval(timer);
    if (live && run.steps.some((step) => GROWING.has(step.status)))
      timer = setInterval(grow, run.steps.length > 1000 ? 2000 : 500);
  }

  function grow() {
    if (!document.hidden) render();
  }

  function draw() {
    if (scale === null) return;
    const first = Math.max(0, Math.floor(scroller.scrollTop / ROW) - OVERSCAN);
    const last = Math.min(rows.length, Math.ceil((scroller.scrollTop + scroller.clientHeight) / ROW) + OVERSCAN);
    scroller.setAttribute("aria-rowcount", rows.length);
    keep(
      space,
      rows.slice(first, last).map((row, index) => ({ ...row, at: first + index })),
      signature,
      rowOf,
      place,
    );
    empty.hidden = rows.length > 0;
    empty.textContent = run.steps_total === 0 ? "No step is recorded yet." : "No step fits.";
    scroller.setAttribute("aria-activedescendant", active >= first && active < last ? `row-${active}` : "");
  }

  /** What a row's element is made of. It is kept as long as this is the same: it may be under a pointer. */
  const signature = ({ step, depth, has, open, at }) =>
    [
      at,
      depth,
      has,
      open,
      step.name,
      step.id,
      step.kind,
      step.status,
      step.attempts,
      step.tries.length,
      step.replayed,
      step.cost,
      step.reused_from,
    ].join("\u0000");

  function rowOf({ step, depth, has, open, at }) {
    const twisty = has
      ? h(
          "button",
          {
            type: "button",
            class: "twisty",
            tabindex: "-1",
            "aria-label": open ? "Close" : "Open",
            on: {
              click: (event) => {
                event.stopPropagation();
                toggle(at);
              },
            },
          },
          open ? "▾" : "▸",
        )
      : h("span", { class: "twisty" });
    const marks = [
      step.replayed && h("span", { class: "mark", title: `replayed: recorded by execution ${step.epoch}` }, "↺"),
      step.reused_from && h("span", { class: "mark", title: `reused from ${step.reused_from}` }, "↪"),
      step.attempts > 1 && h("span", { class: "mark tried", title: `${step.attempts} attempts` }, `×${step.attempts}`),
    ];
    return h(
      "div",
      {
        class: `row k-${step.kind} ${statusClass(step.status)}${step.replayed || step.reused_from ? " replayed" : ""}`,
        role: "row",
        id: `row-${at}`,
        "aria-rowindex": at + 1,
        "aria-level": depth + 1,
        "aria-expanded": has ? String(open) : null,
        style: { top: `${at * ROW}px`, "--depth": Math.min(depth, 12) },
        on: { click: () => move(at, true) },
      },
      h(
        "span",
        { class: "name", role: "gridcell", title: `${step.name} · ${KIND[step.kind] ?? "step"} · ${step.status}` },
        twisty,
        h("i", { class: "dot", "aria-hidden": "true" }),
        h("span", { class: "text" }, step.name),
        marks,
      ),
      h("span", { class: "track", role: "gridcell", "aria-label": spoken(step) }),
      h("span", { class: "num took", role: "gridcell" }),
      h(
        "span",
        { class: "num cost", role: "gridcell" },
        step.cost ? money(step.cost) : step.model && step.cost === null ? "?" : "",
      ),
    );
  }

  const spoken = (step) => `${step.status}, ${step.tries.length} ${step.tries.length === 1 ? "attempt" : "attempts"}`;

  /** What changes while a row is in sight: its bars, how long it took, whether it is the chosen one. */
  function place(node, { step, at }) {
    node.setAttribute("aria-selected", String(step.id === selected));
    node.classList.toggle("active", at === active);
    const growing = GROWING.has(step.status);
    const first = step.kind === "human" ? step.tries[0]?.started_at : step.started_at;
    const took = growing || step.completed_at ? between(first, step.completed_at, now()) : null;
    node.querySelector(".took").textContent = step.reused_from ? "" : duration(took);
    const track = node.querySelector(".track");
    if (step.reused_from) {
      if (!track.hasChildNodes()) put(track, elsewhere(step));
      return;
    }
    const made = pieces(step);
    while (track.children.length > made.length) track.lastElementChild.remove();
    made.forEach(({ kind, from, to, title }, index) => {
      const bar = track.children[index] ?? track.appendChild(h("span", null));
      bar.className = kind;
      bar.title = clean(title);
      bar.style.left = `${from * 100}%`;
      bar.style.width = `${Math.max(0, to - from) * 100}%`;
    });
  }

  const elsewhere = (step) =>
    h(
      "span",
      { class: "elsewhere" },
      "from ",
      h(
        "a",
        { href: href("runs", step.reused_from), tabindex: "-1", on: { click: (event) => event.stopPropagation() } },
        step.reused_from,
      ),
    );

  /** Attempts, and the pauses between them. */
  function pieces(step) {
    const made = [];
    let before = null;
    for (const each of step.tries) {
      if (!each.started_at) continue;
      const start = scale.at(Date.parse(each.started_at));
      const open = GROWING.has(each.status) ? now() : Date.parse(each.started_at);
      const end = scale.at(each.ended_at ? Date.parse(each.ended_at) : open);
      if (before !== null && start > before)
        made.push({ kind: "pause", from: before, to: start, title: `waited for attempt ${each.attempt}` });
      const took = duration(between(each.started_at, each.ended_at, now()));
      const title = [`attempt ${each.attempt}: ${each.status}`, took, each.error].filter(Boolean).join(" · ");
      made.push({ kind: `try ${statusClass(each.status)}`, from: start, to: end, title });
      before = end;
    }
    if (step.status === "retrying" && before !== null)
      made.push({ kind: "pause", from: before, to: scale.at(now()), title: "waits for the next attempt" });
    return made;
  }

  // -- moving about --------------------------------------------------------------------------------

  function move(at, open) {
    if (rows.length === 0) return;
    active = Math.min(rows.length - 1, Math.max(0, at));
    const top = active * ROW;
    if (top < scroller.scrollTop) scroller.scrollTop = top;
    else if (top + ROW > scroller.scrollTop + scroller.clientHeight)
      scroller.scrollTop = top + ROW - scroller.clientHeight;
    if (open) location.hash = href("runs", run.id, "steps", rows[active].step.id);
    draw();
  }

  function toggle(at) {
    const { step, open } = rows[at];
    if (open) closed.add(step.id);
    else closed.delete(step.id);
    active = at;
    build();
  }

  function key(event) {
    if (event.target !== scroller || event.ctrlKey || event.metaKey || event.altKey) return;
    const row = rows[active];
    const many = Math.max(1, Math.floor(scroller.clientHeight / ROW) - 1);
    const moves = {
      ArrowDown: active + 1,
      ArrowUp: active - 1,
      Home: 0,
      End: rows.length - 1,
      PageDown: active + many,
      PageUp: active - many,
    };
    if (event.key in moves) move(moves[event.key], false);
    else if (event.key === "Enter" || event.key === " ") move(active, true);
    else if (event.key === "ArrowRight" && row?.has && !row.open) toggle(active);
    else if (event.key === "ArrowLeft" && row?.open) toggle(active);
    else if (event.key === "ArrowLeft" && row?.depth > 0)
      move(
        rows.slice(0, active).findLastIndex((each) => each.depth < row.depth),
        false,
      );
    else if (event.key === "Escape" && selected !== null) location.hash = href("runs", run.id);
    else return;
    event.preventDefault();
  }

  return {
    node,
    /** `turn(first)` loads another part of the steps. */
    update(found, turn) {
      run = found;
      page = turn;
      offset = Date.parse(found.at) - Date.now();
      build();
    },
    select(id) {
      selected = id;
      if (run === null) return;
      const at = rows.findIndex((row) => row.step.id === id);
      if (at >= 0) move(at, false);
      else draw();
    },
    leave() {
      clearInterval(timer);
      resized.disconnect();
    },
  };
}
