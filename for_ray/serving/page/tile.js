// One result: its image, the boxes of its objects, and what it says.

import { thumbnailUrl, whyMissing } from "./api.js";
import { colourOf, el, fileName, placeBox, sentence } from "./dom.js";

const SIDE = devicePixelRatio > 1.2 ? 640 : 384; // pixels of a thumbnail
const [NARROWEST, WIDEST] = [0.4, 3]; // of a tile; an image beyond is shown whole in a tile like that

/** What a tile says: to the eye on hover, to a screen reader always. */
function described(hit, rank) {
  const found = hit.found.filter((each) => each.name).map((each) => `${each.name} ${each.score.toFixed(3)}`);
  return [`${rank + 1}: ${fileName(hit.uri)}`, `score ${hit.score.toFixed(3)}`, ...(found.length > 1 ? found : [])].join(", ");
}

/** The boxes of a hit, in the colours of the question's names. */
function boxesOf(hit, names) {
  return hit.found.map((found) => {
    const box = el("span", { class: `box ${colourOf(names, found.name)}`, data: { name: found.name, slot: String(found.slot) } });
    placeBox(box, found.box);
    return box;
  });
}

function captionOf(hit, names) {
  const parts = names.length > 1 ? hit.found : [];
  const named = parts.map((found) =>
    el("span", { class: "part" }, el("i", { class: `dot ${colourOf(names, found.name)}` }), `${found.name} ${found.score.toFixed(3)}`));
  return el("span", { class: "caption", "aria-hidden": "true" },
    el("span", { class: "first" }, el("b", {}, hit.score.toFixed(3)), el("span", { class: "file" }, fileName(hit.uri))), ...named);
}

/** A place of the grid that is this many times as wide as high. */
export function makeItem(ratio, kind, ...children) {
  const item = el("li", { class: kind }, ...children);
  item.style.setProperty("--ratio", Math.min(Math.max(ratio, NARROWEST), WIDEST));
  return item;
}

/** A hit as the grid's item, with its box to tick. */
export function makeHit(hit, names, rank) {
  const isKnown = hit.width > 0 && hit.height > 0;
  const image = el("img", { src: thumbnailUrl(hit.image_id, SIDE), alt: "", loading: "lazy", decoding: "async", draggable: "false" });
  const frame = el("span", { class: "frame" }, image, ...boxesOf(hit, names));
  const tile = el("button", { type: "button", class: "tile", tabindex: "-1", "aria-label": described(hit, rank), data: { id: String(hit.image_id) } }, frame, captionOf(hit, names));
  if (hit.folded.length) tile.append(el("span", { class: "folded", title: "near-duplicates" }, `+${hit.folded.length}`));
  const tick = el("input", { type: "checkbox", class: "tick", tabindex: "-1", "aria-label": `Select ${fileName(hit.uri)}` });
  const item = makeItem(isKnown ? hit.width / hit.height : 1, "hit", tile, tick);
  if (isKnown) frame.style.setProperty("--ratio", hit.width / hit.height);
  image.addEventListener("load", () => showLoaded(item, frame, image, isKnown));
  image.addEventListener("error", () => showMissing(frame, image));
  return item;
}

/** Say why there is no image; one that comes now is shown after all. */
async function showMissing(frame, image) {
  const why = image.dataset.again ? "this browser cannot show it" : await whyMissing(image.src);
  if (why !== null) return frame.replaceChildren(el("span", { class: "missing" }, sentence(why)));
  image.dataset.again = "yes";
  image.src = image.src; // loads it anew
}

function showLoaded(item, frame, image, isKnown) {
  frame.classList.add("loaded");
  if (isKnown) return;
  const ratio = image.naturalWidth / image.naturalHeight;
  item.style.setProperty("--ratio", Math.min(Math.max(ratio, NARROWEST), WIDEST));
  frame.style.setProperty("--ratio", ratio);
}
