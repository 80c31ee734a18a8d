// Where one is (#/runs/ID/steps/STEP, #/tasks/ID, #/costs/BY), and what is looked at again when the journal changes.

import * as api from "./api.js";
import { h, put } from "./dom.js";
import { costsView } from "./costs.js";
import { inboxView } from "./inbox.js";
import { runsView } from "./runs.js";

const LEAST = 250; // milliseconds between two looks; large runs take longer, and are looked at less often

const main = document.getElementById("main");
const views = { runs: runsView, tasks: inboxView, costs: costsView };
let name = null;
let view = null;

/** The parts of the address, decoded: an id may hold any character. */
function place() {
  const parts = location.hash.replace(/^#\/?/, "").split("/");
  try {
    return parts.map(decodeURIComponent);
  } catch {
    return ["runs"];
  }
}

async function go() {
  const parts = place();
  const wanted = Object.hasOwn(views, parts[0]) ? parts[0] : "runs";
  if (wanted !== name) {
    view?.leave?.();
    name = wanted;
    view = views[name]();
    put(main, view.node);
    for (const each of document.querySelectorAll("nav a")) {
      if (each.dataset.view === name) each.setAttribute("aria-current", "page");
      else each.removeAttribute("aria-current");
    }
  }
  await guarded(() => view.show(parts.slice(1)));
  listen();
}

/** Run something; what the server refuses is told where it is asked for, or else here. */
async function guarded(work) {
  try {
    await work();
  } catch (error) {
    if (!(error instanceof api.Refused)) throw error;
    if (error.status === 0) return offline();
    if (error.status === 403) return ended();
    put(
      main,
      h("div", { class: "empty", role: "alert" }, h("p", null, error.message), h("a", { href: "#/runs" }, "All runs")),
    );
    view?.leave?.();
    name = view = null;
  }
}

// -- live ----------------------------------------------------------------------------------------

const light = document.getElementById("live");
let source = null;
let listening; // the run whose steps are followed too
let wanted = null; // what is to be looked at: "change" all, "look" what may have changed by itself
let busy = false;

function say(state, text) {
  light.className = `live ${state}`;
  light.textContent = text;
}

const offline = () => say("off", "not connected");

function ended() {
  source?.close();
  source = null;
  say("off", "ended");
  put(
    main,
    h(
      "div",
      { class: "empty", role: "alert" },
      h("p", null, "The server was started anew, and its address has changed."),
      h("p", null, "Open the address that ", h("code", null, "agentflow ui"), " printed."),
    ),
  );
}

function listen() {
  const run = view?.run?.() ?? null;
  if (document.hidden) return;
  if (source !== null && source.readyState !== EventSource.CLOSED && run === listening) return;
  source?.close();
  listening = run;
  source = api.events(run);
  source.onopen = () => say("on", "live");
  source.onerror = async () => {
    offline();
    // A refusal ends the stream for good: find out whether it is one.
    if (source?.readyState === EventSource.CLOSED) await guarded(() => api.get("about"));
    if (source?.readyState === EventSource.CLOSED) setTimeout(listen, 2000);
  };
  source.addEventListener("change", () => look("change"));
  source.addEventListener("look", () => look("look"));
}

async function look(what) {
  wanted = wanted === "change" ? wanted : what;
  if (busy) return;
  busy = true;
  try {
    while (wanted !== null && !document.hidden) {
      const what = wanted;
      wanted = null;
      const began = performance.now();
      await guarded(async () => {
        if (what === "change") await about();
        await view?.refresh?.(what);
      });
      const took = performance.now() - began;
      await new Promise((done) => setTimeout(done, Math.max(LEAST, 3 * took)));
    }
  } finally {
    busy = false;
  }
}

// A browser has few connections to one server: tabs that nobody looks at give theirs back.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    source?.close();
    source = null;
    say("off", "paused");
  } else {
    listen();
    look("change");
  }
});

async function about() {
  const found = await api.get("about");
  const count = document.getElementById("open-tasks");
  count.hidden = found.open_tasks === 0;
  count.textContent = found.open_tasks;
  count.setAttribute("aria-label", `${found.open_tasks} open`);
  const journal = document.getElementById("journal");
  journal.textContent = found.journal;
  journal.title = `${found.journal} · agentflow ${found.version}`;
}

// The token has done its work: it is in the cookie now, and not to be in the history or on a screenshot.
if (new URLSearchParams(location.search).has("token")) {
  history.replaceState(null, "", location.pathname + location.hash);
}
addEventListener("hashchange", go);
await guarded(about);
await go();
