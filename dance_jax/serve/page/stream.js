/** Server-sent events over fetch (EventSource cannot send a key), with reconnection. */

import { call } from "./api.js";

/** The server sends something every second; after this silence the connection counts as dead. */
const SILENCE_MS = 15_000;
const LONGEST_PAUSE_MS = 10_000;

/** Splits text as it arrives into events {name, data}. */
export class EventParser {
  #rest = "";

  /** @returns {{name: string, data: string}[]} the events that are complete now */
  push(text) {
    const blocks = (this.#rest + text.replaceAll("\r", "")).split("\n\n");
    this.#rest = blocks.pop();
    return blocks.map(parsed).filter((event) => event.data !== "");
  }
}

function parsed(block) {
  const event = { name: "message", data: "" };
  for (const line of block.split("\n")) {
    const [, field, value] = /^([^:]*):? ?(.*)$/s.exec(line);
    if (field === "event") event.name = value;
    if (field === "data") event.data += (event.data && "\n") + value;
  }
  return event;
}

/** Read an answer's events one after the other. `onBytes` is called for whatever arrives. */
export async function* eventsOf(answer, onBytes = () => {}) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  const parser = new EventParser();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    onBytes();
    yield* parser.push(value);
  }
}

/**
 * Follow a stream of events for as long as the page is open.
 *
 * @param {string} path - of the stream
 * @param {(name: string, data: object) => void} onEvent
 * @param {(state: {name: "connecting"|"live"|"reconnecting"|"key", since?: number, why?: string}) => void} onState
 * @returns {() => void} connects again now, e.g. with another key
 */
export function follow(path, onEvent, onState) {
  const wait = new Pause();
  let current = new AbortController();
  const again = () => {
    current.abort();
    wait.end();
  };
  const run = async () => {
    let pause = 0;
    let since = 0;
    onState({ name: "connecting" });
    for (;;) {
      current = new AbortController();
      const failure = await readOnce(path, current, onEvent, () => {
        pause = 0;
        since = 0;
        onState({ name: "live" });
      });
      since ||= Date.now() / 1000;
      const needsKey = failure.status === 401;
      onState(needsKey ? { name: "key", why: failure.message } : { name: "reconnecting", since, why: failure.message });
      pause = Math.min(LONGEST_PAUSE_MS, pause * 2 || 1000);
      await wait.begin(needsKey ? null : pause);
    }
  };
  addEventListener("online", again);
  run();
  return again;
}

/** Connect once and read to the end. Returns the reason of the end. */
async function readOnce(path, control, onEvent, onLive) {
  let timer = 0;
  const heard = () => {
    clearTimeout(timer);
    timer = setTimeout(() => control.abort(), SILENCE_MS);
  };
  try {
    heard();
    const answer = await call(path, { signal: control.signal });
    onLive();
    for await (const { name, data } of eventsOf(answer, heard)) onEvent(name, JSON.parse(data));
    return { status: 0, message: "The server ended the stream." };
  } catch (error) {
    if (error instanceof SyntaxError) console.warn("unreadable event", error);
    const silent = control.signal.aborted;
    return { status: error.status ?? 0, message: silent ? "The server was silent." : error.message };
  } finally {
    clearTimeout(timer);
    control.abort();
  }
}

/** A wait that can be cut short. */
class Pause {
  #resolve = () => {};

  /** @param {number|null} milliseconds - null: until end() */
  begin(milliseconds) {
    return new Promise((resolve) => {
      this.#resolve = resolve;
      if (milliseconds !== null) setTimeout(resolve, milliseconds);
    });
  }

  end() {
    this.#resolve();
  }
}
