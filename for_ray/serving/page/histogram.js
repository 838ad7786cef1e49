// The scores of the answer as a histogram, with a threshold to drag.

import { byId } from "./dom.js";

const [FEWEST_BINS, MOST_BINS] = [20, 56];
const STEPS = 100; // of the slider, from end to end

function bar(x, height, isOut) {
  const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  for (const [name, value] of Object.entries({ x: x + 0.08, y: 100 - height, width: 0.84, height })) rect.setAttribute(name, value);
  if (isOut) rect.classList.add("out");
  return rect;
}

/**
 * Events: `move` (while dragged) and `settle` (then) carry the threshold, null: all is shown; `wanted`: somebody turns
 * to the scores.
 */
export class Histogram extends EventTarget {
  #root = byId("histogram");
  #plot = this.#root.querySelector(".plot");
  #handle = this.#root.querySelector(".threshold");
  #scores = [];
  #min = null;
  #held = null; // the range of scores while the threshold is dragged: what comes in meanwhile does not shift it

  constructor() {
    super();
    this.#plot.addEventListener("pointerdown", (event) => this.#press(event));
    this.#plot.addEventListener("pointermove", (event) => this.#held && this.#moveTo(this.#scoreAt(event)));
    for (const end of ["pointerup", "pointercancel"]) this.#plot.addEventListener(end, () => this.#settle());
    this.#handle.addEventListener("keydown", (event) => this.#key(event));
    for (const turned of ["pointerenter", "focusin"]) this.#plot.addEventListener(turned, () => this.dispatchEvent(new Event("wanted")));
  }

  /** Show scores, in no order, and the threshold among them. */
  show(scores, min) {
    [this.#scores, this.#min] = [scores, min];
    this.#root.hidden = scores.length < 2;
    if (scores.length) this.#draw();
  }

  get #range() {
    if (this.#held) return this.#held;
    const low = Math.min(...this.#scores, this.#min ?? Infinity);
    const high = Math.max(...this.#scores, this.#min ?? -Infinity);
    return [low, high > low ? high : low + 1e-3];
  }

  #draw() {
    const [low, high] = this.#range;
    const numBins = Math.min(Math.max(Math.ceil(this.#scores.length / 4), FEWEST_BINS), MOST_BINS);
    const counts = new Array(numBins).fill(0);
    const binOf = (score) => Math.min(numBins - 1, Math.floor(((score - low) / (high - low)) * numBins));
    for (const score of this.#scores.filter((each) => each >= low)) counts[binOf(score)] += 1;
    const most = Math.max(...counts);
    const isOut = (bin) => this.#min !== null && low + ((bin + 1) / numBins) * (high - low) <= this.#min;
    const svg = this.#root.querySelector(".bars");
    svg.setAttribute("viewBox", `0 0 ${numBins} 100`);
    svg.replaceChildren(...counts.map((count, bin) => bar(bin, count ? Math.max(6, (count / most) * 100) : 0, isOut(bin))));
    this.#label(low, high);
  }

  #label(low, high) {
    const now = this.#min ?? low;
    const text = (name, value) => (this.#root.querySelector(name).textContent = value);
    this.#handle.style.left = `${((now - low) / (high - low)) * 100}%`;
    text(".low", low.toFixed(3));
    text(".high", high.toFixed(3));
    text(".now", this.#min === null ? "drag to set the lowest score" : `${now.toFixed(3)} or more`);
    const passed = this.#scores.filter((score) => score >= now).length;
    const said = { "aria-valuemin": low.toFixed(4), "aria-valuemax": high.toFixed(4), "aria-valuenow": now.toFixed(4), "aria-valuetext": `${now.toFixed(3)}: ${passed} of the ${this.#scores.length} images so far` };
    for (const [name, value] of Object.entries(said)) this.#handle.setAttribute(name, value);
  }

  #scoreAt(event) {
    const { left, width } = this.#plot.getBoundingClientRect();
    const [low, high] = this.#range;
    return low + Math.min(Math.max((event.clientX - left) / width, 0), 1) * (high - low);
  }

  #press(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    this.#plot.setPointerCapture(event.pointerId);
    this.#held = this.#range;
    this.#handle.focus();
    this.#moveTo(this.#scoreAt(event));
  }

  #moveTo(score) {
    const [low, high] = this.#range;
    const rounded = Math.round(Math.min(Math.max(score, low), high) * 10000) / 10000;
    this.#min = rounded <= low + 1e-4 ? null : Math.min(rounded, high);
    this.dispatchEvent(new CustomEvent("move", { detail: this.#min }));
    this.#draw();
  }

  #settle() {
    if (!this.#held) return;
    this.#held = null;
    this.#draw();
    this.dispatchEvent(new CustomEvent("settle", { detail: this.#min }));
  }

  #key(event) {
    const [low, high] = this.#range;
    const step = (high - low) / STEPS;
    const now = this.#min ?? low;
    const to = { ArrowLeft: now - step, ArrowDown: now - step, ArrowRight: now + step, ArrowUp: now + step, PageDown: now - 10 * step, PageUp: now + 10 * step, Home: low, End: high }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.#moveTo(to);
    this.dispatchEvent(new CustomEvent("settle", { detail: this.#min }));
  }
}
