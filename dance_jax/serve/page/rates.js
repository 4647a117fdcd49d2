/** From the counters that servers report to rates. Nothing here touches the page. */

/** Seconds over which rates are means: short enough to follow, long enough to be calm. */
export const WINDOW_SECONDS = 5;
/** Seconds after which an old rate of an expert's calls counts half. */
const HALF_LIFE_SECONDS = 10;

/** The bytes of a base64 text. */
export function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}

/**
 * Which experts are resident.
 *
 * @param {string[]} layers - per layer the base64 of its bits, lowest bit first
 * @param {number} experts - experts per layer
 * @returns {Uint8Array} [layers x experts], 1 where resident
 */
export function residentOf(layers, experts) {
  const held = new Uint8Array(layers.length * experts);
  layers.forEach((base64, layer) => {
    const bits = bytesOf(base64);
    for (let expert = 0; expert < experts; expert += 1) {
      held[layer * experts + expert] = (bits[expert >> 3] >> (expert & 7)) & 1;
    }
  });
  return held;
}

/**
 * Which experts are resident, from their ids.
 *
 * @param {number[][]} layers - per layer the ids
 * @param {number} experts - experts per layer
 * @returns {Uint8Array} as residentOf
 */
export function heldOf(layers, experts) {
  const held = new Uint8Array(layers.length * experts);
  layers.forEach((ids, layer) => ids.forEach((id) => (held[layer * experts + id] = 1)));
  return held;
}

/** Counts from the base64 of little-endian uint32. */
export function countsOf(base64) {
  const bytes = bytesOf(base64);
  const view = new DataView(bytes.buffer);
  return Uint32Array.from({ length: bytes.length >> 2 }, (_, at) => view.getUint32(at * 4, true));
}

/** The counters of a view in one flat object; those of a link as "peer/name". */
export function countersOf(view) {
  const names = ["prompt_tokens", "generation_tokens", "steps", "layers", "layers_waited", "rows", "rows_away",
    "calls_local", "calls_remote"];
  const found = Object.fromEntries(names.map((name) => [name, view[name]]));
  for (const link of view.links) {
    for (const name of ["sent", "received", "calls", "repeats", "lost"]) found[`${link.peer}/${name}`] = link[name];
  }
  return found;
}

/** What a counter has grown by. One that fell has begun anew at 0; one seen first has not grown. */
export function growth(before, now) {
  if (before === undefined) return 0;
  return now >= before ? now - before : now;
}

/** a / b, or null if nothing was counted. */
export const ratio = (part, all) => (all > 0 ? part / all : null);

/** Makes rates from one server's counters. */
export class Meter {
  #last = {};
  #counts = null;
  #totals = {};
  #samples = [];
  /** Calls per second of each expert by this server's tokens, [layers x experts]. */
  experts = new Float32Array(0);

  /** Time of the newest sample in seconds; null if there is none. */
  get time() {
    return this.#samples.at(-1)?.time ?? null;
  }

  /**
   * Take a new reading.
   *
   * @param {number} time - when it was read, in seconds; must grow
   * @param {Object<string, number>} counters
   * @param {Uint32Array} counts - calls per expert
   */
  add(time, counters, counts) {
    const passed = time - (this.time ?? time);
    for (const [name, value] of Object.entries(counters)) {
      this.#totals[name] = (this.#totals[name] ?? 0) + growth(this.#last[name], value);
    }
    this.#last = counters;
    this.#samples.push({ time, totals: { ...this.#totals } });
    // One sample older than the window stays, so that the window is always full.
    while (this.#samples.length > 2 && this.#samples[1].time <= time - WINDOW_SECONDS) this.#samples.shift();
    if (passed > 0 && this.#counts?.length === counts.length) {
      this.experts = smoothed(this.experts, this.#counts, counts, passed);
    }
    this.#counts = counts;
  }

  /** What a counter has grown by within the window. */
  grown(name) {
    const [first, last] = [this.#samples[0], this.#samples.at(-1)];
    return last ? (last.totals[name] ?? 0) - (first.totals[name] ?? 0) : 0;
  }

  /** Growth per second; null before the second reading. */
  perSecond(name) {
    return this.#samples.length < 2 ? null : this.grown(name) / (this.time - this.#samples[0].time);
  }

  ratio(part, ...all) {
    return ratio(this.grown(part), all.reduce((sum, name) => sum + this.grown(name), 0));
  }
}

/** Rates of calls, smoothed exponentially; the first ones are taken as they are. */
export function smoothed(rates, before, now, passed) {
  const old = rates.length === now.length ? 2 ** (-passed / HALF_LIFE_SECONDS) : 0;
  return Float32Array.from(now, (count, at) => {
    const rate = growth(before[at], count) / passed;
    return old ? rates[at] * old + rate * (1 - old) : rate;
  });
}

/**
 * Who calls each expert most, and how often it is called.
 *
 * @param {(Float32Array|null)[]} byServer - calls per second per expert, by server
 * @param {number} cells - layers x experts
 * @returns {{rate: Float32Array, caller: Int16Array}} all calls per second; index of the server, -1: none calls it
 */
export function callersOf(byServer, cells) {
  const rate = new Float32Array(cells);
  const caller = new Int16Array(cells).fill(-1);
  const most = new Float32Array(cells);
  byServer.forEach((rates, server) => {
    if (rates?.length !== cells) return;
    for (let at = 0; at < cells; at += 1) {
      rate[at] += rates[at];
      if (rates[at] > most[at]) [most[at], caller[at]] = [rates[at], server];
    }
  });
  return { rate, caller };
}

/** The rate that 98 % of the called experts stay below: a scale that one hot expert does not spoil. */
export function scaleOf(rate) {
  const called = rate.filter((each) => each > 0).sort();
  return called.length ? called[Math.floor((called.length - 1) * 0.98)] : 0;
}
