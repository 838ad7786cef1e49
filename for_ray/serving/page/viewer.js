// One image, large, with all its objects to choose from.

import { imageUrl, objectsOf, thumbnailUrl, whyMissing } from "./api.js";
import { byId, colourOf, el, fileName, isWriting, placeBox, sentence } from "./dom.js";
import { RegionDrawing } from "./region.js";

const LARGEST_THUMBNAIL = 1024;
const area = ([x0, y0, x1, y1]) => (x1 - x0) * (y1 - y0);

/** What the manifest says, as short as it can be read. */
function shown(value) {
  if (value === null || value === undefined) return "–";
  const text = typeof value === "object" ? JSON.stringify(value) : String(value);
  return text.replace(/^(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)(\.\d+)?(\+00:00|Z)$/, "$1 $2 UTC");
}

/**
 * Events: `move` (-1 or 1), `choose` (a slot), `like` ({like} or {like, region}), `toggle`, `closed`,
 * `known` (the snapshot that says what is known of the image).
 */
export class Viewer extends EventTarget {
  #dialog = byId("viewer");
  #figure = this.#dialog.querySelector(".figure");
  #image = this.#figure.querySelector("img");
  #drawing = new RegionDrawing(this.#figure);
  #abort = new AbortController();
  #known = null;
  #isAgain = false; // whether the small image is asked for the second time
  #names = [];
  #hit = null;

  constructor() {
    super();
    this.imageId = null;
    this.slot = null;
    this.#dialog.addEventListener("click", (event) => this.#click(event));
    this.#dialog.addEventListener("keydown", (event) => this.#key(event));
    this.#dialog.addEventListener("close", () => this.#tell("closed"));
    this.#image.addEventListener("error", () => this.#showSmaller());
    this.#image.addEventListener("load", () => this.#setRatio(this.#image.naturalWidth / this.#image.naturalHeight));
    this.#drawing.addEventListener("change", () => this.#nameAction());
  }

  get isOpen() {
    return this.#dialog.open;
  }

  close() {
    this.#abort.abort();
    this.imageId = null;
    if (this.isOpen) this.#dialog.close();
  }

  /** Show an image of the index; the hit, if it is one of the answer's, says what was found in it. */
  async show(imageId, { slot = null, hit = null, names = [], isSelected = false } = {}) {
    const isSame = this.imageId === imageId && this.isOpen;
    [this.imageId, this.slot, this.#hit, this.#names] = [imageId, slot ?? hit?.slot ?? null, hit, names];
    this.markSelected(isSelected);
    if (isSame) return this.#markSlot({ isScrolled: true });
    this.#abort.abort();
    this.#abort = new AbortController();
    this.#drawOn(false);
    this.#showImage(hit);
    if (!this.isOpen) this.#dialog.showModal();
    return this.#fetchObjects(this.#abort.signal);
  }

  markSelected(isSelected) {
    this.#button("select").setAttribute("aria-pressed", String(isSelected));
  }

  #showImage(hit) {
    this.#known = null;
    this.#isAgain = false;
    if (document.activeElement.dataset.slot) byId("viewer-title").focus(); // what goes would take the keys along
    this.#fill("", hit?.uri ?? "");
    this.#dialog.querySelector(".slots").replaceChildren();
    this.#dialog.querySelector(".slot-list").replaceChildren();
    this.#dialog.querySelector(".facts").replaceChildren();
    this.#dialog.querySelector(".gone").hidden = true;
    this.#figure.hidden = false;
    this.#dialog.querySelector(".side").scrollTop = 0;
    this.#setRatio(hit?.width > 0 ? hit.width / hit.height : 4 / 3);
    this.#image.src = imageUrl(this.imageId);
    this.#dialog.querySelector(".original").href = imageUrl(this.imageId);
  }

  /** Files that this browser cannot show: the service can. */
  async #showSmaller() {
    const url = thumbnailUrl(this.imageId, LARGEST_THUMBNAIL);
    if (this.#image.src !== url) {
      this.#image.src = url;
      return;
    }
    const why = this.#isAgain ? "this browser cannot show the image" : await whyMissing(url);
    if (this.#image.src !== url) return; // another image is shown meanwhile
    this.#isAgain = true;
    if (why === null) this.#image.src = url;
    else this.#fail(sentence(why));
  }

