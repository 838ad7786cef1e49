// The images that are selected, by id; the address holds them, and they outlive the answer they were found in.

import { announce, byId } from "./dom.js";
import { MOST_SELECTED } from "./state.js";

const many = (count) => count.toLocaleString("en");

/** Events: `change` carries the ids that are to be selected; `clear`; `full`: there were more than an address holds. */
export class Selection extends EventTarget {
  #ids = new Set();
  #anchor = 0; // the rank that a range begins with

  constructor() {
    super();
    byId("select-none").addEventListener("click", () => this.clear());
  }

  get size() {
    return this.#ids.size;
  }

  get ids() {
    return [...this.#ids];
  }

  has(imageId) {
    return this.#ids.has(imageId);
  }

  toggle(imageId, rank = null) {
    this.#anchor = rank ?? this.#anchor;
    if (this.has(imageId)) this.#propose(this.ids.filter((id) => id !== imageId));
    else this.#propose([...this.#ids, imageId]);
  }

  /** Select all hits that pass, from the one that was chosen last to this one. */
  range(hits, rank, passes) {
    const [first, last] = [Math.min(this.#anchor, rank), Math.max(this.#anchor, rank)];
    this.all(hits.slice(first, last + 1).filter(passes));
  }

  all(hits) {
    this.#propose([...new Set([...this.#ids, ...hits.map((hit) => hit.image_id)])]);
  }

  clear() {
    if (this.size) this.dispatchEvent(new Event("clear"));
  }

  /** Another answer: its ranks are others. */
  forgetRanks() {
    this.#anchor = 0;
  }

  #propose(ids) {
    this.dispatchEvent(new CustomEvent("change", { detail: ids.slice(0, MOST_SELECTED) }));
    if (ids.length > MOST_SELECTED) this.dispatchEvent(new Event("full"));
  }

  /** Take what the address holds. */
  take(ids) {
    if (ids.join() === this.ids.join()) return;
    this.#ids = new Set(ids);
    document.body.classList.toggle("selecting", this.size > 0);
    byId("selected-count").textContent = `${many(this.size)} selected`;
    announce(`${many(this.size)} selected`);
  }

  /** Show the bar with their number, and how many of them the answer has not shown so far; none is asked: null. */
  describe(hits) {
    const shown = new Set((hits ?? []).map((hit) => hit.image_id));
    const others = this.ids.filter((id) => !shown.has(id)).length;
    byId("selection").hidden = !this.size;
    byId("selected-elsewhere").textContent = hits && others ? `${many(others)} not among these` : "";
    byId("export-selected").disabled = !hits;
  }
}
