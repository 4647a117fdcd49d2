/** Helpers to build and to update the page; updates touch only what has changed. */

const SVG = "http://www.w3.org/2000/svg";
/** Colours of servers; further servers repeat them with dashed lines. */
const COLOURS = 8;

export const byId = (id) => document.getElementById(id);

/** An HTML element: attributes, then children (nodes or text). */
export function h(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** An SVG element. */
export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setHidden(node, hidden) {
  if (node.hidden !== hidden) node.hidden = hidden;
}

/** The class that gives a server its colour, as the CSS variable --c. */
export const colourClass = (index) => `server-${index % COLOURS}`;

export const isDashed = (index) => index >= COLOURS;

/** A server's name beside its colour. */
export function nameTag(name, index) {
  return h("span", { class: `name ${colourClass(index)}` }, h("i", { class: "swatch" }), name);
}

/** A CSS colour as canvases understand it, in the present theme. */
export function canvasColour(colour, className = "") {
  const probe = h("i", { class: className, hidden: true });
  probe.style.color = colour;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

/**
 * Show rows in a table, reusing its cells so that a selection or a scroll position stays.
 * A cell is a text or {text, server: index, bar: fraction, grave: boolean}; the first is the row's heading.
 */
export function fillRows(body, rows) {
  while (body.rows.length > rows.length) body.lastElementChild.remove();
  rows.forEach((cells, number) => {
    const row = body.rows[number] ?? body.appendChild(h("tr"));
    while (row.cells.length > cells.length) row.lastElementChild.remove();
    cells.forEach((cell, at) => fillCell(row.cells[at] ?? row.appendChild(emptyCell(at)), cell));
  });
}

const emptyCell = (at) => (at ? h("td") : h("th", { scope: "row" }));

function fillCell(node, cell) {
  const { text, server, bar, grave } = typeof cell === "string" ? { text: cell } : cell;
  const state = `${text}|${server}|${bar}|${grave}`;
  if (node.dataset.state === state) return;
  node.dataset.state = state;
  node.classList.toggle("grave-text", Boolean(grave));
  if (server !== undefined) node.replaceChildren(nameTag(text, server));
  else if (bar !== undefined) node.replaceChildren(meter(bar), h("span", {}, text));
  else node.textContent = text;
}

/** A small bar for a fraction; the text beside it says the same. */
function meter(fraction) {
  const filledPart = h("i");
  filledPart.style.width = `${Math.min(1, fraction ?? 0) * 100}%`;
  return h("span", { class: "meter", "aria-hidden": "true" }, filledPart);
}

/** Radio buttons in a fieldset. `options`: [[value, label], ...]; keeps the choice if it is still offered. */
export function fillChoice(fieldset, options, chosen, onChange) {
  const state = JSON.stringify(options);
  if (fieldset.dataset.state === state) return;
  fieldset.dataset.state = state;
  const had = fieldset.querySelector("input:checked")?.value ?? chosen;
  const value = options.some((each) => each[0] === had) ? had : chosen;
  const buttons = options.map(([each, label]) =>
    h("label", {}, h("input", {
      type: "radio", name: fieldset.id, value: each, checked: each === value, onchange: () => onChange(each),
    }), h("span", {}, label)));
  fieldset.replaceChildren(fieldset.querySelector("legend"), ...buttons);
  if (value !== had) onChange(value);
}

/** Show a tip near a point of the window, or hide it with no lines. */
export function showTip(x, y, lines) {
  const tip = byId("tip");
  setHidden(tip, !lines.length);
  if (!lines.length) return;
  tip.replaceChildren(...lines.map((line) => h("div", {}, line)));
  const { width, height } = tip.getBoundingClientRect();
  const right = document.documentElement.clientWidth;
  const above = y - height - 12;
  tip.style.left = `${Math.max(4, Math.min(x - width / 2, right - width - 4))}px`;
  tip.style.top = `${above > 4 ? above : y + 18}px`;
}

/** Show the data-tip of what is pointed at or tapped inside a node. */
export function tipsInside(node) {
  const show = (event) => {
    const text = event.target.closest("[data-tip]")?.dataset.tip;
    showTip(event.clientX, event.clientY, text ? text.split("\n") : []);
  };
  node.addEventListener("pointermove", show);
  node.addEventListener("pointerdown", show);
  node.addEventListener("pointerleave", (event) => event.pointerType !== "touch" && hideTip());
}

const hideTip = () => showTip(0, 0, []);

/** Hide a tip when the page is scrolled, or when something else is tapped. */
export function startTips() {
  document.addEventListener("pointerdown", hideTip, true);
  document.addEventListener("scroll", hideTip, { capture: true, passive: true });
}