  #fail(text) {
    const line = this.#dialog.querySelector(".gone");
    line.textContent = text;
    line.hidden = false;
    this.#figure.hidden = true;
  }

  #fill(title, uri) {
    byId("viewer-title").textContent = title || fileName(uri) || `Image ${this.imageId}`;
    this.#image.alt = fileName(uri);
    this.#dialog.querySelector(".uri").textContent = uri;
  }

  #setRatio(ratio) {
    if (ratio > 0) this.#figure.style.setProperty("--ratio", ratio);
  }

  async #fetchObjects(signal) {
    try {
      this.#known = await objectsOf(this.imageId, signal);
    } catch (error) {
      if (!signal.aborted) this.#fail(sentence(error.message));
      return;
    }
    if (signal.aborted) return;
    this.#fill("", this.#known.uri);
    if (this.#known.width > 0) this.#setRatio(this.#known.width / this.#known.height);
    this.slot ??= this.#known.slots[0]?.slot ?? null;
    this.#showSlots();
    this.#showFacts();
    this.dispatchEvent(new CustomEvent("known", { detail: this.#known.snapshot_id }));
  }

  /** What the answer says of a slot: its name and score; nothing of the others. */
  #found(slot) {
    return this.#hit?.found.filter((found) => found.slot === slot) ?? [];
  }

  #showSlots() {
    const slots = this.#known.slots.map((each, place) => ({ ...each, place, found: this.#found(each.slot) }));
    const colour = ({ found }) => (found.length ? colourOf(this.#names, found[0].name) : "colour-none");
    const said = ({ place, found }) => [`Object ${place + 1}`, ...found.map((each) => `${each.name || "match"} ${each.score.toFixed(3)}`)].join(" · ");
    const boxes = slots.toSorted((one, other) => area(other.box) - area(one.box)).map((each) => {
      const box = el("button", { type: "button", class: `box ${colour(each)}`, tabindex: "-1", "aria-label": said(each), data: { slot: String(each.slot) } });
      placeBox(box, each.box);
      return box;
    });
    this.#dialog.querySelector(".slots").replaceChildren(...boxes);
    this.#dialog.querySelector(".slot-list").replaceChildren(...slots.map((each) =>
      el("li", {}, el("button", { type: "button", class: "slot", data: { slot: String(each.slot) } }, el("i", { class: `dot ${colour(each)}` }), said(each)))));
    this.#markSlot();
  }

  #showFacts() {
    const { columns, width, height, etag } = this.#known;
    const facts = { ...(width ? { size: `${width} × ${height}` } : {}), ...columns, "image id": this.imageId, etag };
    const rows = Object.entries(facts).filter(([name, value]) => name !== "uri" && value !== "" && value !== null && value !== undefined);
    this.#dialog.querySelector(".facts").replaceChildren(...rows.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, shown(value)))));
  }

  #markSlot({ isScrolled = false } = {}) {
    for (const button of this.#dialog.querySelectorAll("[data-slot]")) {
      const is = Number(button.dataset.slot) === this.slot;
      button.setAttribute("aria-pressed", String(is));
      if (!is || !button.matches(".slot")) continue;
      if (isScrolled) button.scrollIntoView({ block: "nearest" });
      if (document.activeElement.matches(".slot")) button.focus();
    }
  }

  #drawOn(isOn) {
    if (!isOn && document.activeElement.matches(".region")) this.#button("region").focus();
    this.#drawing.turn(isOn);
    this.#button("region").setAttribute("aria-pressed", String(isOn));
    this.#nameAction();
  }

  #nameAction() {
    this.#button("like").querySelector("span").textContent = this.#drawing.region ? "More like this region" : "More like this object";
  }

  #button(name) {
    return this.#dialog.querySelector(`[data-do=${name}]`);
  }

  #tell(event, detail = null) {
    this.dispatchEvent(new CustomEvent(event, { detail }));
  }

  #do(name) {
    if (name === "close") this.#dialog.close();
    else if (name === "previous" || name === "next") this.#tell("move", name === "next" ? 1 : -1);
    else if (name === "select") this.#tell("toggle");
    else if (name === "region") this.#drawOn(!this.#drawing.isOn);
    else if (name === "like-image") this.#tell("like", { like: String(this.imageId) });
    else if (this.#drawing.region) this.#tell("like", { like: String(this.imageId), region: this.#drawing.region });
    else if (this.slot !== null) this.#tell("like", { like: `${this.imageId}:${this.slot}` });
  }

  #click(event) {
    const button = event.target.closest("button");
    if (button?.dataset.do) this.#do(button.dataset.do);
    else if (button?.dataset.slot && !this.#drawing.isOn) this.#tell("choose", Number(button.dataset.slot));
    else if (event.target === this.#dialog) this.#dialog.close();
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || isWriting(event.target)) return;
    const key = event.key.toLowerCase();
    const steps = { arrowup: -1, arrowdown: 1 };
    if (key === "arrowleft" || key === "arrowright") this.#tell("move", key === "arrowright" ? 1 : -1);
    else if (key in steps) this.#chooseNext(steps[key]);
    else if (key === "m") this.#do("like");
    else if (key === "s") this.#do("select");
    else if (key === "r") {
      this.#drawOn(true);
      this.#drawing.begin();
    } else if (key === "escape" && this.#drawing.isOn) this.#drawOn(false);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  #chooseNext(step) {
    const slots = this.#known?.slots.map((each) => each.slot) ?? [];
    const place = Math.min(Math.max(slots.indexOf(this.slot) + step, 0), slots.length - 1);
    if (slots.length) this.#tell("choose", slots[place]);
  }
}
