// Which images may be found: the panel, and the chips of what applies.

import { byId, el, icon } from "./dom.js";
import { FILTERS } from "./state.js";

export const FOLD_AT = 0.935; // `retrieval.FOLD_AT`: copies are above it, other images are not

/** The filters of a state as parts of a question's body. */
export function filtersBody(state) {
  const texts = ["under", "glob", "where"].filter((name) => state[name].trim());
  return {
    ...(texts.length ? { filters: Object.fromEntries(texts.map((name) => [name, state[name].trim()])) } : {}),
    ...(state.fold ? { fold_at: FOLD_AT } : {}),
    ...(state.unwanted === null ? {} : { unwanted_above: state.unwanted }),
  };
}

const SAID = {
  under: (value) => `begins with ${value}`,
  glob: (value) => `matches ${value}`,
  where: (value) => `where ${value}`,
  fold: () => "near-duplicates once",
  unwanted: (value) => `NOT from ${value}`,
};

const NONE = { under: "", glob: "", where: "", fold: false, unwanted: null };

/** Events: `change` carries what of the state is to change. */
export class Filters extends EventTarget {
  #form = byId("filters");
  #toggle = byId("filters-toggle");

  constructor() {
    super();
    this.#toggle.addEventListener("click", () => this.open(this.#form.hidden));
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#tell(this.#written());
    });
    this.#form.addEventListener("reset", (event) => {
      event.preventDefault();
      this.#tell({ ...NONE, k: 60 });
    });
    this.#form.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      this.open(false);
      this.#toggle.focus();
    });
  }

  /** The columns that `where` may name. */
  set columns(columns) {
    const insert = (name) => {
      const input = this.#form.elements.where;
      input.setRangeText(name, input.selectionStart, input.selectionEnd, "end");
      input.focus();
    };
    byId("columns").replaceChildren(...columns.map((name) => el("button", { type: "button", class: "chip small", on: { click: () => insert(name) } }, name)));
  }

  open(isOpen) {
    this.#form.hidden = !isOpen;
    this.#toggle.setAttribute("aria-expanded", String(isOpen));
    if (isOpen) this.#form.elements.under.focus();
  }

  get isOpen() {
    return !this.#form.hidden;
  }

  /** Fill the panel, and the chips above the results, from a state. */
  show(state) {
    const fields = this.#form.elements;
    for (const name of ["under", "glob", "where"]) fields[name].value = state[name];
    fields.fold.checked = state.fold;
    fields.unwanted.value = state.unwanted ?? "";
    this.#showCount(String(state.k));
    const active = FILTERS.filter((name) => state[name] !== NONE[name]);
    const count = byId("filters-count");
    count.hidden = !active.length;
    count.textContent = String(active.length);
    byId("active-filters").replaceChildren(...active.map((name) => this.#chip(name, SAID[name](state[name]))));
  }

  #showCount(k) {
    const select = this.#form.elements.k;
    if (![...select.options].some((option) => option.value === k)) select.append(el("option", {}, k));
    select.value = k;
  }

  #chip(name, said) {
    const remove = () => {
      this.#tell({ [name]: NONE[name] });
      (byId("active-filters").querySelector("button") ?? this.#toggle).focus();
    };
    return el("li", {}, el("button", { type: "button", class: "chip", "aria-label": `Remove the filter: ${said}`, on: { click: remove } }, el("span", { class: "cut" }, said), icon("close")));
  }

  #written() {
    const fields = this.#form.elements;
    const unwanted = fields.unwanted.value === "" ? null : Number(fields.unwanted.value);
    const texts = Object.fromEntries(["under", "glob", "where"].map((name) => [name, fields[name].value.trim()]));
    return { ...texts, fold: fields.fold.checked, unwanted, k: Number(fields.k.value) };
  }

  #tell(changes) {
    this.dispatchEvent(new CustomEvent("change", { detail: changes }));
  }
}
