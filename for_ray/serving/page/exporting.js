// Export: what, in which format; the file is downloaded.

import { exportHits } from "./api.js";
import { byId, el, sentence } from "./dom.js";

function download({ blob, name }) {
  const url = URL.createObjectURL(blob);
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** Events: `exported` carries the file's name; `outdated`: the answer's snapshot is not there any more. */
export class Exporting extends EventTarget {
  #dialog = byId("export");
  #form = this.#dialog.querySelector("form");
  #results;
  #selection;

  constructor(results, selection) {
    super();
    [this.#results, this.#selection] = [results, selection];
    for (const event of ["started", "reset"]) results.addEventListener(event, () => this.#dialog.close()); // with the answer
    this.#form.addEventListener("submit", (event) => this.#submit(event));
    this.#dialog.querySelector("[data-do=close]").addEventListener("click", () => this.#dialog.close());
    this.#form.elements.count.addEventListener("focus", () => (this.#form.elements.what.value = "best"));
    byId("export-open").addEventListener("click", () => this.open());
    byId("export-selected").addEventListener("click", () => this.open());
  }

  open() {
    if (!this.#results.answer || this.#dialog.open) return;
    const { size } = this.#selection;
    const [selected] = this.#form.elements.what;
    selected.disabled = !size;
    this.#form.elements.what.value = size ? "selected" : "best";
    this.#form.elements.count.max = String(this.#results.most);
    byId("export-selected-label").textContent = this.#saidOf(size);
    const { min } = this.#results;
    byId("export-threshold").textContent = min === null ? "" : `, score ${min.toFixed(3)} or more`;
    this.#say("");
    this.#dialog.showModal();
  }

  #saidOf(size) {
    if (!size) return "The selected ones (none yet)";
    const shown = new Set(this.#results.hits.map((hit) => hit.image_id));
    const isElsewhere = this.#selection.ids.some((id) => !shown.has(id));
    const images = size === 1 ? "The selected image" : `The ${size.toLocaleString("en")} selected images`;
    return images + (isElsewhere ? ", without those that the filters or NOT leave out" : "");
  }

  /** The body of POST /export: the question, as deep as what is exported lies, to the snapshot that answered it. */
  #body() {
    const { what, count, format } = this.#form.elements;
    const question = { ...this.#results.question, snapshot_id: this.#results.answer.snapshot_id };
    if (what.value === "selected") {
      const ids = this.#selection.ids;
      return { format: format.value, question: { ...question, k: Math.max(this.#results.hits.length, 1) }, image_ids: ids };
    }
    const { min } = this.#results;
    const k = Math.min(Math.max(Number(count.value) || 1, 1), this.#results.most);
    return { format: format.value, question: { ...question, k, ...(min === null ? {} : { min_score: min }) }, image_ids: null };
  }

  async #submit(event) {
    event.preventDefault();
    const button = this.#form.querySelector("[type=submit]");
    button.disabled = true;
    this.#say("");
    try {
      const file = await exportHits(this.#body());
      download(file);
      this.#dialog.close();
      this.dispatchEvent(new CustomEvent("exported", { detail: file.name }));
    } catch (error) {
      this.#fail(error);
    } finally {
      button.disabled = false;
    }
  }

  #fail(error) {
    if (error.code !== "snapshot_changed") return this.#say(sentence(error.message));
    this.#say("The index was updated since this answer: ask again, and export what is found then.");
    this.dispatchEvent(new Event("outdated"));
  }

  #say(problem) {
    this.#form.querySelector(".problem").textContent = problem;
  }
}
