// The page's state and the address that holds it: each can be had from the other.

const NOTHING = {
  text: "", like: null, region: null, picture: null,
  under: "", glob: "", where: "", fold: false, unwanted: null, k: 60,
  min: null, image: null, slot: null, selected: [],
};

export const MOST_SELECTED = 1000; // images whose ids an address holds

export const ASKED = ["text", "like", "region", "picture", "under", "glob", "where", "fold", "unwanted", "k"];
export const FILTERS = ["under", "glob", "where", "fold", "unwanted"];
const ALL_BUT_SELECTED = [...ASKED, "min", "image", "slot"];

const NAMES = { text: "q" }; // in the address; the others are called what they are

const number = (text) => (text !== null && text.trim() !== "" && Number.isFinite(Number(text)) ? Number(text) : null);
const whole = (text) => (/^\d{1,16}$/.test(text ?? "") && Number.isSafeInteger(Number(text)) ? Number(text) : null);
const ids = (text) => [...new Set((text ?? "").split(",").map(whole))].filter((id) => id !== null).slice(0, MOST_SELECTED);

function region(text) {
  const sides = (text ?? "").split(",").map(Number);
  const [x0, y0, x1, y1] = sides;
  return sides.length === 4 && 0 <= x0 && x0 < x1 && x1 <= 1 && 0 <= y0 && y0 < y1 && y1 <= 1 ? sides : null;
}

/** The state that an address holds; what it has of no sense is left out. */
export function read({ search, hash }) {
  const given = new URLSearchParams(search);
  const like = given.get("like");
  return {
    ...NOTHING,
    text: given.get("q") ?? "",
    like: /^\d+(:\d+)?$/.test(like ?? "") ? like : null,
    region: /^\d+$/.test(like ?? "") ? region(given.get("region")) : null,
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
    selected: ids(new URLSearchParams(hash.slice(1)).get("sel")),
  };
}

/** The address of a state; what is selected stands after the `#`, so that it is never sent and may be long. */
export function write({ selected, ...state }) {
  const query = queryOf(state);
  return (query ? `?${query}` : location.pathname) + (selected.length ? `#sel=${selected.join(",")}` : "");
}

function queryOf(state) {
  const said = new URLSearchParams();
  for (const [key, value] of Object.entries(state)) {
    if (value === NOTHING[key] || value === null || value === "") continue;
    const text = Array.isArray(value) ? value.map((side) => +side.toFixed(4)).join(",") : value === true ? "1" : String(value);
    said.set(NAMES[key] ?? key, text);
  }
  return said.toString();
}

const same = (one, other, keys) => queryOf(pick(one, keys)) === queryOf(pick(other, keys));
const pick = (state, keys) => Object.fromEntries(keys.map((key) => [key, state[key]]));

/** Have the address say a state; browsers refuse more than about a hundred calls in half a minute. */
function say(how, state) {
  try {
    history[how](null, "", write(state));
  } catch {
    // the next change brings the address up to date
  }
}

/** The state that is now; `change` events carry what it was, and whether the question is another one. */
export class State extends EventTarget {
  constructor() {
    super();
    this.now = read(location);
    addEventListener("popstate", () => this.#pop());
  }

  /** Change parts of it; a new entry of the history unless it only follows a drag. */
  set(changes, { replace = false } = {}) {
    const next = { ...this.now, ...changes };
    if (write(next) !== write(this.now)) say(replace ? "replaceState" : "pushState", next);
    this.#become(next);
  }

  /** Another question: what was asked with before, its threshold and its open image go; filters and selection stay. */
  ask(changes) {
    this.set({ text: "", like: null, region: null, picture: null, min: null, image: null, slot: null, ...changes });
  }

  /** Back or forward; what is selected stays so, but where only that differs: clearing it is taken back. */
  #pop() {
    const found = read(location);
    const isOfSelection = same(this.now, found, ALL_BUT_SELECTED);
    const next = isOfSelection ? found : { ...found, selected: this.now.selected };
    if (!isOfSelection) say("replaceState", next);
    this.#become(next);
  }

  #become(next) {
    const before = this.now;
    this.now = next;
    const isAsked = !same(before, next, ASKED);
    this.dispatchEvent(new CustomEvent("change", { detail: { before, isAsked } }));
  }
}

/** Whether anything is asked. */
export const isQuestion = (state) => Boolean(state.text.trim() || state.like || state.picture);
