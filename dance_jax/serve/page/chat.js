/** A chat with the model on a server of choice. */

import { call } from "./api.js";
import { byId, h, setHidden, setText } from "./dom.js";
import { counted, number, seconds } from "./format.js";
import { eventsOf } from "./stream.js";

/** What a chunk of a stream adds: {content, thoughts, tokens} of a chat or of a completion. */
export function pieceOf(chunk) {
  const choice = chunk.choices?.[0] ?? {};
  return {
    content: choice.delta?.content ?? choice.text ?? "",
    thoughts: choice.delta?.reasoning_content ?? "",
    tokens: chunk.usage?.completion_tokens ?? null,
  };
}

/** "32 tokens, first after 120 ms, then 14.2 tokens/s"; times in seconds. */
export function paceInWords({ tokens, asked, first, last }) {
  if (first === null) return "no token yet";
  const pace = tokens > 1 && last > first ? `, then ${number((tokens - 1) / (last - first))} tokens/s` : "";
  return `${counted(tokens, "token")}, TTFT ${seconds(first - asked)}${pace}`;
}

const now = () => performance.now() / 1000;

export class Chat {
  #messages = [];
  #stop = null;
  /** The model has a chat template, or it is not known. */
  #canChat = true;

  constructor(state) {
    this.state = state;
    byId("chat-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    byId("chat-text").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      byId("chat-form").requestSubmit();
    });
    byId("chat-stop").addEventListener("click", () => this.#stop?.abort());
    byId("chat-clear").addEventListener("click", () => this.#clear());
  }

  /** Offer the servers that have told their addresses; the page's own needs none. */
  offerServers() {
    const { placement, views } = this.state;
    const others = [...views.values()].filter(({ name, url }) => url && name !== placement?.you);
    const options = [["", `${placement?.you ?? "this"} (this server)`], ...others.map(({ name, url }) => [url, name])];
    const select = byId("chat-server");
    if (select.dataset.state === JSON.stringify(options)) return;
    select.dataset.state = JSON.stringify(options);
    const chosen = select.value;
    select.replaceChildren(...options.map(([value, label]) => h("option", { value }, label)));
    select.value = options.some(([url]) => url === chosen) ? chosen : "";
  }

  async #send() {
    const text = byId("chat-text").value.trim();
    if (!text || this.#stop) return;
    byId("chat-text").value = "";
    this.#messages.push({ role: "user", content: text });
    addMessage("You", h("p", {}, text));
    const answer = new Answer(byId("chat-server").selectedOptions[0]?.textContent ?? "Model");
    this.#stop = new AbortController();
    setButtons(true);
    setText(byId("chat-said"), "");
    try {
      await this.#stream(answer);
      answer.end("");
    } catch (error) {
      const stopped = this.#stop.signal.aborted;
      answer.end(stopped ? "stopped" : "failed");
      if (!stopped) setText(byId("chat-said"), error.message);
    }
    this.#stop = null;
    // Without an answer the question is as if never asked: templates want both in turns.
    if (answer.content) this.#messages.push({ role: "assistant", content: answer.content });
    else this.#messages.pop();
    setButtons(false);
  }

  async #stream(answer) {
    const { signal } = this.#stop;
    const server = byId("chat-server").value || undefined;
    const how = {
      max_tokens: Number(byId("chat-tokens").value),
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    };
    for await (const { data } of eventsOf(await this.#ask(how, { signal, server }))) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      answer.add(pieceOf(chunk));
    }
  }

  async #ask(how, where) {
    if (this.#canChat) {
      try {
        return await call("v1/chat/completions", { body: { messages: this.#messages, ...how }, ...where });
      } catch (error) {
        if (error.status !== 400 || !error.message.includes("no chat template")) throw error;
        this.#canChat = false;
      }
    }
    setText(byId("chat-said"), "This model has no chat template, so it continues your text.");
    return call("v1/completions", { body: { prompt: this.#messages.at(-1).content, ...how }, ...where });
  }

  #clear() {
    this.#stop?.abort();
    this.#messages = [];
    byId("chat-log").replaceChildren(byId("chat-empty"));
    setHidden(byId("chat-empty"), false);
    setText(byId("chat-said"), "");
  }
}

/** An answer that grows on the page. */
class Answer {
  content = "";
  #times = { tokens: 0, asked: now(), first: null, last: null };

  constructor(server) {
    this.thoughts = h("p", { class: "thoughts", hidden: true }, h("span", { class: "unseen" }, "Reasoning: "));
    this.text = h("p");
    this.pace = h("p", { class: "note" }, "waiting for the first token …");
    this.root = addMessage(server, this.thoughts, this.text, this.pace);
    // Screen readers read the answer when it is complete, not token by token.
    this.root.setAttribute("aria-busy", "true");
  }

  add({ content, thoughts, tokens }) {
    if (content || thoughts) {
      this.#times.last = now();
      this.#times.first ??= this.#times.last;
    }
    this.content += content;
    if (thoughts) setHidden(this.thoughts, false);
    this.thoughts.append(thoughts);
    this.text.append(content);
    this.#times.tokens = tokens ?? this.#times.tokens + (content || thoughts ? 1 : 0);
    setText(this.pace, paceInWords(this.#times));
    scrollDown();
  }

  end(how) {
    setText(this.pace, [paceInWords(this.#times), how].filter(Boolean).join("; "));
    this.root.setAttribute("aria-busy", "false");
  }
}

function addMessage(who, ...parts) {
  setHidden(byId("chat-empty"), true);
  const message = h("div", { class: who === "You" ? "said mine" : "said" }, h("h3", {}, who), ...parts);
  byId("chat-log").append(message);
  scrollDown();
  return message;
}

function scrollDown() {
  byId("chat-log").scrollTop = byId("chat-log").scrollHeight;
}

function setButtons(running) {
  byId("chat-send").disabled = running;
  byId("chat-stop").disabled = !running;
}
