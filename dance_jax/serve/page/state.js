/** What the page knows of the service: the newest events, rates, history and marks. Touches no DOM. */

import { Meter, countersOf, countsOf, heldOf, residentOf } from "./rates.js";
import { counted, listed, seconds } from "./format.js";

/** Seconds of history that the time lines can show. */
export const HISTORY_SECONDS = 900;
/** Seconds for which an expert counts as newly arrived. */
export const NEW_SECONDS = 60;
/** A view older than this many seconds: the server does not answer. */
const OLD_SECONDS = 6;
const MARKS = 200;
const DECISIONS = 50;
/** A dry run that is older when the page learns of it is not shown: the placement may have changed. */
const DRY_SECONDS = 30;

export class State {
  /** Names in the order they were first seen; the index chooses the colour, so it never changes. */
  names = [];
  placement = null;
  /** Name -> Uint8Array [layers x experts]. */
  resident = new Map();
  /** How many servers hold each expert, [layers x experts]. */
  holders = new Uint8Array(0);
  /** Where experts move to, or would by the last dry run: {dry, target: name -> Uint8Array}; null: nowhere. */
  plan = null;
  views = new Map();
  /** Whether a launcher answers; without one, only the page's own server shows itself. */
  launcher = true;
  /** Name -> [{time, local, anyMiss, itl, bytes}], oldest first. */
  history = new Map();
  /** [{time, kind, short, text}], oldest first; short is the label in the charts. */
  marks = [];
  /** Oldest first. */
  decisions = [];
  #meters = new Map();
  #arrivals = new Map();
  #faults = new Map();
  #serverTime = null;
  #localTime = 0;

  /** Seconds now, by the server's clock, which may differ from this machine's. */
  get now() {
    const local = Date.now() / 1000;
    return this.#serverTime === null ? local : this.#serverTime + (local - this.#localTime);
  }

  indexOf(name) {
    const found = this.names.indexOf(name);
    return found >= 0 ? found : this.names.push(name) - 1;
  }

  /** Take an event of the stream. */
  take(name, data) {
    if (name === "placement") this.#takePlacement(data);
    if (name === "decision") this.takeDecision(data);
    if (name === "views") this.#takeViews(data);
  }

  /** Also for decisions that answer a call; the stream repeats them. */
  takeDecision(decision) {
    if (!this.plan || this.plan.dry) this.plan = this.#dryPlan(decision);
    const { servers: _, ...kept } = decision; // which are large
    const known = this.decisions.findIndex((each) => each.when === decision.when);
    if (known < 0) {
      this.decisions.push(kept);
      this.decisions.splice(0, this.decisions.length - DECISIONS);
      this.#mark(decision.when, "decision", shortDecision(decision), `Decision: ${decisionInWords(decision)}`);
    } else if (kept.failure !== this.decisions[known].failure) {
      this.decisions[known] = kept;
      this.#mark(this.now, "migration", "stopped", `The migration stopped: ${kept.failure}`);
    }
  }

  /** The meter of a server that answers, else null: old rates would mislead. */
  meter(name) {
    const view = this.views.get(name);
    return view && isAnswering(view) ? this.#meters.get(name) ?? null : null;
  }

  /** Calls per second of each expert by each server's tokens, by index of the server. */
  expertRates() {
    return this.names.map((name) => this.meter(name)?.experts ?? null);
  }

  isNew(name, cell) {
    return this.now - (this.#arrivals.get(name)?.get(cell) ?? -Infinity) < NEW_SECONDS;
  }

  /** How many experts arrived on a server within NEW_SECONDS. */
  newOn(name) {
    return [...(this.#arrivals.get(name)?.keys() ?? [])].filter((cell) => this.isNew(name, cell)).length;
  }

  /** Whether an expert comes to a server, or leaves it, by the plan. */
  comes = (name, cell) => Boolean(this.plan?.target.get(name)?.[cell]) && !this.resident.get(name)[cell];
  leaves = (name, cell) => this.plan?.target.get(name)?.[cell] === 0 && Boolean(this.resident.get(name)[cell]);

  /** How many experts come to a server by the plan. */
  comingTo(name) {
    return this.resident.get(name).reduce((sum, _, cell) => sum + this.comes(name, cell), 0);
  }

  isLost(name) {
    return this.placement?.lost.includes(name) ?? false;
  }

  #takePlacement(placement) {
    const before = this.placement;
    this.placement = placement;
    const old = this.resident;
    this.resident = new Map();
    for (const { name, resident } of placement.servers) {
      this.indexOf(name);
      const held = residentOf(resident, placement.experts);
      if (placement.lost.includes(name)) held.fill(0);
      this.resident.set(name, held);
      // All experts of a server that comes back are new there: nothing to point out.
      const wasThere = old.get(name)?.length === held.length && !before.lost.includes(name);
      if (wasThere) this.#noteArrivals(name, old.get(name), held);
    }
    const all = [...this.resident.values()];
    this.holders = Uint8Array.from({ length: placement.layers * placement.experts }, (_, cell) =>
      all.reduce((sum, held) => sum + held[cell], 0));
    const wasMoving = this.plan && !this.plan.dry;
    this.plan = movingPlan(placement);
    if (before) this.#markPlacement(before, placement, wasMoving);
  }

  #dryPlan({ dry_run: dry, servers, when }) {
    const { experts } = this.placement ?? {};
    if (!dry || !servers?.length || !experts || this.now - when > DRY_SECONDS) return null;
    return { dry, target: new Map(servers.map(({ name, resident }) => [name, heldOf(resident, experts)])) };
  }

  #noteArrivals(name, old, held) {
    const arrivals = this.#arrivals.get(name) ?? new Map();
    this.#arrivals.set(name, arrivals);
    held.forEach((bit, cell) => {
      if (bit && !old[cell]) arrivals.set(cell, this.now);
      if (!bit) arrivals.delete(cell);
    });
  }

