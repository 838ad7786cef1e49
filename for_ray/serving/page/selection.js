// The images that are selected, by id; they stay selected while an answer grows.

import { announce, byId } from "./dom.js";

/** `change` events follow each change. */
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
    if (!this.#ids.delete(imageId)) this.#ids.add(imageId);
    this.#anchor = rank ?? this.#anchor;
    this.#changed();
  }

  /** Select all hits that pass, from the one that was chosen last to this one. */
  range(hits, rank, passes) {
    const [first, last] = [Math.min(this.#anchor, rank), Math.max(this.#anchor, rank)];
    for (const hit of hits.slice(first, last + 1).filter(passes)) this.#ids.add(hit.image_id);
    this.#changed();
  }

  all(hits) {
    for (const hit of hits) this.#ids.add(hit.image_id);
    this.#changed();
  }

  clear() {
    this.#anchor = 0;
    if (!this.#ids.size) return;
    this.#ids.clear();
    this.#changed();
  }

  #changed() {
    const said = `${this.size.toLocaleString("en")} selected`;
    byId("selection").hidden = !this.size;
    byId("selected-count").textContent = said;
    document.body.classList.toggle("selecting", this.size > 0);
    announce(said);
    this.dispatchEvent(new Event("change"));
  }
}
