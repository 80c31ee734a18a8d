// Times, durations, money and sizes as people read them.

import { h } from "./dom.js";

const DAY = 86400;

/** A moment: the time of day if it is today's, else with its date. */
export function when(iso) {
  if (!iso) return "";
  const at = new Date(iso);
  const time = at.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
  if (at.toDateString() === new Date().toDateString()) return time;
  const day = { month: "short", day: "numeric" };
  if (at.getFullYear() !== new Date().getFullYear()) day.year = "numeric";
  return `${at.toLocaleDateString("en", day)}, ${time.slice(0, 5)}`;
}

/** A moment as an element which has the whole of it in its title. */
export const moment = (iso) => h("time", { datetime: iso, title: iso }, when(iso));

/** Seconds as `340 ms`, `1.51 s`, `3 m 04 s`, `2 h 05 m`, `3 d 4 h`. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || Number.isNaN(seconds)) return "";
  const s = Math.max(0, seconds);
  if (s < 0.0005) return "< 1 ms";
  if (s < 0.9995) return `${Math.round(s * 1000)} ms`;
  if (s < 59.995) return `${s.toFixed(s < 10 ? 2 : 1)} s`;
  const two = (number) => String(Math.floor(number)).padStart(2, "0");
  if (s < 3600) return `${Math.floor(s / 60)} m ${two(s % 60)} s`;
  if (s < DAY) return `${Math.floor(s / 3600)} h ${two((s % 3600) / 60)} m`;
  return `${Math.floor(s / DAY)} d ${Math.floor((s % DAY) / 3600)} h`;
}

/** Dollars: two decimals from ten on, four below, and seven where that would hide what it was. */
export function money(dollars) {
  if (dollars === null || dollars === undefined) return "unknown";
  if (dollars === 0) return "$0";
  const size = Math.abs(dollars);
  if (size >= 10) return `$${dollars.toFixed(2)}`;
  return `$${size >= 0.001 ? dollars.toFixed(4) : dollars.toFixed(7).replace(/0+$/, "")}`;
}

export const number = (count) => Number(count).toLocaleString("en");

/** Characters of a text, as a size. */
export function size(count) {
  if (count < 1000) return `${count} characters`;
  return count < 1e6 ? `${(count / 1e3).toFixed(1)} K characters` : `${(count / 1e6).toFixed(1)} M characters`;
}

/** Whom a task is for. */
export const names = (who) => (Array.isArray(who) ? who.join(", ") : who) || "anybody";

/** Seconds between two moments; with no end, up to `now` (milliseconds). */
export const between = (start, end, now) => (start ? ((end ? Date.parse(end) : now) - Date.parse(start)) / 1000 : null);

const WORDS = { "in doubt": "doubt" };

/** A status as a word with its colour. */
export const chip = (status) => h("span", { class: `chip s-${WORDS[status] ?? status}` }, status);

/** The same as a class name. */
export const statusClass = (status) => `s-${WORDS[status] ?? status}`;
