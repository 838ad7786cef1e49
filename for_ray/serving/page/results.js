// The answer so far: pages that came in, best first, and the lowest score that is shown.

import { ApiError, search } from "./api.js";

const AHEAD = 200; // hits of the second page: enough for a histogram, before anyone scrolls

/** Events: `started`, `answered` (its first page), `grew`, `moved` (the threshold), `failed`, `outdated`. */
export class Results extends EventTarget {
  #abort = new AbortController();
  #body = null;
  #next = null;
  #coming = null;

  constructor() {
    super();
    this.#clear();
  }

  #clear() {
    this.hits = [];
    this.names = [];
    this.answer = null;
    this.min = null;
    this.#next = null;
    this.#coming = null;
  }

  /** The question that was asked, without its page; null before the first. */
  get question() {
    return this.#body;
  }

  /** The hits whose scores are high enough: the first ones, as scores never rise. */
  get shown() {
    if (this.min === null) return this.hits;
    const end = this.hits.findIndex((hit) => hit.score < this.min);
    return end < 0 ? this.hits : this.hits.slice(0, end);
  }

  /** Whether nothing more would be shown, however far one scrolls. */
  get isDone() {
    return this.#next === null || this.shown.length < this.hits.length;
  }

  /** Nothing is asked any more. */
  reset() {
    this.#abort.abort();
    this.#clear();
    this.#body = null;
  }

  /**
   * Ask; an earlier question that is still under way is dropped.
   *
   * @param {() => Promise<object>} makeBody may fetch the picture that is asked with
   */
  async ask(makeBody, { min = null } = {}) {
    this.#abort.abort();
    this.#abort = new AbortController();
    const { signal } = this.#abort;
    this.#clear();
    this.min = min;
    this.#tell("started");
    try {
      this.#body = await makeBody(signal);
      const answer = await search(this.#body, signal);
      if (signal.aborted) return;
      this.#take(answer);
      this.answer = answer;
      this.names = answer.names;
      this.#tell("answered");
    } catch (error) {
      if (!signal.aborted) this.#fail(error, "failed");
      return;
    }
    await this.more(AHEAD);
  }

  /** The next page; the one that is coming if there is one. */
  more(k = AHEAD) {
    if (this.isDone) return Promise.resolve();
    this.#coming ??= this.#fetchMore(k).finally(() => (this.#coming = null));
    return this.#coming;
  }

  async #fetchMore(k) {
    const { signal } = this.#abort;
    try {
      const answer = await search({ ...this.#body, k, page: this.#next }, signal);
      if (signal.aborted) return;
      this.#take(answer);
      this.#tell("grew");
    } catch (error) {
      if (signal.aborted) return;
      this.#next = error.code === "snapshot_changed" ? null : this.#next;
      this.#fail(error, error.code === "snapshot_changed" ? "outdated" : "stopped");
    }
  }

  #take(answer) {
    this.hits.push(...answer.hits);
    this.#next = answer.next_page;
    this.reason = answer.reason;
  }

  /** Show hits from this score on; null shows all. */
  moveThreshold(min) {
    this.min = min;
    this.#tell("moved");
  }

  #fail(error, event) {
    const known = error instanceof ApiError ? error : new ApiError(`The page failed: ${error.message}`);
    this.dispatchEvent(new CustomEvent(event, { detail: known }));
  }

  #tell(event) {
    this.dispatchEvent(new Event(event));
  }
}
