// Everything that is shown is put here: text stays text, whatever it holds. Nothing is ever parsed as HTML.

// Control characters, and those that turn the direction of writing around: what is shown is what is there.
const STEERING = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g;

export const clean = (text) => String(text).replace(STEERING, "\ufffd");

/** An element. Properties: `class`, `on` (listeners), `style` (custom or plain properties), else attributes. */
export function h(tag, props, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    } else if (name === "style") {
      for (const [property, set] of Object.entries(value)) node.style.setProperty(property, set);
    } else if (name === "value") {
      node.value = value;
    } else {
      node.setAttribute(name, value === true ? "" : clean(value));
    }
  }
  node.append(...flat(children));
  return node;
}

/** Give an element other children. */
export function put(node, ...children) {
  node.replaceChildren(...flat(children));
}

function flat(children) {
  return children
    .flat(Infinity)
    .filter((child) => child !== null && child !== undefined && child !== false)
    .map((child) => (child instanceof Node ? child : document.createTextNode(clean(child))));
}

/** Children by key: those that are there are kept, with their focus and what people opened in them. */
export function keep(parent, items, key, make, update) {
  const known = new Map([...parent.children].map((node) => [node.dataset.key, node]));
  let before = parent.firstElementChild;
  for (const item of items) {
    const name = key(item);
    let node = known.get(name);
    if (node) {
      known.delete(name);
    } else {
      node = make(item);
      node.dataset.key = name;
    }
    update(node, item);
    if (node === before) before = before.nextElementSibling;
    else parent.insertBefore(node, before);
  }
  for (const node of known.values()) node.remove();
}

/** The address of a place on this page: an id may hold any character. */
export const href = (...parts) => `#/${parts.map(encodeURIComponent).join("/")}`;

let announcer = null;

/** Say something to screen readers. */
export function announce(text) {
  announcer ??= document.body.appendChild(h("div", { class: "aside", role: "status" }));
  announcer.textContent = clean(text);
}
