// What is asked: as the body of a question, and as the question box shows it.

import { thumbnailUrl } from "./api.js";
import { byId, el } from "./dom.js";
import { filtersBody } from "./filters.js";

const SIDE = 128; // pixels of the small picture in the question box

/** What a state asks, as the body of POST /search. */
export async function bodyOf(now, picture) {
  return { ...(await askedBody(now, picture)), k: now.k, ...filtersBody(now) };
}

async function askedBody({ text, like, region, picture: key }, picture) {
  if (like) return { like, ...(region ? { region } : {}) };
  return key ? picture.bodyOf(key) : { text: text.trim() };
}

/** The picture that is asked with: where it is shown from, in words, and the image and slot of the index that it is. */
function exampleOf({ like, region, picture: key }, picture) {
  if (like) {
    const [imageId, slot] = like.split(":");
    const what = region ? "region" : slot ? "object" : "image";
    return { url: thumbnailUrl(imageId, SIDE), words: `more like this ${what}`, place: [imageId, slot] };
  }
  if (!key || !picture.has(key)) return null;
  return { url: picture.urlOf(key), words: picture.regionOf(key) ? "a region of your picture" : "your picture", place: null };
}

/** Show in the question box, and in the title, what is asked. */
export function showAsked(state, box, picture) {
  const { text } = state.now;
  const example = exampleOf(state.now, picture);
  box.text = text;
  box.showExample(...(example ? [exampleButton(example, state, picture)] : []));
  document.title = `${text || (example ? example.words : "Image search")} – for_ray`;
  byId("heading").textContent = text ? `Images that show ${text}` : "Image search";
}

function exampleButton({ url, words, place }, state, picture) {
  const [imageId, slot] = place ?? [];
  const open = () => (place ? state.set({ image: Number(imageId), slot: slot ? Number(slot) : null }) : picture.reopen(state.now.picture));
  const name = place ? "Show the image that is asked with" : "Change the region of your picture";
  return el("button", { type: "button", "aria-label": `${name}: ${words}`, on: { click: open } }, el("img", { src: url, alt: "" }), el("span", {}, words));
}
