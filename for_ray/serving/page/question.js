// The question box: examples and recent questions below it, and a caret under the spot that doesn't parse.

import { announce, byId, el, icon, kept, sentence } from "./dom.js";

const RECENT = "for_ray.recent";
const MOST_RECENT = 30;
const MOST_SHOWN = 9;

const recentOnes = () => kept.read(RECENT, []).filter((text) => typeof text === "string");

/** Events: `ask` carries the text; `clear`. */
export class QuestionBox extends EventTarget {
  #input = byId("question");
  #list = byId("suggestions");
  #examples = [];
  #chosen = -1;

  constructor() {
    super();
    byId("ask").addEventListener("submit", (event) => this.#submit(event));
    byId("clear").addEventListener("click", () => this.#clear());
    this.#input.addEventListener("input", () => this.#written());
    this.#input.addEventListener("click", () => this.#open());
    this.#input.addEventListener("keydown", (event) => this.#key(event));
    this.#input.addEventListener("blur", () => this.#close());
    this.#input.addEventListener("scroll", () => this.#alignCaret());
    this.#list.addEventListener("mousedown", (event) => event.preventDefault()); // the input keeps the focus
    this.#list.addEventListener("click", (event) => this.#pick(event.target.closest("[role=option]")));
  }

  set examples(examples) {
    this.#examples = examples;
  }

  get text() {
    return this.#input.value;
  }

  set text(text) {
    this.#input.value = text;
    this.showProblem(null);
    this.#showClear();
  }

  /** Show a small picture, or nothing, as what is asked with; the box is then clear of words. */
  showExample(...parts) {
    const example = byId("example");
    example.replaceChildren(...parts);
    example.hidden = !parts.length;
    this.#input.placeholder = parts.length ? "or ask with words" : "a dog AND a frisbee NOT a car";
    this.#showClear();
  }

  focus({ end = false } = {}) {
    this.#input.focus();
    if (end) this.#input.setSelectionRange(this.text.length, this.text.length);
    else this.#input.select();
  }

  /** Remember a question that had an answer. */
  remember(text) {
    const recent = recentOnes().filter((each) => each !== text);
    kept.write(RECENT, [text, ...recent].slice(0, MOST_RECENT));
  }

  /** What is wrong with the question, and at which letter (counted as Python does); null for nothing. */
  showProblem(error) {
    byId("question-error").textContent = error ? sentence(error.message) : "";
    this.#input.toggleAttribute("aria-invalid", Boolean(error));
    if (error) this.#input.setAttribute("aria-invalid", "true");
    const hasPlace = error !== null && error.position !== null;
    byId("caret").hidden = !hasPlace;
    if (!hasPlace) return;
    const before = [...this.text].slice(0, error.position).join("");
    byId("caret").querySelector(".before").textContent = before;
    this.#input.setSelectionRange(before.length, before.length);
    this.#alignCaret();
  }

  #alignCaret() {
    const caret = byId("caret");
    if (caret.hidden) return;
    const field = caret.parentElement.getBoundingClientRect();
    const input = this.#input.getBoundingClientRect();
    const width = caret.querySelector(".before").getBoundingClientRect().width;
    const right = Math.min(Math.max(width - this.#input.scrollLeft, 0), input.width - 4);
    caret.querySelector(".mark").style.left = `${input.left - field.left + right}px`;
  }

  #showClear() {
    byId("clear").hidden = !this.text && byId("example").hidden;
  }

  #submit(event) {
    event.preventDefault();
    this.#close();
    this.#input.value = this.text.trim(); // as it is asked: the service counts its letters
    this.dispatchEvent(new CustomEvent("ask", { detail: this.text }));
  }

  #clear() {
    this.text = "";
    this.dispatchEvent(new Event("clear"));
    this.#input.focus();
  }

  #written() {
    this.showProblem(null);
    this.#showClear();
    this.#open();
  }

  #open() {
    const begun = this.text.trim().toLowerCase();
    const fits = (text) => text.toLowerCase().includes(begun) && text !== this.text.trim();
    const recent = recentOnes().filter(fits).slice(0, MOST_SHOWN - 3);
    const examples = this.#examples.filter((text) => fits(text) && !recent.includes(text)).slice(0, MOST_SHOWN - recent.length);
    const options = [...recent.map((text) => ["recent", text]), ...examples.map((text) => ["search", text])];
    this.#chosen = -1;
    this.#list.replaceChildren(...options.map(([kind, text], place) =>
      el("li", { role: "option", id: `suggestion-${place}`, "aria-selected": "false", data: { text } }, icon(kind), el("span", {}, text), el("small", {}, kind === "recent" ? "asked before" : "example"))));
    if (recent.length) this.#list.append(el("li", { role: "option", id: "forget", class: "forget", "aria-selected": "false" }, icon("close"), el("span", {}, "Forget the questions asked before")));
    this.#show(options.length > 0);
  }

  #forget() {
    kept.write(RECENT, []);
    announce("The questions asked before are forgotten");
    this.#open();
  }

  #show(isOpen) {
    this.#list.hidden = !isOpen;
    this.#input.setAttribute("aria-expanded", String(isOpen));
    if (!isOpen) this.#input.removeAttribute("aria-activedescendant");
  }

  #close() {
    this.#show(false);
  }

  #pick(option) {
    if (!option) return;
    if (option.id === "forget") return this.#forget();
    this.text = option.dataset.text;
    byId("ask").requestSubmit();
  }

  #key(event) {
    const isOpen = !this.#list.hidden;
    if (event.key === "Escape" && isOpen) {
      this.#close();
      event.stopPropagation();
    } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      if (isOpen) this.#choose(this.#chosen + (event.key === "ArrowDown" ? 1 : -1));
      else this.#open();
    } else if (event.key === "Enter" && isOpen && this.#chosen >= 0) this.#pick(this.#list.children[this.#chosen]);
    else return;
    event.preventDefault();
  }

  #choose(place) {
    const options = [...this.#list.children];
    this.#chosen = Math.min(Math.max(place, -1), options.length - 1);
    options.forEach((option, index) => option.setAttribute("aria-selected", String(index === this.#chosen)));
    const option = options[this.#chosen];
    if (option) this.#input.setAttribute("aria-activedescendant", option.id);
    else this.#input.removeAttribute("aria-activedescendant");
    option?.scrollIntoView({ block: "nearest" });
  }
}
