// What is said of an answer: how many images, the colours of its names, or why there is nothing to see.

import { announce, byId, colourOf, el, icon, sentence } from "./dom.js";
import { action, clearState, showState } from "./notices.js";
import { FILTERS } from "./state.js";

const counted = (count) => (count === 1 ? "1 image" : `${count.toLocaleString("en")} images`);

const lasting = (seconds) => (seconds < 1 ? `${Math.max(1, Math.round(seconds * 1000))} ms` : `${seconds.toFixed(1)} s`);

/** The line above the results. */
function lineOf(results, about) {
  const shown = results.shown.length;
  const images = results.isDone ? counted(shown) : `The best ${counted(shown)} so far`;
  const threshold = results.min === null ? "" : `, score ${results.min.toFixed(3)} or more`;
  const of = about ? ` of ${about.num_images.toLocaleString("en")}` : "";
  const seconds = results.answer.seconds?.total;
  return `${images}${of}${threshold}${seconds ? ` · ${lasting(seconds)}` : ""}`;
}

/** Say what there is, once an answer came in, grew, or lost images to the threshold. */
export function describe(results, about, state) {
  if (!results.answer) return;
  const line = lineOf(results, about);
  byId("bar").hidden = !results.hits.length && !FILTERS.some((name) => state.now[name]);
  byId("counted").textContent = line;
  byId("legend").replaceChildren(...results.names.map((name) => el("li", {}, el("i", { class: `dot ${colourOf(results.names, name)}` }), name)));
  byId("refine").hidden = !results.hits.length;
  for (const button of document.querySelectorAll("[data-refine]")) button.hidden = !state.now.text;
  describeEnd(results, state);
  announce(line);
}

function describeEnd(results, state) {
  const showAll = action("Show all", () => state.set({ min: null }), { isPrimary: true });
  if (!results.hits.length) showState("Nothing found", sentence(results.reason ?? ""), ...cureOf(state));
  else if (!results.shown.length) showState(`No image scores ${results.min.toFixed(3)} or more`, `The best of them has ${Math.max(...results.hits.map((hit) => hit.score)).toFixed(3)}.`, showAll);
  else if (results.isDone && results.shown.length < results.hits.length) showState("", `The others score less than ${results.min.toFixed(3)}.`, action("Show all", () => state.set({ min: null })));
  else if (results.isDone) showState("", sentence(results.reason ?? "these are all that one question ranks"));
  else clearState();
}

/** What may help against an answer without images. */
function cureOf(state) {
  const cures = [];
  const none = { under: "", glob: "", where: "", fold: false, unwanted: null };
  if (FILTERS.some((name) => state.now[name] !== none[name])) cures.push(action("Ask without filters", () => state.set(none), { isPrimary: true }));
  return cures;
}

/** The page before anything is asked. */
export function showStart(about, { ask, upload }) {
  byId("bar").hidden = true;
  const size = about ? `${about.num_images.toLocaleString("en")} images, ${about.num_vectors.toLocaleString("en")} objects` : "";
  const examples = (about?.examples ?? []).map((text) => el("button", { type: "button", class: "chip large", on: { click: () => ask(text) } }, icon("search"), text));
  const picture = el("button", { type: "button", class: "chip large", on: { click: upload } }, icon("picture"), "a picture of yours");
  showState("Find images by the objects in them", size && `Words, or a picture, or a region of one: searched in ${size}.`, ...examples, picture);
}

/** One line, and a way on. */
export function showFailure(error, retry) {
  byId("bar").hidden = true;
  const isQuestion = error.code === "question";
  if (isQuestion) showState("The question doesn't parse", "What is wrong stands below it. Names go with AND, OR, NOT and parentheses; the key ? shows how.");
  else showState("No answer", sentence(error.message), action("Try again", retry, { isPrimary: true }));
}
