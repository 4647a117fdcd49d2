/** Time lines for each server, with what happened marked as vertical lines. */

import { byId, colourClass, fillChoice, h, isDashed, nameTag, setHidden, svg } from "./dom.js";
import { bytesPerSecond, clock, seconds, share } from "./format.js";
import { HISTORY_SECONDS } from "./state.js";

const CHARTS = [
  { key: "local", title: "Local share: calls that stay on the server", show: share, top: 1 },
  { key: "anyMiss", title: "Any-miss: share of token-layers with an away call", show: share, top: 1 },
  { key: "itl", title: "Latency: ITL, p50", show: seconds },
  { key: "bytes", title: "Bytes per second on its links, both ways", show: bytesPerSecond, binary: true },
];
const RANGES = [["120", "2 min"], ["300", "5 min"], [String(HISTORY_SECONDS), "15 min"]];
/** Seconds that the charts show at least, however young the page is. */
const SHORTEST_RANGE = 60;
const HEIGHT = 170;
const PLOT = { left: 64, right: 12, top: 30, bottom: 22 };
/** A longer pause between two points is a gap in the line. */
const GAP_SECONDS = 5;
const EVENTS = 12;

/** The smallest of 1, 2, 5 x 10^n (x 2^10n for bytes) that is not below a value. */
export function niceTop(value, binary) {
  if (!(value > 0)) return 1;
  const unit = binary ? 1024 ** Math.floor(Math.log2(value) / 10) : 1;
  const power = 10 ** Math.floor(Math.log10(value / unit));
  return unit * power * [1, 2, 5, 10].find((step) => step * power * unit >= value * 0.9999);
}

/** SVG path of points [{time, value}], broken where a value or some seconds lack. */
export function pathOf(points, x, y) {
  let path = "";
  let last = null;
  for (const { time, value } of points) {
    if (value === null) {
      last = null;
      continue;
    }
    path += `${last !== null && time - last < GAP_SECONDS ? "L" : "M"}${x(time).toFixed(1)} ${y(value).toFixed(1)}`;
    last = time;
  }
  return path;
}

/** Labels of marks in two rows: [{x, text, row}]; those that would overlap in both are left out. */
export function placeLabels(marks, right) {
  const ends = [-Infinity, -Infinity];
  return marks.filter((mark) => mark.text).flatMap(({ x, text }) => {
    const width = text.length * 6.5 + 8;
    const start = Math.min(x, right - width);
    const row = ends.findIndex((end) => end < start);
    if (row < 0) return [];
    ends[row] = start + width;
    return [{ x: start, text, row }];
  });
}

export class TimeLines {
  #charts = null;
  #range = Number(RANGES[1][0]);
  /** Time pointed at; null: now. */
  #at = null;

  constructor(onChange) {
    this.onChange = onChange;
  }

