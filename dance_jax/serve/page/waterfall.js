/** One step of the engine, layer by layer: where the time of a token goes. */

import { callJson } from "./api.js";
import { byId, colourClass, fillChoice, fillRows, h, setHidden, setText, svg, tipsInside } from "./dom.js";
import { bytes, counted, number, seconds } from "./format.js";

const LEFT = 62;
const TOP = 40;
const LANE = 8;
const ZOOMS = [["1", "fit"], ["2", "2×"], ["4", "4×"], ["8", "8×"]];

/** A call as spans [{kind, begin, end}]: wire, queue, compute, wire; or one, if the peer did not report its times. */
export function spansOf({ begin, end, arrived, compute_begin: start, compute_end: done }) {
  if ([arrived, start, done].some((time) => time === null)) return [{ kind: "unknown", begin, end }];
  const times = [begin, arrived, start, done, end];
  return ["wire", "queue", "compute", "wire"].map((kind, at) => ({ kind, begin: times[at], end: times[at + 1] }));
}

/** Sums over calls: Map of peer -> {calls, rows, bytes} and the seconds {wire, queue, compute, unknown}. */
export function sumsOf(calls) {
  const sums = new Map();
  for (const call of calls) {
    const sum = sums.get(call.peer) ?? { calls: 0, rows: 0, bytes: 0, wire: 0, queue: 0, compute: 0, unknown: 0 };
    sums.set(call.peer, sum);
    sum.calls += 1;
    sum.rows += call.rows;
    sum.bytes += call.bytes;
    for (const { kind, begin, end } of spansOf(call)) sum[kind] += end - begin;
  }
  return sums;
}

/** Spans of the server itself in a layer. */
const localSpans = (layer) => [["call", "send"], ["local", "compute"], ["wait", "wait"]]
  .filter(([name]) => layer[name])
  .map(([name, kind]) => ({ kind, begin: layer[name][0], end: layer[name][1] }));

const KINDS = {
  send: "sends the calls", compute: "computes experts", wait: "waits",
  wire: "on the wire", queue: "queues there", unknown: "away, inside not known",
};

export class Waterfall {
  #steps = [];
  #recording = false;
  #shown = "";

  constructor(state, onChange) {
    this.state = state;
    this.onChange = onChange;
    byId("token-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#record(Number(byId("token-steps").value));
    });
    byId("token-step").addEventListener("change", onChange);
    fillChoice(byId("token-zoom"), ZOOMS, "1", onChange);
    tipsInside(byId("token-picture"));
  }

  draw(state, live) {
    byId("token-record").disabled = !live || this.#recording;
    setText(byId("token-server"), state.placement?.you ?? "this server");
    const step = this.#steps[byId("token-step").value];
    setHidden(byId("token-body"), !step);
    if (!step) return;
    const zoom = Number(byId("token-zoom").querySelector("input:checked").value);
    const width = Math.max(320, byId("token-body").clientWidth - 4) * zoom;
    // A recorded step does not change: draw it again only in another size.
    const shown = [step.step, step.begin, width].join();
    if (shown === this.#shown) return;
    this.#shown = shown;
    drawLegend(state);
    drawStep(state, step, width);
    drawSums(state, step);
  }

  async #record(tokens) {
    this.#recording = true;
    setText(byId("token-said"), "Waiting for the next tokens …");
    this.onChange();
    try {
      this.#steps = (await callJson("trace", { body: { tokens } })).steps;
      this.#shown = "";
      this.#offer();
      setText(byId("token-said"), `${counted(this.#steps.length, "step")} recorded.`);
    } catch (error) {
      setText(byId("token-said"), `Nothing recorded: ${error.message}`);
    }
    this.#recording = false;
    this.onChange();
  }

  #offer() {
    const select = byId("token-step");
    select.disabled = !this.#steps.length;
    select.replaceChildren(...this.#steps.map((step, at) => h("option", { value: at }, titleOf(step))));
  }
}

function titleOf(step) {
  const requests = Object.values(step.requests);
  const tokens = requests.reduce((sum, each) => sum + each, 0);
  const length = seconds(step.end - step.begin);
  return `step ${step.step}: ${length}, ${counted(tokens, "token")} of ${counted(requests.length, "request")}`;
}

function drawLegend(state) {
  const me = colourClass(state.indexOf(state.placement.you));
  byId("token-legend").replaceChildren(
    h("span", {}, "Colour: the server. Shade:"),
    ...Object.entries(KINDS).map(([kind, label]) =>
      h("span", { class: `name ${me}` }, h("i", { class: `swatch span-${kind}` }), label)),
  );
}

