/** Calls to the server: its address, the key, and errors in words. */

import { keep, kept } from "./kept.js";

// This file is .../dashboard/api.js, also behind a proxy's prefix: the API is one folder up.
const BASE = new URL("..", import.meta.url);
const KEPT = ["sessionStorage", "dance_jax.key"];

let key = kept(...KEPT);

export const hasKey = () => key !== "";

/** Use a key from now on; "" forgets it. */
export function setKey(value) {
  key = value;
  keep(...KEPT, value);
}

/** A call that failed; `status` is 0 if the server was not reached. */
export class Failure extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/**
 * Call the server, or another one of the service.
 *
 * @param {string} path - below the API's root, e.g. "placement/rebalance"
 * @param {{body?: object, signal?: AbortSignal, server?: string}} options - a body makes it a POST;
 *   `server` is the URL of another server
 * @returns {Promise<Response>} an answer with a status of 200 to 299
 * @throws {Failure} otherwise, or an AbortError after `signal`
 */
export async function call(path, { body, signal, server } = {}) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const how = { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body), cache: "no-store" };
  let answer;
  try {
    answer = await fetch(address(path, server), how);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Failure(0, unreachable(server));
  }
  if (answer.ok) return answer;
  throw new Failure(answer.status, await reason(answer));
}

export async function callJson(path, options) {
  return (await call(path, options)).json();
}

function address(path, server) {
  return new URL(path, server ? `${server.replace(/\/+$/, "")}/` : BASE);
}

function unreachable(server) {
  if (!server) return "The server cannot be reached. Is it running, and is the network up?";
  return `This page cannot call ${server}. If the server runs, start the service with ` +
    `--allowed-origins ${location.origin}, or open the server's own dashboard.`;
}

async function reason(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `The server answered with HTTP status ${answer.status}.`;
  }
}