  draw(state) {
    setHidden(byId("lines-empty"), state.history.size > 0);
    fillChoice(byId("lines-range"), RANGES, RANGES[1][0], (value) => {
      this.#range = Number(value);
      this.onChange();
    });
    drawEvents(state);
    if (!state.history.size) return;
    this.#charts ??= CHARTS.map((chart) => this.#make(chart));
    const to = state.now;
    const begin = Math.min(...[...state.history.values()].map((points) => points[0].time));
    const from = Math.max(to - this.#range, Math.min(begin, to - SHORTEST_RANGE));
    this.span = [from, to];
    const marks = state.marks.filter((mark) => mark.time >= from);
    const lines = [...state.history].map(([name, points]) => [name, points.filter((point) => point.time >= from)]);
    this.#charts.forEach((chart) => this.#drawChart(chart, state, lines, marks));
  }

  #make(chart) {
    const picture = svg("svg", { role: "img", tabindex: "0", height: HEIGHT, "aria-label": chart.title });
    const values = h("p", { class: "legend" });
    byId("lines-charts").append(h("figure", {}, h("figcaption", {}, h("h3", {}, chart.title), values), picture));
    picture.addEventListener("pointermove", (event) => this.#point(event.offsetX, picture));
    picture.addEventListener("pointerleave", () => this.#show(null));
    picture.addEventListener("blur", () => this.#show(null));
    picture.addEventListener("keydown", (event) => this.#key(event));
    return { ...chart, picture, values };
  }

  #point(x, picture) {
    const [from, to] = this.span;
    const part = (x - PLOT.left) / (picture.clientWidth - PLOT.left - PLOT.right);
    this.#show(from + Math.max(0, Math.min(1, part)) * (to - from));
  }

  #key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") this.#show(null);
    if (!step) return;
    event.preventDefault();
    const [from, to] = this.span;
    this.#show(Math.max(from, Math.min(to, (this.#at ?? to) + (step * (to - from)) / 60)));
  }

  #show(at) {
    if (at === this.#at) return;
    this.#at = at;
    this.onChange();
  }

  #drawChart(chart, state, lines, marks) {
    const width = chart.picture.parentElement.clientWidth;
    const series = lines.map(([name, points]) =>
      [name, points.map((point) => ({ time: point.time, value: point[chart.key] }))]);
    const frame = this.#frame(chart, series, width - PLOT.right);
    const { x, y } = frame;
    chart.picture.setAttribute("width", width);
    chart.picture.replaceChildren(
      ...axes(chart, frame),
      ...markLines(marks, frame),
      ...series.map(([name, points]) => line(state.indexOf(name), pathOf(points, x, y))),
      ...(this.#at === null ? [] : [vertical(x(this.#at), "cursor")]),
    );
    const at = this.#at ?? frame.to;
    this.#tell(chart, state, series.map(([name, points]) => [name, chart.show(valueAt(points, at))]));
  }

  /** Where times and values lie in a chart. */
  #frame(chart, series, right) {
    const [from, to] = this.span;
    const most = Math.max(0, ...series.flatMap(([, points]) => points.map((point) => point.value ?? 0)));
    const top = chart.top ?? niceTop(most, chart.binary);
    return {
      from, to, top, right,
      x: (time) => PLOT.left + ((time - from) / (to - from)) * (right - PLOT.left),
      y: (value) => HEIGHT - PLOT.bottom - (value / top) * (HEIGHT - PLOT.top - PLOT.bottom),
    };
  }

  #tell(chart, state, shown) {
    const when = this.#at === null ? "now" : `at ${clock(this.#at)}`;
    const text = `${when}: ${shown.map((each) => each.join(" ")).join(", ")}`;
    if (chart.text === text) return;
    chart.text = text;
    chart.values.replaceChildren(h("span", {}, when), ...shown.flatMap(([name, value]) => {
      const tag = nameTag(name, state.indexOf(name));
      tag.append(" ", h("b", {}, value));
      return [tag];
    }));
    chart.picture.setAttribute("aria-label", `${chart.title}. ${text}`);
  }
}

/** The value nearest to a time; null if the nearest point is not near. */
function valueAt(points, time) {
  let found = null;
  for (const point of points) {
    if (found === null || Math.abs(point.time - time) < Math.abs(found.time - time)) found = point;
  }
  return found && Math.abs(found.time - time) < GAP_SECONDS ? found.value : null;
}

function axes(chart, { top, from, to, x, y, right }) {
  const levels = [0, top / 2, top].flatMap((value) => [
    svg("line", { class: "level", x1: PLOT.left, x2: right, y1: y(value), y2: y(value) }),
    svg("text", { x: PLOT.left - 6, y: y(value) + 4, "text-anchor": "end" }, chart.show(value)),
  ]);
  const times = [from, (from + to) / 2, to].map((time, at) =>
    svg("text", { x: x(time), y: HEIGHT - 5, "text-anchor": ["start", "middle", "end"][at] }, clock(time)));
  return [...levels, ...times];
}

function line(index, path) {
  return svg("path", { class: `line ${colourClass(index)}`, d: path, "stroke-dasharray": isDashed(index) && "5 3" });
}

function vertical(x, className) {
  return svg("line", { class: className, x1: x, x2: x, y1: PLOT.top, y2: HEIGHT - PLOT.bottom });
}

function markLines(marks, { x, right }) {
  const labels = placeLabels(marks.map((mark) => ({ x: x(mark.time), text: mark.short })), right);
  return [
    ...marks.map((mark) => vertical(x(mark.time), `mark ${mark.kind}`)),
    ...labels.map((label) => svg("text", { x: label.x, y: 10 + label.row * 13 }, label.text)),
  ];
}

function drawEvents(state) {
  const newest = state.marks.slice(-EVENTS).reverse();
  setHidden(byId("events-empty"), newest.length > 0);
  const list = byId("events");
  const text = newest.map((mark) => mark.time + mark.text).join();
  if (list.dataset.state === text) return;
  list.dataset.state = text;
  list.replaceChildren(...newest.map((mark) =>
    h("li", { class: mark.kind }, h("time", {}, clock(mark.time)), " ", mark.text)));
}
