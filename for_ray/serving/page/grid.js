// The results as a dense grid: rows of equal height, each image in its own proportions, its objects boxed.

import { byId } from "./dom.js";
import { makeHit, makeItem } from "./tile.js";

const AT_ONCE = 60; // tiles that are added at a time, as one scrolls
const SKELETONS = [1.3, 0.8, 1.5, 1, 1.25, 0.75, 1.4, 1.1, 0.9, 1.6, 1.2, 1, 0.7, 1.35, 1.1, 0.85, 1.5, 1];

/** Events: `open` and `toggle` (with shift: `range`) carry the hit and its rank; `end`: more is wanted. */
export class Grid extends EventTarget {
  #list = byId("grid");
  #hits = [];
  #names = [];
  #passes = () => true;
  #active = 0;
  #watcher = new IntersectionObserver(
    (entries) => entries.some((entry) => entry.isIntersecting) && this.#reachEnd(), { rootMargin: "900px" });

  constructor() {
    super();
    this.#watcher.observe(byId("more"));
    this.#list.addEventListener("click", (event) => this.#click(event));
    this.#list.addEventListener("keydown", (event) => this.#key(event));
    this.#list.addEventListener("keyup", (event) => event.key === " " && event.target.matches(".tile") && event.preventDefault());
    this.#list.addEventListener("focusin", (event) => this.#activate(this.#rankOf(event.target)));
  }

  /** Grey tiles, until an answer comes. */
  showSkeletons() {
    this.clear();
    this.#list.setAttribute("aria-busy", "true");
    this.#list.replaceChildren(...SKELETONS.map((ratio) => makeItem(ratio, "skeleton")));
  }

  clear() {
    this.#list.removeAttribute("aria-busy");
    this.#list.replaceChildren();
    [this.#hits, this.#names, this.#active] = [[], [], 0];
  }

  /** Show the hits of an answer that pass the threshold; those whose tiles are there already stay as they are. */
  show(hits, names, passes, { isNew = false } = {}) {
    if (isNew) this.clear();
    [this.#hits, this.#names, this.#passes] = [hits, names, passes];
    for (const [rank, item] of [...this.#list.children].entries()) item.hidden = !hits[rank] || !passes(hits[rank]);
    if (this.#ranks.length < AT_ONCE && this.#hasMore) this.#append();
    const ranks = this.#ranks;
    this.#activate(ranks.findLast((rank) => rank <= this.#active) ?? ranks[0] ?? 0);
    this.#rewatch();
  }

  /** The ranks of the tiles that are shown. */
  get #ranks() {
    return [...this.#list.children].flatMap((item, rank) => (item.hidden ? [] : [rank]));
  }

  /** Whether hits that pass have no tiles yet. */
  get #hasMore() {
    return this.#hits.slice(this.#list.children.length).some(this.#passes);
  }

  /** Mark the tiles whose images are selected. */
  mark(isSelected) {
    for (const [rank, item] of [...this.#list.children].entries()) {
      if (!this.#hits[rank]) continue;
      const is = isSelected(this.#hits[rank].image_id);
      item.classList.toggle("selected", is);
      item.querySelector("input").checked = is;
    }
  }

  focus(rank = this.#active) {
    while (rank >= this.#list.children.length && this.#hasMore) this.#append();
    this.#tile(rank)?.focus();
  }

  #append() {
    const first = this.#list.children.length;
    const next = this.#hits.findIndex((hit, rank) => rank >= first && this.#passes(hit));
    const hits = this.#hits.slice(first, Math.max(first, next) + AT_ONCE);
    const items = hits.map((hit, index) => makeHit(hit, this.#names, first + index));
    items.forEach((item, index) => (item.hidden = !this.#passes(hits[index])));
    this.#list.append(...items);
    this.#activate(this.#active);
    this.dispatchEvent(new Event("appended"));
  }

  #reachEnd() {
    if (this.#hasMore) {
      this.#append();
      this.#rewatch();
    } else if (this.#hits.length) this.dispatchEvent(new Event("end"));
  }

  /** The observer speaks only of changes: ask it anew, as the end may still be in sight. */
  #rewatch() {
    this.#watcher.unobserve(byId("more"));
    this.#watcher.observe(byId("more"));
  }

  #tile(rank) {
    return this.#list.children[rank]?.querySelector(".tile");
  }

  #rankOf(target) {
    return [...this.#list.children].indexOf(target.closest("li"));
  }

  #activate(rank) {
    if (rank < 0 || !this.#tile(rank)) return;
    this.#tile(this.#active)?.setAttribute("tabindex", "-1");
    this.#active = rank;
    this.#tile(rank).setAttribute("tabindex", "0");
  }

  #tell(event, rank) {
    this.dispatchEvent(new CustomEvent(event, { detail: { hit: this.#hits[rank], rank } }));
  }

  #click(event) {
    const rank = this.#rankOf(event.target);
    if (rank < 0 || !this.#hits[rank]) return;
    const isTick = event.target.matches(".tick");
    if (isTick || event.ctrlKey || event.metaKey || event.shiftKey) this.#tell(event.shiftKey ? "range" : "toggle", rank);
    else if (event.target.closest(".tile")) this.#tell("open", rank);
  }

  #key(event) {
    if (!event.target.matches(".tile")) return;
    const rank = this.#rankOf(event.target);
    if (event.key === " ") this.#tell(event.shiftKey ? "range" : "toggle", rank);
    else if (event.ctrlKey || event.metaKey || event.altKey) return;
    else {
      const next = this.#neighbour(event.key, rank);
      if (next === null) return;
      this.focus(next);
    }
    event.preventDefault();
  }

  /** The rank that a key leads to; up and down go to the nearest tile of the row above or below. */
  #neighbour(key, rank) {
    if (key === "ArrowRight" && rank === this.#ranks.at(-1) && this.#hasMore) this.#append();
    const ranks = this.#ranks;
    const place = ranks.indexOf(rank);
    const last = ranks.length - 1;
    const direct = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: last };
    if (key in direct) return ranks[Math.min(Math.max(direct[key], 0), last)];
    if (key !== "ArrowUp" && key !== "ArrowDown") return null;
    return ranks[nearestInNextRow(ranks.map((each) => this.#list.children[each]), place, key === "ArrowDown" ? 1 : -1)];
  }
}

/** The place of the tile in the next row (1: below, -1: above) whose middle is nearest to this one's. */
function nearestInNextRow(items, rank, direction) {
  const from = items[rank].getBoundingClientRect();
  const middle = from.left + from.width / 2;
  let [best, row, distance] = [rank, null, Infinity];
  for (let place = rank + direction; place >= 0 && place < items.length; place += direction) {
    const box = items[place].getBoundingClientRect();
    if (Math.abs(box.top - from.top) < 2) continue;
    row ??= box.top;
    if (Math.abs(box.top - row) > 2) break;
    const off = Math.abs(box.left + box.width / 2 - middle);
    if (off < distance) [best, distance] = [place, off];
  }
  return best;
}