  #markPlacement(before, after, wasMoving) {
    const lostChanged = after.lost.join() !== before.lost.join();
    if (after.version > before.version && !lostChanged) {
      this.#mark(this.now, "migration", `v${after.version}`, `Experts have migrated: placement ${after.version}`);
    }
    if (this.plan && !wasMoving) {
      const coming = this.names.reduce((sum, name) => sum + (this.resident.has(name) ? this.comingTo(name) : 0), 0);
      this.#mark(this.now, "migration", "", `${counted(coming, "expert")} begin${coming === 1 ? "s" : ""} to migrate`);
    }
    const [was, is] = [before, after].map(({ servers }) => new Set(servers.map((each) => each.name)));
    for (const name of is) if (!was.has(name)) this.#mark(this.now, "return", `${name} joins`, `${name} joins`);
    for (const name of was) if (!is.has(name)) this.#mark(this.now, "loss", `${name} left`, `${name} has left`);
    for (const name of after.lost.filter((each) => was.has(each) && !before.lost.includes(each))) {
      this.#mark(this.now, "loss", `lost ${name}`, `${name} is lost`);
    }
    for (const name of before.lost.filter((each) => is.has(each) && !after.lost.includes(each))) {
      this.#mark(this.now, "return", `${name} serves`, `${name} serves`);
    }
  }

  #takeViews({ time, launcher, servers }) {
    this.#serverTime = time;
    this.launcher = launcher;
    this.#localTime = Date.now() / 1000;
    for (const view of servers) {
      this.indexOf(view.name);
      this.views.set(view.name, view);
      this.#takeView(view, time - view.age);
    }
    for (const gone of [...this.views.keys()].filter((name) => !servers.some((each) => each.name === name))) {
      this.views.delete(gone);
    }
  }

  #takeView(view, time) {
    if (view.fault && view.fault_time > (this.#faults.get(view.name) ?? 0)) {
      this.#faults.set(view.name, view.fault_time);
      this.#mark(view.fault_time, "fault", `fault ${view.name}`, `${view.name}: ${view.fault}`);
    }
    // A lost server's values are not its present ones: begin anew when it is back.
    if (!view.alive) return void this.#meters.delete(view.name);
    const meter = this.#meters.get(view.name) ?? new Meter();
    this.#meters.set(view.name, meter);
    // A server that does not answer is listed with the same view again.
    if (meter.time !== null && time < meter.time + 0.2) return;
    meter.add(time, countersOf(view), countsOf(view.counts));
    this.#remember(view, meter, time);
  }

  #remember(view, meter, time) {
    const points = this.history.get(view.name) ?? [];
    this.history.set(view.name, points);
    points.push({
      time,
      local: meter.ratio("calls_local", "calls_local", "calls_remote"),
      anyMiss: meter.ratio("rows_away", "rows"),
      // The server's quantiles are of its last tokens, which may be old.
      itl: meter.grown("generation_tokens") > 0 ? view.itl?.[0] ?? null : null,
      bytes: bytesOfLinks(meter, view.links),
    });
    while (points[0].time < time - HISTORY_SECONDS) points.shift();
  }

  #mark(time, kind, short, text) {
    this.marks.push({ time, kind, short, text });
    this.marks.sort((a, b) => a.time - b.time);
    this.marks.splice(0, this.marks.length - MARKS);
  }
}

/** The plan of a migration under way; null: nothing moves. */
function movingPlan({ servers, experts }) {
  if (!servers.some(({ target }) => target)) return null;
  return { dry: false, target: new Map(servers.map(({ name, target }) => [name, residentOf(target, experts)])) };
}

export const isAnswering = (view) => view.alive && view.age < OLD_SECONDS;

function bytesOfLinks(meter, links) {
  if (meter.perSecond("steps") === null) return null;
  const both = ({ peer }) => meter.perSecond(`${peer}/sent`) + meter.perSecond(`${peer}/received`);
  return links.reduce((sum, link) => sum + both(link), 0);
}

function shortDecision(decision) {
  if (!decision.migrate) return "stay";
  return decision.dry_run ? `dry run ${decision.experts_moved}` : `move ${decision.experts_moved}`;
}

/** One sentence on a decision: "7 experts move: it pays". */
export function decisionInWords(decision) {
  const what = counted(decision.experts_moved, "expert");
  const one = decision.experts_moved === 1;
  const moves = decision.dry_run ? `${what} would move` : `${what} move${one ? "s" : ""}`;
  const stopped = decision.failure ? `. The migration stopped: ${decision.failure}` : "";
  return `${decision.migrate ? moves : "all experts stay"}: ${decision.reason}${stopped}`;
}

/** "alive", "lost", "not known without a launcher", "no answer yet" or "no answer for 8 s". */
export function serverInWords(state, view) {
  if (state.isLost(view.name)) return "lost";
  if (isAnswering(view)) return "alive";
  if (!state.launcher) return "not known without a launcher";
  return view.alive ? `no answer for ${seconds(Math.round(view.age))}` : "no answer yet";
}

export function holdersInWords(state, cell) {
  return listed([...state.resident.keys()].filter((name) => state.resident.get(name)[cell])) || "no server";
}
