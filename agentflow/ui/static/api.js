// Requests to the server that this page came from. The token is in a cookie that scripts cannot read.

/** What the server refused, in its words. `status` is HTTP's; 0: it did not answer. */
export class Refused extends Error {
  constructor(status, body) {
    super(body.error);
    this.status = status;
    this.body = body;
  }
}

async function request(url, options) {
  let response;
  try {
    response = await fetch(url, { credentials: "same-origin", ...options });
  } catch {
    throw new Refused(0, { error: "The server does not answer. Is `agentflow ui` still running?" });
  }
  if (response.ok) return response;
  const text = await response.text();
  let body = { error: text };
  try {
    body = JSON.parse(text);
  } catch {
    // The guard's refusals are plain text.
  }
  throw new Refused(response.status, body);
}

const address = (path, query) => {
  const known = Object.entries(query ?? {}).filter(
    ([, value]) => value !== null && value !== undefined && value !== "",
  );
  return `/api/${path}?${new URLSearchParams(known)}`;
};

export const get = async (path, query) => (await request(address(path, query))).json();

export const text = async (query) => (await request(address("value", query))).text();

export const link = (query) => address("value", query);

/** `body` is JSON text or a value. */
export async function post(path, body) {
  const headers = { "Content-Type": "application/json" };
  const response = await request(`/api/${path}`, { method: "POST", headers, body: toJson(body) });
  return response.json();
}

/** Events of the server. */
export const events = (run) => new EventSource(address("events", { run }));

// -- numbers that a browser would round --------------------------------------------------------------

const exact = typeof JSON.rawJSON === "function";

/** Parse JSON so that a number which JavaScript cannot hold keeps its digits. */
export function fromJson(source) {
  return JSON.parse(source, (key, value, context) =>
    exact && typeof value === "number" && context?.source !== undefined && !same(value, context.source)
      ? JSON.rawJSON(context.source)
      : value,
  );
}

const same = (value, source) => String(value) === source || !/^-?\d+$/.test(source);

export const toJson = (value) => JSON.stringify(value);

/** A number as it was written. */
export const numberText = (value) => (value !== null && typeof value === "object" ? value.rawJSON : String(value));

/** Whether this is a number whose digits were kept. */
export const isNumber = (value) => typeof value === "number" || (exact && JSON.isRawJSON(value));

/** What was typed as a number; as text where it is none, so that the server says what it has to be. */
export function typedNumber(typed) {
  if (!/^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$/.test(typed)) return typed;
  return exact && !same(Number(typed), typed) ? JSON.rawJSON(typed) : Number(typed);
}
