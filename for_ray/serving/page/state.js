// The page's state and the address that holds it: each can be had from the other.

const NOTHING = {
  text: "", like: null, of: null, region: null, picture: null,
  under: "", glob: "", where: "", fold: false, unwanted: null, k: 60,
  min: null, image: null, slot: null,
};

export const ASKED = ["text", "like", "of", "region", "picture", "under", "glob", "where", "fold", "unwanted", "k"];
export const FILTERS = ["under", "glob", "where", "fold", "unwanted"];

const NAMES = { text: "q" }; // in the address; the others are called what they are

const number = (text) => (text !== null && text.trim() !== "" && Number.isFinite(Number(text)) ? Number(text) : null);
const whole = (text) => (/^\d{1,18}$/.test(text ?? "") ? Number(text) : null);

function region(text) {
  const sides = (text ?? "").split(",").map(Number);
  const [x0, y0, x1, y1] = sides;
  return sides.length === 4 && 0 <= x0 && x0 < x1 && x1 <= 1 && 0 <= y0 && y0 < y1 && y1 <= 1 ? sides : null;
}

/** The state that an address holds; what it has of no sense is left out. */
export function read(query) {
  const given = new URLSearchParams(query);
  const like = given.get("like");
  return {
    ...NOTHING,
    text: given.get("q") ?? "",
    like: /^\d+(:\d+)?$/.test(like ?? "") ? like : null,
    of: whole(given.get("of")),
    region: region(given.get("region")),
    picture: given.has("picture") ? given.get("picture") : null,
    under: given.get("under") ?? "",
    glob: given.get("glob") ?? "",
    where: given.get("where") ?? "",
    fold: given.has("fold"),
    unwanted: number(given.get("unwanted")),
    k: Math.min(Math.max(whole(given.get("k")) ?? NOTHING.k, 1), 1000),
    min: number(given.get("min")),
    image: whole(given.get("image")),
    slot: whole(given.get("slot")),
  };
}

/** The address of a state, after the `?`. */
export function write(state) {
  const said = new URLSearchParams();
  for (const [key, value] of Object.entries(state)) {
    if (value === NOTHING[key] || value === null || value === "") continue;
    const text = Array.isArray(value) ? value.map((side) => +side.toFixed(4)).join(",") : value === true ? "1" : String(value);
    said.set(NAMES[key] ?? key, text);
  }
  return said.toString();
}

const same = (one, other, keys) => write(pick(one, keys)) === write(pick(other, keys));
const pick = (state, keys) => Object.fromEntries(keys.map((key) => [key, state[key]]));

/** The state that is now; `change` events carry what it was, and whether the question is another one. */
export class State extends EventTarget {
  constructor() {
    super();
    this.now = read(location.search);
    addEventListener("popstate", () => this.#become(read(location.search)));
  }

  /** Change parts of it; a new entry of the history unless it only follows a drag. */
  set(changes, { replace = false } = {}) {
    const next = { ...this.now, ...changes };
    const query = write(next);
    const url = query ? `?${query}` : location.pathname;
    if (query !== write(this.now)) history[replace ? "replaceState" : "pushState"](null, "", url);
    this.#become(next);
  }

  /** Another question: what was asked with before, its threshold and its open image go; filters stay. */
  ask(changes) {
    this.set({ text: "", like: null, of: null, region: null, picture: null, min: null, image: null, slot: null, ...changes });
  }

  #become(next) {
    const before = this.now;
    this.now = next;
    const isAsked = !same(before, next, ASKED);
    this.dispatchEvent(new CustomEvent("change", { detail: { before, isAsked } }));
  }
}

/** Whether anything is asked. */
export const isQuestion = (state) => Boolean(state.text.trim() || state.like || state.of !== null || state.picture);
