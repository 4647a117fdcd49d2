/** A card for each server. */

import { byId, colourClass, h, nameTag, setHidden, setText } from "./dom.js";
import { bytes, clock, number, perSecond, seconds, share } from "./format.js";
import { isAnswering, serverInWords } from "./state.js";

/** [label, value of (view, meter, state)]; the meter is null if the server does not answer. */
const FIGURES = [
  ["Running", (view) => number(view.running)],
  ["Waiting", (view) => number(view.waiting)],
  ["Output tokens", (_, meter) => perSecond(meter?.perSecond("generation_tokens"))],
  ["Prompt tokens", (_, meter) => perSecond(meter?.perSecond("prompt_tokens"))],
  ["TTFT p50 / p99", (view) => quantiles(view.ttft)],
  ["ITL p50 / p99", (view) => quantiles(view.itl)],
  ["Layers waited for per token", (_, meter, state) => waited(meter, state.placement)],
  ["Calls that stay here", (_, meter) => share(meter?.ratio("calls_local", "calls_local", "calls_remote"))],
];

const quantiles = (pair) => (pair ? `${seconds(pair[0])} / ${seconds(pair[1])}` : "–");

/** A token waits in each layer in which its step waits. */
function waited(meter, placement) {
  const part = meter?.ratio("layers_waited", "layers");
  if (part === null || part === undefined || !placement) return "–";
  return `${number(part * placement.layers)} of ${placement.layers}`;
}

/** Memory in the order of the bar: [label, class, bytes]. */
export function memoryParts({ trunk, kv, kv_used: used, experts }) {
  return [
    ["Trunk", "trunk", trunk],
    ["KV used", "kv-used", Math.min(used, kv)],
    ["KV free", "kv-free", Math.max(0, kv - used)],
    ["Experts", "experts", experts],
  ];
}

/**
 * The cards.
 *
 * @param {(name: string) => void} onDrain - the user wants a server drained
 */
export class ServerCards {
  #cards = new Map();

  constructor(onDrain) {
    this.onDrain = onDrain;
  }

  draw(state, mayDrain) {
    setHidden(byId("servers-empty"), state.views.size > 0);
    setHidden(byId("servers-no-drain"), mayDrain || !state.views.size);
    for (const [name, card] of this.#cards) {
      if (!state.views.has(name)) {
        card.root.remove();
        this.#cards.delete(name);
      }
    }
    for (const view of state.views.values()) this.#drawCard(state, view, mayDrain);
  }

  #drawCard(state, view, mayDrain) {
    const { name } = view;
    let card = this.#cards.get(name);
    if (!card) {
      card = makeCard(name, state.indexOf(name), () => this.onDrain(name));
      this.#cards.set(name, card);
      byId("servers-cards").append(card.root);
    }
    const lost = state.isLost(name);
    card.root.dataset.state = lost ? "lost" : isAnswering(view) ? "alive" : "silent";
    setText(card.you, name === state.placement?.you ? "this server" : "");
    setText(card.state, serverInWords(state, view));
    FIGURES.forEach(([, value], at) => setText(card.values[at], lost ? "–" : value(view, state.meter(name), state)));
    drawMemory(card, view.memory ?? {});
    const faulty = Boolean(view.fault);
    setText(card.fault, faulty ? `Last fault, ${clock(view.fault_time)}: ${view.fault}` : "No fault since its start.");
    card.fault.classList.toggle("problem", faulty);
    card.drain.disabled = lost || !mayDrain;
  }
}

function makeCard(name, index, onDrain) {
  const values = FIGURES.map(() => h("dd"));
  const card = {
    values,
    you: h("span", { class: "muted" }),
    state: h("span", { class: "badge" }),
    bar: h("div", { class: "memory", "aria-hidden": "true" }),
    memory: h("p", { class: "memory-text" }),
    fault: h("p", { class: "last-fault" }),
    drain: h("button", { type: "button", class: "small", onclick: onDrain, "aria-label": `Drain ${name}` }, "Drain"),
  };
  const title = h("h3", {}, nameTag(name, index), " ", card.you, card.state);
  const figures = h("dl", {}, ...FIGURES.map(([label], at) => h("div", {}, h("dt", {}, label), values[at])));
  card.parts = ["trunk", "kv-used", "kv-free", "experts"].map((kind) => h("i", { class: kind }));
  card.bar.append(...card.parts);
  card.labels = card.parts.map(() => h("span"));
  card.memory.append(...card.labels.map((label, at) =>
    h("span", { class: "nowrap" }, h("i", { class: `key ${card.parts[at].className}` }), label)));
  card.root = h("article", { class: `card ${colourClass(index)}` }, title, figures, card.bar, card.memory,
    h("div", { class: "card-foot" }, card.fault, card.drain));
  return card;
}

function drawMemory(card, memory) {
  const parts = memoryParts(memory);
  const all = parts.reduce((sum, part) => sum + part[2], 0);
  parts.forEach(([label, , size], at) => {
    card.parts[at].style.width = `${all ? (size / all) * 100 : 0}%`;
    setText(card.labels[at], `${label} ${bytes(size)}`);
  });
}
