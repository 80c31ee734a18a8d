// Steps as rows: each below the step that it is inside, in the order in which they started.

/**
 * Rows of steps: `step`, `depth`, `has` (steps inside) and `open` (whether those follow).
 *
 * `closed` are the ids of steps whose inner ones are not wanted. With a function `fits`, only the steps that it takes
 * and those around them are given, and all are open.
 */
export function arrange(steps, closed, fits) {
  const known = new Set(steps.map((step) => step.id));
  const inner = new Map();
  const top = [];
  for (const step of steps) {
    const within = step.parent_id !== null && step.parent_id !== step.id && known.has(step.parent_id);
    if (!within) top.push(step);
    else if (inner.has(step.parent_id)) inner.get(step.parent_id).push(step);
    else inner.set(step.parent_id, [step]);
  }
  const order = inOrder(top, inner);
  const kept = fits && keptWith(order, fits);
  const rows = [];
  let below = Infinity; // a closed row hides what is deeper
  for (const { step, depth } of order) {
    if (depth > below) continue;
    below = Infinity;
    if (kept && !kept.has(step)) continue;
    const has = inner.has(step.id);
    const open = has && (kept !== null || !closed.has(step.id));
    if (has && !open) below = depth;
    rows.push({ step, depth, has, open });
  }
  return rows;
}

/** All steps with their depth; by a stack of its own, since steps may be nested deeper than functions may be called. */
function inOrder(top, inner) {
  const order = [];
  const seen = new Set();
  const stack = top.toReversed().map((step) => ({ step, depth: 0 }));
  while (stack.length) {
    const { step, depth } = stack.pop();
    order.push({ step, depth });
    if (seen.has(step.id)) continue; // the same record twice in a run, under one idempotency key
    seen.add(step.id);
    for (const each of (inner.get(step.id) ?? []).toReversed()) stack.push({ step: each, depth: depth + 1 });
  }
  return order;
}

/** The steps that fit, and those around them. */
function keptWith(order, fits) {
  const kept = new Set();
  const path = [];
  for (const { step, depth } of order) {
    path.length = depth;
    path.push(step);
    if (fits(step)) for (const each of path) kept.add(each);
  }
  return kept;
}
