/** The picture of who holds which expert: one grid of layers x experts for each server. */

import { byId, canvasColour, colourClass, fillChoice, h, nameTag, setHidden, setText, showTip } from "./dom.js";
import { counted, listed, number, perSecond } from "./format.js";
import { callersOf, scaleOf } from "./rates.js";
import { holdersInWords } from "./state.js";

const ALL = "";
const LEFT = 26;
const BOTTOM = 16;
const SMALLEST_CELL = 5;
const LARGEST_CELL = 14;
const TALLEST_CELL = 22;
/** Spare slots that are drawn; their number is told in words. */
const SLOTS = 24;

export class Holders {
  #grids = new Map();
  #chosen = ALL;

  /** @param {() => void} onChange - the picture must be drawn again */
  constructor(onChange) {
    this.onChange = onChange;
  }

  draw(state) {
    const { placement } = state;
    setHidden(byId("experts-empty"), Boolean(placement));
    setHidden(byId("experts-body"), !placement);
    if (!placement) return;
    const callers = state.names.map((name) => [name, name]);
    fillChoice(byId("experts-callers"), [[ALL, "all"], ...callers], ALL, (name) => {
      this.#chosen = name;
      this.onChange();
    });
    const calls = this.#calls(state);
    drawLegend(state, calls, this.#chosen);
    setText(byId("experts-moving"), movesInWords(state));
    this.#matchGrids(state);
    const look = lookOf(state);
    for (const grid of this.#grids.values()) grid.draw(state, calls, look);
  }

  /** What the colours show: calls by all, or by the chosen server's tokens. */
  #calls(state) {
    const rates = state.expertRates();
    const isShown = (name) => this.#chosen === ALL || name === this.#chosen;
    const shown = rates.map((each, at) => (isShown(state.names[at]) ? each : null));
    const calls = callersOf(shown, state.placement.layers * state.placement.experts);
    return { ...calls, scale: scaleOf(calls.rate) };
  }

  #matchGrids(state) {
    for (const [name, grid] of this.#grids) {
      if (!state.resident.has(name)) {
        grid.root.remove();
        this.#grids.delete(name);
      }
    }
    for (const name of state.resident.keys()) {
      if (this.#grids.has(name)) continue;
      const grid = new Grid(name, state.indexOf(name));
      this.#grids.set(name, grid);
      byId("experts-grids").append(grid.root);
    }
  }
}

/** Which experts move, would move by a dry run, or have moved within a minute. */
function movesInWords(state) {
  const moves = (countOn, word) => [...state.resident.keys()].flatMap((name) => {
    const count = countOn(name);
    return count ? [`${number(count)} ${word} ${name}`] : [];
  });
  const coming = moves((name) => state.comingTo(name), "to");
  const news = moves((name) => state.newOn(name), "on");
  return [
    coming.length ? `${state.plan.dry ? "Would move" : "On their way"}: ${listed(coming)}.` : "",
    news.length ? `New within a minute: ${listed(news)}.` : "",
  ].filter(Boolean).join(" ");
}

/** Colours of the present theme, as canvases understand them. */
function lookOf(state) {
  return {
    ink: canvasColour("var(--ink)"),
    muted: canvasColour("var(--muted)"),
    absent: canvasColour("var(--absent)"),
    idle: canvasColour("var(--idle)"),
    servers: state.names.map((_, index) => canvasColour("var(--c)", colourClass(index))),
  };
}

class Grid {
  #cursor = null;
  #state = null;

