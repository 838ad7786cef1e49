// What is said of an answer: how many images, the colours of its names, or why there is nothing to see.

import { announce, byId, colourOf, el, icon, sentence } from "./dom.js";
import { action, clearState, showState } from "./notices.js";
import { FILTERS } from "./state.js";

const lasting = (seconds) => (seconds < 1 ? `${Math.max(1, Math.round(seconds * 1000))} ms` : `${seconds.toFixed(1)} s`);

/** The line above the results. */
function lineOf(results, about) {
  const shown = results.shown.length.toLocaleString("en");
  const of = about ? ` of ${about.num_images.toLocaleString("en")}` : "";
  const threshold = results.min === null ? "" : `, score ${results.min.toFixed(3)} or more`;
  const seconds = results.answer.seconds?.total;
  return `${results.isDone ? "" : "The best "}${shown}${of} images${threshold}${seconds ? ` · ${lasting(seconds)}` : ""}`;
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
  showState("Find images by the objects in them", size && `Searched are ${size}.`, ...examples, picture);
  byId("state").append(el("dl", { class: "ways" }, ...WAYS.map(([name, way, how]) => el("div", {}, el("dt", {}, icon(name), way), el("dd", {}, how)))));
}

const WAYS = [
  ["search", "With words", "AND, OR and NOT join what an image shows. Each name gets its colour, and a box on each image."],
  ["picture", "With a picture", "Choose, paste or drop one, and draw a box around the object that you mean."],
  ["like", "With an object", "Open an image and choose one of its objects: more like it, from all images."],
];

const showHelp = () => byId("help").showModal();

/** One line, and a way on. */
export function showFailure(error, retry) {
  byId("bar").hidden = true;
  const isQuestion = error.code === "question";
  if (isQuestion) showState("The question doesn't parse", "The line below it says where. Names go with AND, OR, NOT and parentheses.", action("How to ask", showHelp));
  else showState("No answer", sentence(error.message), action("Try again", retry, { isPrimary: true }));
}
