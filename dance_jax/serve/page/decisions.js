/** Decisions to move experts, and the buttons that ask for one or drain a server. */

import { callJson } from "./api.js";
import { byId, fillRows, h, setHidden, setText } from "./dom.js";
import { clock, counted, seconds, share } from "./format.js";
import { decisionInWords } from "./state.js";

/** The seconds that a decision compares: [label, class, seconds] for each of both bars. */
export function costsOf({ present_seconds: present, expected_seconds: expected, migration_seconds: loading }) {
  return {
    present: [["expert calls and transfers", "calls", present]],
    moved: [["expert calls and transfers", "calls", expected], ["loading", "loading", loading]],
  };
}

export class Decisions {
  #shown = null;
  #busy = false;

  constructor(state, onChange) {
    this.state = state;
    this.onChange = onChange;
    byId("decide-dry").addEventListener("click", () => this.#decide({ force: forced(), dry_run: true }));
    byId("decide").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#decide({ force: forced(), dry_run: false });
    });
  }

  draw(state, live) {
    for (const id of ["decide-dry", "decide-now"]) byId(id).disabled = !live || this.#busy;
    const last = state.decisions.at(-1);
    setHidden(byId("decisions-empty"), Boolean(last));
    if (!last || last === this.#shown) return;
    this.#shown = last;
    byId("decision-last").replaceChildren(...lastDecision(last));
    const before = state.decisions.slice(0, -1).reverse();
    setHidden(byId("decisions-before"), !before.length);
    fillRows(byId("decisions-rows"), before.map(row));
  }

  async #decide(body) {
    if (this.#busy) return;
    this.#busy = true;
    this.onChange();
    setText(byId("decide-said"), "Deciding …");
    try {
      const decision = await callJson("placement/rebalance", { body });
      this.state.takeDecision(decision);
      setText(byId("decide-said"), `Decided: ${decisionInWords(decision)}`);
    } catch (error) {
      setText(byId("decide-said"), `Not decided: ${error.message}`);
    }
    this.#busy = false;
    this.onChange();
  }
}

const forced = () => byId("decide-force").checked;

function lastDecision(decision) {
  const { present, moved } = costsOf(decision);
  const most = Math.max(sum(present), sum(moved));
  const how = [clock(decision.when), `policy ${decision.policy}`];
  if (decision.forced) how.push("forced");
  if (decision.dry_run) how.push("dry run");
  const words = decisionInWords(decision);
  const bars = [...costBar("Present placement", present, most), ...costBar("New placement", moved, most)];
  return [
    h("p", {}, h("b", {}, words[0].toUpperCase() + words.slice(1)), " ",
      h("span", { class: "muted" }, `(${how.join(", ")})`)),
    h("div", { class: "costs" }, ...bars),
    h("p", {}, gainInWords(decision)),
  ];
}

function gainInWords({ gain, present_seconds: present, experts_moved: experts, migrate, dry_run: dry }) {
  if (present === null || gain === null) return "There is no data yet to predict costs from.";
  const [saves, costs] = migrate && !dry ? ["saves", "costs"] : ["would save", "would cost"];
  const change = gain < 0 ? `${costs} ${share(-gain)} more than` : `${saves} ${share(gain)} of`;
  const load = experts ? ` ${counted(experts, "expert")} to load.` : "";
  return `The new placement ${change} the present seconds until the next decision.${load}`;
}

const sum = (parts) => parts.reduce((all, part) => all + (part[2] ?? 0), 0);

function costBar(label, parts, most) {
  const bar = h("span", { class: "cost-bar", "aria-hidden": "true" });
  for (const [, kind, value] of parts) {
    const part = bar.appendChild(h("i", { class: kind }));
    part.style.width = `${most ? ((value ?? 0) / most) * 100 : 0}%`;
  }
  const words = parts.map(([what, , value]) => `${seconds(value)} ${what}`).join(" + ");
  return [h("span", {}, label), bar, h("span", {}, words)];
}

function row(decision) {
  return [
    clock(decision.when),
    decision.migrate ? `${decision.experts_moved} ${decision.dry_run ? "would move" : "move"}` : "stay",
    seconds(decision.present_seconds), seconds(decision.expected_seconds), seconds(decision.migration_seconds),
    share(decision.gain), decision.reason,
  ];
}

/** Ask for a confirmation, then drain a server. Returns what to tell the user, or null if they kept it. */
export async function drain(name) {
  const dialog = byId("drain-dialog");
  setText(byId("drain-title"), `Drain ${name}?`);
  setText(byId("drain-text"), `${name} finishes its requests, takes no new ones, and leaves. ` +
    "Others load the experts that only it holds.");
  dialog.returnValue = "no";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  if (dialog.returnValue !== "drain") return null;
  try {
    return (await callJson(`servers/${encodeURIComponent(name)}/drain`, { body: {} })).text;
  } catch (error) {
    return `${name} is not drained: ${error.message}`;
  }
}