  constructor(name, index) {
    this.name = name;
    this.canvas = h("canvas", { role: "img", tabindex: "0" });
    this.caption = h("span", { class: "muted" });
    this.slots = h("span", { class: "slots", "aria-hidden": "true" });
    this.root = h("figure", {}, h("figcaption", {}, h("h3", {}, nameTag(name, index)), this.slots, this.caption),
      h("div", { class: "scroll" }, this.canvas));
    this.canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.#point(event));
    // A finger leaves when it is lifted; the tip of a tap stays until the next tap.
    this.canvas.addEventListener("pointerleave", (event) => event.pointerType !== "touch" && this.#moveTo(null));
    this.canvas.addEventListener("blur", () => this.#moveTo(null));
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  draw(state, calls, look) {
    Object.assign(this, { calls, look });
    this.#state = state;
    const { layers, experts } = state.placement;
    const width = this.root.clientWidth - LEFT - 4;
    this.cell = Math.max(SMALLEST_CELL, Math.min(LARGEST_CELL, width / experts));
    this.tall = Math.round(Math.max(this.cell, Math.min(TALLEST_CELL, 260 / layers)));
    this.#label();
    const context = scaled(this.canvas, Math.ceil(LEFT + experts * this.cell + 1), layers * this.tall + BOTTOM);
    const held = state.resident.get(this.name);
    for (let at = 0; at < held.length; at += 1) this.#drawCell(context, at, held[at], experts);
    drawAxes(context, layers, experts, this.cell, this.tall, look.muted);
    if (this.#cursor === null) return;
    const [x, y, wide, high] = this.#boxOf(this.#cursor, experts);
    context.lineWidth = 2;
    context.strokeStyle = look.ink;
    context.strokeRect(x, y, wide, high);
  }

  #label() {
    const { words, spare } = gridInWords(this.#state, this.name);
    if (this.slots.childElementCount !== Math.min(spare, SLOTS)) {
      this.slots.replaceChildren(...Array.from({ length: Math.min(spare, SLOTS) }, () => h("i")));
    }
    setText(this.caption, words);
    const label = `Experts on ${this.name}: ${words}`;
    if (this.canvas.getAttribute("aria-label") !== label) this.canvas.setAttribute("aria-label", label);
  }

  #drawCell(context, at, held, experts) {
    const { calls, look } = this;
    const state = this.#state;
    const [x, y, width, height] = this.#boxOf(at, experts);
    context.fillStyle = held ? look.idle : look.absent;
    context.fillRect(x, y, width, height);
    if (held && calls.caller[at] >= 0) {
      // The square root shows rare calls too: rates of experts differ by powers of ten.
      context.globalAlpha = 0.2 + 0.8 * Math.min(1, Math.sqrt(calls.rate[at] / calls.scale));
      context.fillStyle = look.servers[calls.caller[at]];
      context.fillRect(x, y, width, height);
      context.globalAlpha = 1;
    }
    context.fillStyle = context.strokeStyle = look.ink;
    context.lineWidth = 1;
    const isFramed = held ? state.isNew(this.name, at) : state.comes(this.name, at);
    if (held && state.holders[at] > 1) context.fillRect(x + width / 2 - 1, y + height / 2 - 1, 2, 2);
    if (isFramed) context.strokeRect(x + 0.5, y + 0.5, width - 1, height - 1);
    if (state.leaves(this.name, at)) strike(context, x, y, width, height);
  }

  /** [x, y, width, height] of a cell, on whole pixels with a gap of one. */
  #boxOf(at, experts) {
    const column = at % experts;
    const x = LEFT + Math.round(column * this.cell);
    const end = LEFT + Math.round((column + 1) * this.cell);
    return [x, Math.floor(at / experts) * this.tall, end - x - 1, this.tall - 1];
  }

  #point(event) {
    if (!this.#state) return;
    const { layers, experts } = this.#state.placement;
    const expert = Math.floor((event.offsetX - LEFT) / this.cell);
    const layer = Math.floor(event.offsetY / this.tall);
    const inside = expert >= 0 && expert < experts && layer >= 0 && layer < layers;
    this.#moveTo(inside ? layer * experts + expert : null);
  }

  #key(event) {
    const { layers, experts } = this.#state.placement;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -experts, ArrowDown: experts }[event.key];
    if (event.key === "Escape") return this.#moveTo(null);
    if (!step) return undefined;
    event.preventDefault();
    const to = this.#cursor === null ? 0 : this.#cursor + step;
    if (to >= 0 && to < layers * experts) this.#moveTo(to);
    setText(byId("experts-said"), cellInWords(this.#state, this.#cursor).join(". "));
    return undefined;
  }

  #moveTo(cell) {
    const isSame = cell === this.#cursor && (cell === null || !byId("tip").hidden);
    if (!this.#state || isSame) return;
    this.#cursor = cell;
    this.draw(this.#state, this.calls, this.look);
    if (cell === null) return void showTip(0, 0, []);
    const { experts } = this.#state.placement;
    const box = this.canvas.getBoundingClientRect();
    const [x, y, width] = this.#boxOf(cell, experts);
    showTip(box.left + x + width / 2, box.top + y, cellInWords(this.#state, cell));
  }
}

function strike(context, x, y, width, height) {
  context.beginPath();
  context.moveTo(x, y + height);
  context.lineTo(x + width, y);
  context.stroke();
}

/** The context of a canvas that has this size on the page, at the screen's resolution. */
function scaled(canvas, width, height) {
  const density = devicePixelRatio || 1;
  canvas.width = Math.round(width * density);
  canvas.height = Math.round(height * density);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(density, density);
  return context;
}

function drawAxes(context, layers, experts, cell, tall, colour) {
  context.fillStyle = colour;
  context.font = "10px system-ui, sans-serif";
  context.textBaseline = "middle";
  context.textAlign = "right";
  for (let layer = 0; layer < layers; layer += 5) context.fillText(layer, LEFT - 5, (layer + 0.5) * tall);
  context.textAlign = "center";
  const every = cell < 9 ? 16 : 8;
  for (let expert = 0; expert < experts; expert += every) {
    context.fillText(expert, LEFT + (expert + 0.5) * cell, layers * tall + BOTTOM / 2);
  }
}

/** What a server holds. */
function gridInWords(state, name) {
  if (state.isLost(name)) return { words: "lost: its experts are not available", spare: 0 };
  const held = state.resident.get(name);
  const experts = held.reduce((sum, bit) => sum + bit, 0);
  const shared = held.reduce((sum, bit, at) => sum + (bit && state.holders[at] > 1 ? 1 : 0), 0);
  const { slots } = state.placement.servers.find((each) => each.name === name);
  const spare = state.views.get(name)?.spare_slots ?? slots - experts;
  const words = `${counted(experts, "expert")}, ${number(shared)} also elsewhere, ${counted(spare, "spare slot")}`;
  return { words, spare };
}

/** Lines about one expert. */
function cellInWords(state, cell) {
  const { experts } = state.placement;
  const rates = state.expertRates();
  const callers = state.names.flatMap((name, at) =>
    (rates[at]?.[cell] > 0.005 ? [`${perSecond(rates[at][cell])} by ${name}`] : []));
  return [
    `Layer ${Math.floor(cell / experts)}, expert ${cell % experts}`,
    `held by ${holdersInWords(state, cell)}`,
    callers.length ? `called ${listed(callers)}` : "not called now",
    ...planInWords(state, cell),
  ];
}

/** How one expert moves by the plan: "on its way to beta", "leaves alpha". */
function planInWords(state, cell) {
  const servers = [...state.resident.keys()];
  const to = servers.filter((name) => state.comes(name, cell));
  const from = servers.filter((name) => state.leaves(name, cell));
  const [comes, leaves] = state.plan?.dry ? ["would come to", "would leave"] : ["on its way to", "leaves"];
  return [
    ...(to.length ? [`${comes} ${listed(to)}`] : []),
    ...(from.length ? [`${leaves} ${listed(from)}`] : []),
  ];
}

function drawLegend(state, { scale }, chosen) {
  const shown = state.names.filter((name) => chosen === ALL || name === chosen);
  const { plan } = state;
  const text = JSON.stringify([shown, Math.round(scale * 10), plan && plan.dry]);
  const legend = byId("experts-legend");
  if (legend.dataset.state === text) return;
  legend.dataset.state = text;
  legend.replaceChildren(
    h("span", {}, chosen === ALL ? "Colour: whose tokens call it most" : "Colour: calls by the tokens of"),
    ...shown.map((name) => nameTag(name, state.indexOf(name))),
    h("span", { class: "name" }, h("i", { class: "ramp" }), `0 to ${perSecond(scale)} calls`),
    h("span", { class: "name" }, h("i", { class: "swatch idle" }), "held, not called"),
    h("span", { class: "name" }, h("i", { class: "swatch absent" }), "not held here"),
    h("span", { class: "name" }, h("i", { class: "swatch idle dotted" }), "also held elsewhere"),
    h("span", { class: "name" }, h("i", { class: "swatch idle framed" }), "new within a minute"),
    ...(plan ? [
      h("span", { class: "name" }, h("i", { class: "swatch absent framed" }), plan.dry ? "would come" : "on its way here"),
      h("span", { class: "name" }, h("i", { class: "swatch idle struck" }), plan.dry ? "would leave" : "leaves"),
    ] : []),
  );
}
