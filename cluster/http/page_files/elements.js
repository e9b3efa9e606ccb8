// ── Elements ─────────────────────────────────────────────────────────────────────────────────────────────────────────
// All that is shown is made here, as elements and text: nothing of what a request holds is ever read as HTML.

const SVG = "http://www.w3.org/2000/svg";

const byId = (id) => document.getElementById(id);

/** An HTML element. `children`: elements and texts; null for none. */
function element(tag, attributes, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** The same of SVG. */
function drawn(tag, attributes, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** Touches a node only where its text changes: what is selected stays so. */
function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function setHidden(node, isHidden) {
  if (node.hidden !== isHidden) node.hidden = isHidden;
}

/** Makes the children of `parent`, but for the first `skipped`, those of `items`, in order. What was there before stays
 * the same node, and keeps focus and selection: `make` makes what is new, `update` brings each up to date. */
function keyed(parent, items, keyOf, make, update, skipped = 0) {
  const before = parent.keyedNodes ?? new Map();
  const after = new Map();
  const wanted = new Set(items.map(keyOf));
  // First, so that those that stay are not moved over what goes: that would take the focus from them.
  for (const [key, node] of before) {
    if (!wanted.has(key)) node.remove();
  }
  let place = parent.children[skipped] ?? null;
  for (const item of items) {
    const key = keyOf(item);
    const node = before.get(key) ?? make(item);
    after.set(key, node);
    update(node, item);
    if (node === place) place = place.nextElementSibling;
    else parent.insertBefore(node, place);
  }
  parent.keyedNodes = after;
}