function drawStep(state, step, width) {
  const x = (time) => LEFT + ((time - step.begin) / (step.end - step.begin)) * (width - LEFT - 8);
  const draw = { me: state.placement.you, bar: (server, span, y, tip) => bar(state.indexOf(server), span, x, y, tip) };
  const nodes = step.parts.map((part) => partBar(draw, part));
  let y = TOP;
  for (const layer of step.layers) {
    const calls = step.calls.filter((call) => call.layer === layer.layer);
    nodes.push(...layerBars(draw, layer, calls, x, y));
    y += (1 + calls.length) * (LANE + 1) + 4;
  }
  const picture = byId("token-picture");
  picture.setAttribute("width", width);
  picture.setAttribute("height", y + 6);
  picture.setAttribute("aria-label", `${titleOf(step)}. The table below has the sums.`);
  picture.replaceChildren(...timeAxis(step, x, y), ...nodes);
}

function partBar({ me, bar }, { name, begin, end }) {
  const kind = name === "computing" ? "send" : "wait";
  return bar(me, { kind, begin, end }, TOP - 14, `${name}: ${seconds(end - begin)}`);
}

/** The server's own lane, then one for each call. */
function layerBars({ me, bar }, layer, calls, x, y) {
  const label = svg("text", { x: LEFT - 6, y: y + LANE, "text-anchor": "end" }, `layer ${layer.layer}`);
  const own = localSpans(layer).map((span) => bar(me, span, y, spanInWords(layer, me, span)));
  const away = calls.flatMap((call, at) => {
    const lane = y + (at + 1) * (LANE + 1);
    const bars = spansOf(call).map((span) => bar(call.peer, span, lane, spanInWords(call, call.peer, span)));
    if (call.outcome === "answered") return bars;
    return [...bars, svg("text", { class: "grave", x: x(call.end) + 4, y: lane + LANE }, call.outcome)];
  });
  return [label, ...own, ...away];
}

function timeAxis(step, x, height) {
  const parts = x(step.end) < 600 ? [0, 0.5, 1] : [0, 0.25, 0.5, 0.75, 1];
  return parts.flatMap((part) => {
    const time = step.begin + part * (step.end - step.begin);
    const anchor = { 0: "start", 1: "end" }[part] ?? "middle";
    return [
      svg("line", { class: "level", x1: x(time), x2: x(time), y1: 16, y2: height }),
      svg("text", { x: x(time), y: 11, "text-anchor": anchor }, seconds(time - step.begin)),
    ];
  });
}

function bar(server, { kind, begin, end }, x, y, tip) {
  return svg("rect", {
    class: `span-${kind} ${colourClass(server)}`, "data-tip": tip,
    x: x(begin), y, width: Math.max(0.75, x(end) - x(begin)), height: LANE,
  });
}

function spanInWords({ layer, rows, outcome = "answered" }, server, { kind, begin, end }) {
  const ending = outcome === "answered" ? "" : `\nthe call was ${outcome}`;
  return `Layer ${layer}, ${server}\n${KINDS[kind]}: ${seconds(end - begin)}\n${counted(rows, "row")}${ending}`;
}

function drawSums(state, step) {
  const sums = sumsOf(step.calls);
  fillRows(byId("token-rows"), [...sums].map(([peer, sum]) => [
    { text: peer, server: state.indexOf(peer) },
    number(sum.calls), number(sum.rows), bytes(sum.bytes),
    seconds(sum.wire), seconds(sum.queue), seconds(sum.compute), seconds(sum.unknown),
  ]));
  setText(byId("token-sum"), stepInWords(step));
}

function stepInWords({ parts, layers, calls }) {
  const lengths = (name) => layers.reduce((sum, layer) => sum + (layer[name] ? layer[name][1] - layer[name][0] : 0), 0);
  const waits = layers.filter((layer) => layer.wait).length;
  return [
    calls.length ? "" : "No expert call left the server. ",
    `Parts of the step: ${parts.map((part) => `${part.name} ${seconds(part.end - part.begin)}`).join(", ")}. `,
    `In all layers, own experts took ${seconds(lengths("local"))}; `,
    `the step waited ${seconds(lengths("wait"))} for others, in ${waits} of ${layers.length} layers.`,
  ].join("");
}
