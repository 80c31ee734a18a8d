// The time axis of a run. Stretches in which nothing worked (days of waiting, a night between two executions) are
// folded to a narrow band, so that what did work can be seen.

const WAITING = new Set(["waiting", "waited"]);
const FOLDED = 0.05; // of the time that something worked, but no narrower than
const NARROWEST = 34; // pixels

/** Segments of all steps that worked, merged and in order: [start, end] in milliseconds. */
function worked(steps, now) {
  const spans = [];
  for (const step of steps) {
    if (step.reused_from) continue;
    for (const each of step.tries) {
      if (WAITING.has(each.status) || !each.started_at || step.kind === "run") continue;
      const start = Date.parse(each.started_at);
      const open = each.status === "running" ? now : start;
      // The pause before a next attempt is part of the work: it is short, and tells something.
      const end = each.ended_at ? Date.parse(each.ended_at) + 1000 * (each.delay ?? 0) : open;
      spans.push([start, Math.max(start, Math.min(end, now))]);
    }
  }
  spans.sort((a, b) => a[0] - b[0]);
  const merged = [];
  for (const [start, end] of spans) {
    const last = merged.at(-1);
    if (last && start <= last[1]) last[1] = Math.max(last[1], end);
    else merged.push([start, end]);
  }
  return merged;
}

/**
 * A scale from milliseconds to 0…1, for an axis of so many pixels.
 *
 * `at(ms)` gives the position; `folds` are the bands that stand for a stretch: {from, to, seconds}; `ticks(count)`
 * gives positions with seconds since the run began.
 */
export function makeScale(steps, begin, end, now, truly, pixels) {
  const spans = worked(steps, now);
  const busy = spans.reduce((sum, [start, stop]) => sum + stop - start, 0);
  const pieces = []; // [start, end, width]
  const add = (start, stop, folded) => {
    if (stop > start)
      pieces.push({
        start,
        stop,
        width: folded ? Math.max(busy, 1) * Math.max(FOLDED, NARROWEST / pixels) : stop - start,
        folded,
      });
  };
  const fold = (gap) => !truly && busy > 0 && gap > Math.max(busy * 0.25, 50);
  let at = begin;
  for (const [start, stop] of spans) {
    add(at, start, fold(start - at));
    add(Math.max(start, at), stop, false);
    at = Math.max(at, stop);
  }
  add(at, end, fold(end - at));
  if (pieces.length === 0) pieces.push({ start: begin, stop: begin + 1, width: 1, folded: false });
  const total = pieces.reduce((sum, piece) => sum + piece.width, 0);
  let sum = 0;
  for (const piece of pieces) {
    piece.from = sum / total;
    sum += piece.width;
    piece.to = sum / total;
  }

  function position(ms) {
    let low = 0;
    let high = pieces.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (pieces[middle].stop < ms) low = middle + 1;
      else high = middle;
    }
    const piece = pieces[low];
    const part = (ms - piece.start) / (piece.stop - piece.start);
    return piece.from + (piece.to - piece.from) * Math.min(1, Math.max(0, part));
  }

  return {
    at: position,
    folds: pieces
      .filter((piece) => piece.folded)
      .map((piece) => ({ from: piece.from, to: piece.to, seconds: (piece.stop - piece.start) / 1000 })),
    ticks(count) {
      if (busy === 0) return [];
      const each = nice(total / 1000 / count) * 1000;
      const found = [];
      for (const piece of pieces) {
        if (piece.folded) continue;
        for (let ms = begin + Math.ceil((piece.start - begin) / each) * each; ms <= piece.stop; ms += each) {
          const at = position(ms);
          if (found.length === 0 || at - found.at(-1).at > 0.4 / count)
            found.push({ at, seconds: (ms - begin) / 1000 });
        }
      }
      return found;
    },
  };
}

/** A round number of seconds, not below this one. */
function nice(seconds) {
  const round = [60, 120, 300, 600, 1800, 3600, 7200, 21600, 43200, 86400, 172800, 604800];
  if (seconds > 30) return round.find((each) => each >= seconds) ?? Math.ceil(seconds / 604800) * 604800;
  const power = 10 ** Math.floor(Math.log10(Math.max(seconds, 1e-4)));
  return [1, 2, 5, 10].map((each) => each * power).find((each) => each >= seconds);
}
