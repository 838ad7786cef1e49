// Drawing a region on a picture, with a pointer or with keys.

import { el, placeBox } from "./dom.js";

const LEAST = 0.02; // of a side: what is smaller was a click
const STEP = 0.02;
const FIRST = [0.3, 0.3, 0.7, 0.7]; // what a key makes, to be moved from there

const clip = (value) => Math.min(Math.max(value, 0), 1);

/** Draws on a figure while it is on; `change` events follow each change of `region`. */
export class RegionDrawing extends EventTarget {
  #figure;
  #box = el("div", { class: "region", tabindex: "0", role: "application", "aria-roledescription": "region", hidden: true });
  #start = null;

  constructor(figure) {
    super();
    this.#figure = figure;
    this.region = null;
    this.isOn = false;
    figure.append(this.#box);
    figure.addEventListener("pointerdown", (event) => this.#press(event));
    figure.addEventListener("pointermove", (event) => this.#drag(event));
    figure.addEventListener("pointerup", (event) => this.#release(event));
    figure.addEventListener("pointercancel", () => (this.#start = null));
    this.#box.addEventListener("keydown", (event) => this.#key(event));
  }

  turn(isOn) {
    this.isOn = isOn;
    this.#figure.classList.toggle("drawing", isOn);
    if (!isOn) this.set(null);
  }

  /** A region, in fractions of the picture, or none. */
  set(region) {
    this.region = region;
    this.#box.hidden = region === null;
    if (region) {
      placeBox(this.#box, region);
      const [x0, y0, x1, y1] = region.map((side) => Math.round(side * 100));
      this.#box.setAttribute("aria-label", `Region from ${x0} to ${x1} per cent across and ${y0} to ${y1} down: arrows move it, Shift and arrows size it`);
    }
    this.dispatchEvent(new Event("change"));
  }

  /** Make a box in the middle, or go on with the one that is there, by keys. */
  begin() {
    this.set(this.region ?? FIRST);
    this.#box.focus();
  }

  #at(event) {
    const { left, top, width, height } = this.#figure.getBoundingClientRect();
    return [clip((event.clientX - left) / width), clip((event.clientY - top) / height)];
  }

  #press(event) {
    if (!this.isOn || event.button !== 0) return;
    event.preventDefault();
    this.#start = this.#at(event);
    this.#figure.setPointerCapture(event.pointerId);
  }

  #drag(event) {
    if (!this.#start) return;
    const [x, y] = this.#at(event);
    const [startX, startY] = this.#start;
    const region = [Math.min(x, startX), Math.min(y, startY), Math.max(x, startX), Math.max(y, startY)];
    if (region[2] - region[0] >= LEAST && region[3] - region[1] >= LEAST) this.set(region);
  }

  #release(event) {
    this.#drag(event);
    this.#start = null;
  }

  #key(event) {
    const steps = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] };
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    const [x0, y0, x1, y1] = this.region;
    const [x, y] = step;
    if (event.shiftKey) this.set([x0, y0, Math.max(x0 + LEAST, clip(x1 + x)), Math.max(y0 + LEAST, clip(y1 + y))]);
    else {
      const [byX, byY] = [Math.min(Math.max(x, -x0), 1 - x1), Math.min(Math.max(y, -y0), 1 - y1)];
      this.set([x0 + byX, y0 + byY, x1 + byX, y1 + byY]);
    }
  }
}
