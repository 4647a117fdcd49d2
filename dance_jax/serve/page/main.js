/** Puts the page together: events change the state, and what is on the screen is drawn again. */

import { hasKey, setKey } from "./api.js";
import { Chat } from "./chat.js";
import { Decisions, drain } from "./decisions.js";
import { byId, setHidden, setText, startTips } from "./dom.js";
import { clock } from "./format.js";
import { Holders } from "./holders.js";
import { TimeLines } from "./lines.js";
import { drawLinks } from "./links.js";
import { ServerCards } from "./servers.js";
import { State } from "./state.js";
import { follow } from "./stream.js";
import { startTheme } from "./theme.js";
import { Waterfall } from "./waterfall.js";

const state = new State();
const visible = new Set();
let connection = { name: "connecting" };
let scheduled = false;
/** The next drawing includes sections off the screen. */
let everything = false;

/** Draw once before the next frame. A hidden tab has no frames: it only records, so that the lines have no gap. */
function redraw() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    for (const id of Object.keys(sections)) if (everything || visible.has(id)) sections[id]();
    everything = false;
  });
}

const cards = new ServerCards(askToDrain);
const holders = new Holders(redraw);
const timeLines = new TimeLines(redraw);
const decisions = new Decisions(state, redraw);
const waterfall = new Waterfall(state, redraw);
const chat = new Chat(state);
const isLive = () => connection.name === "live";
const sections = {
  servers: () => cards.draw(state, isLive() && hasKey()),
  experts: () => holders.draw(state),
  lines: () => timeLines.draw(state),
  links: () => drawLinks(state),
  decisions: () => decisions.draw(state, isLive()),
  token: () => waterfall.draw(state, isLive()),
  chat: () => chat.offerServers(),
};

async function askToDrain(name) {
  const said = await drain(name);
  if (said !== null) setText(byId("servers-said"), said);
}

function onEvent(name, data) {
  const known = state.history.size;
  state.take(name, data);
  // What changes heights is drawn everywhere at once, so that nothing shifts while the user scrolls.
  if (name !== "views" || state.history.size > known) everything = true;
  if (name === "placement") setText(byId("about"), `model ${data.model}, seen from ${data.you}`);
  redraw();
}

function onState(next) {
  connection = next;
  const node = byId("state");
  everything = true; // Buttons off the screen too: Tab would pass over those that are disabled.
  node.dataset.state = next.name;
  const words = {
    connecting: "connecting …",
    live: "live",
    key: "API key needed",
    reconnecting: `reconnecting since ${clock(next.since)}`,
  };
  setText(node, words[next.name]);
  setText(byId("state-why"), next.name === "reconnecting" ? next.why : "");
  if (next.name === "key") {
    showKeyForm(hasKey() ? "The server does not accept this key." : "This service asks for a key.");
  }
  if (next.name === "live") setText(byId("key-note"), KEPT_HERE);
  redraw();
}

const KEPT_HERE = "The key stays in this browser tab only.";

function showKeyForm(why) {
  setText(byId("key-note"), why);
  if (!byId("key-form").hidden) return;
  openKeyForm(true);
}

function openKeyForm(open) {
  setHidden(byId("key-form"), !open);
  byId("key-button").setAttribute("aria-expanded", open);
  if (open) byId("key").focus();
}

function startKeyForm(reconnect) {
  const use = (key) => {
    setKey(key);
    byId("key").value = "";
    openKeyForm(false);
    reconnect();
  };
  byId("key-button").addEventListener("click", () => openKeyForm(byId("key-form").hidden));
  byId("key-forget").addEventListener("click", () => use(""));
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    use(byId("key").value.trim());
  });
}

/** Draw only the sections on the screen. */
function watchSections() {
  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) visible[isIntersecting ? "add" : "delete"](target.id);
    redraw();
  }, { rootMargin: "200px" });
  for (const id of Object.keys(sections)) observer.observe(byId(id));
  new ResizeObserver(redraw).observe(byId("main"));
}

startTheme(redraw);
startTips();
watchSections();
startKeyForm(follow("events", onEvent, onState));
