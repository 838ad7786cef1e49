// The answer so far: pages that came in, best first, and the lowest score that is shown.

import { ApiError, search } from "./api.js";

const AHEAD = 200; // hits of each page after the first: enough for a histogram
const MOST = 10_000; // hits of one question, its pages together: `retrieval.MAX_HITS`
const MOST_FOLDED = 1_000; // likewise, where near-duplicates are folded

/** Events: `started`, `answered` (its first page), `grew`, `moved` (the threshold), `failed`, `outdated`, `reset`. */
export class Results extends EventTarget {
  #abort = new AbortController();
  #body = null;
  #next = null;
  #coming = null;
  #newest = []; // the hits of the page that came in last

  constructor() {
    super();
    this.#clear();
  }

  #clear() {
    this.hits = [];
    this.#newest = [];
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

  /** Hits that the question has at most. */
  get most() {
    return this.#body.fold_at ? MOST_FOLDED : MOST;
  }

  /** Whether a hit's score is high enough. */
  passes = (hit) => this.min === null || hit.score >= this.min;

  /** The hits whose scores are high enough; a page may begin with hits that were overlooked before, so scores may rise. */
  get shown() {
    return this.min === null ? this.hits : this.hits.filter(this.passes);
  }

  /** Whether no page follows, or the last one had nothing to show. */
  get isDone() {
    return this.#next === null || this.hits.length >= this.most || !this.#newest.some(this.passes);
  }

  /** Nothing is asked any more. */
  reset() {
    this.#abort.abort();
    this.#clear();
    this.#body = null;
    this.#tell("reset");
  }

  /**
   * Ask; an earlier question that is still under way is dropped.
   *
   * @param {() => Promise<object>} makeBody may read the picture that is asked with
   */
  async ask(makeBody, { min = null } = {}) {
    this.#abort.abort();
    this.#abort = new AbortController();
    const { signal } = this.#abort;
    this.#clear();
    this.min = min;
    this.#tell("started");
    try {
      const body = await makeBody();
      if (signal.aborted) return; // another question has its body there
      this.#body = body;
      const answer = await search(body, signal);
      if (signal.aborted) return;
      this.#take(answer);
      this.answer = answer;
      this.names = answer.names;
      this.#tell("answered");
    } catch (error) {
      if (!signal.aborted) this.#fail(error, "failed");
    }
  }

  /** The next page; the one that is coming if there is one. */
  more() {
    if (this.isDone) return Promise.resolve();
    this.#coming ??= this.#fetchMore().finally(() => (this.#coming = null));
    return this.#coming;
  }

  /** More scores, where those of the first page alone came in. */
  deepen() {
    return this.hits.length < AHEAD ? this.more() : Promise.resolve();
  }

  async #fetchMore() {
    const { signal } = this.#abort;
    try {
      const k = Math.min(AHEAD, this.most - this.hits.length);
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
    this.#newest = answer.hits;
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
