// The page: the address says what is asked, the parts show it, and what people do changes the address.

import * as api from "./api.js";
import { describe, showFailure, showStart } from "./answer.js";
import { bodyOf, showAsked } from "./asked.js";
import { byId } from "./dom.js";
import { Exporting } from "./exporting.js";
import { Filters } from "./filters.js";
import { Grid } from "./grid.js";
import { Histogram } from "./histogram.js";
import { startKeys } from "./keys.js";
import { action, clearBanner, clearState, showBanner, showState, toast } from "./notices.js";
import { Picture } from "./picture.js";
import { QuestionBox } from "./question.js";
import { Results } from "./results.js";
import { Selection } from "./selection.js";
import { isSignedIn, startSession } from "./session.js";
import { isQuestion, MOST_SELECTED, State } from "./state.js";
import { startThemes } from "./themes.js";
import { Viewer } from "./viewer.js";

const LOOK_EVERY = 20_000; // milliseconds between looks for a newer snapshot

const state = new State();
const [results, grid, histogram, box] = [new Results(), new Grid(), new Histogram(), new QuestionBox()];
const [filters, picture, selection, viewer] = [new Filters(), new Picture(), new Selection(), new Viewer()];
const exporting = new Exporting(results, selection);
let about = null;
let isViewerPushed = false;
let [newest, dismissed] = [0, 0]; // the newest snapshot that was heard of, and at the time its banner was dismissed
let isFocusLost = false; // with the viewer that asked: the first result takes it

// Asking

const body = () => bodyOf(state.now, picture);

function ask() {
  selection.forgetRanks();
  clearBanner("outdated");
  clearBanner("stopped");
  box.showProblem(null);
  const { picture: key } = state.now;
  if (isQuestion(state.now) && !(key && !picture.has(key))) return results.ask(body, { min: state.now.min });
  results.reset();
  grid.clear();
  selection.describe(null);
  if (key) showLostPicture();
  else showStart(about, { ask: (text) => state.ask({ text }), upload: () => byId("upload").click() });
  return Promise.resolve();
}

function showLostPicture() {
  byId("bar").hidden = true;
  const again = action("Give it again", () => byId("upload").click(), { isPrimary: true });
  showState("The picture is not here any more", "A picture of yours is not kept in the page's address: choose, paste or drop it again.", again);
}

// Showing

const showQuestion = () => showAsked(state, box, picture);

function showResults({ isNew = false } = {}) {
  grid.show(results.hits, results.names, results.passes, { isNew });
  grid.mark((id) => selection.has(id));
  histogram.show(results.hits.map((hit) => hit.score), results.min);
  selection.describe(results.hits);
  describe(results, about, state);
}

function showSelection() {
  selection.take(state.now.selected);
  selection.describe(results.answer && results.hits);
  grid.mark((id) => selection.has(id));
  if (viewer.isOpen) viewer.markSelected(selection.has(viewer.imageId));
}

function showViewer() {
  const { image, slot } = state.now;
  if (image === null) {
    isViewerPushed = false;
    viewer.close();
    return;
  }
  const hit = results.hits.find((each) => each.image_id === image) ?? null;
  viewer.show(image, { slot, hit, names: results.names, isSelected: selection.has(image) });
}

/** Say that there is a newer snapshot than the answer's: once, where nothing but its number was heard. */
function showOutdated(snapshot = null) {
  newest = Math.max(newest, snapshot ?? 0);
  if (snapshot !== null && snapshot <= dismissed) return;
  const text = "The index was updated: ask again to search its newest state.";
  showBanner("outdated", text, "Ask again", ask, { dismissed: () => (dismissed = newest) });
}

/** A snapshot that the service has. */
function hearOf(snapshot) {
  if (results.answer && snapshot > results.answer.snapshot_id) showOutdated(snapshot);
}

function focusResults() {
  if (results.hits.length) grid.focus();
  else byId("results").focus();
}

async function lookForNewer() {
  if (document.hidden || !results.answer) return;
  try {
    hearOf((await api.health()).snapshot_id);
  } catch {
    // the next question says what is wrong
  }
}

// What people do

state.addEventListener("change", ({ detail: { before, isAsked } }) => {
  filters.show(state.now);
  if (isAsked) {
    showQuestion();
    ask();
  } else if (before.min !== state.now.min && results.min !== state.now.min) results.moveThreshold(state.now.min);
  if (before.image !== state.now.image || before.slot !== state.now.slot) showViewer();
  if (before.selected !== state.now.selected) showSelection();
});

results.addEventListener("started", () => {
  clearState();
  grid.showSkeletons();
  byId("bar").hidden = false;
  byId("counted").textContent = "Searching…";
  byId("histogram").hidden = true;
  byId("refine").hidden = true;
  byId("legend").replaceChildren();
});
results.addEventListener("answered", () => {
  showResults({ isNew: true });
  if (isFocusLost && document.activeElement === document.body) grid.focus(0);
  isFocusLost = false;
  if (state.now.text) box.remember(state.now.text.trim());
  if (state.now.image !== null) showViewerAnew();
});
results.addEventListener("grew", () => showResults());
results.addEventListener("moved", () => showResults());
results.addEventListener("outdated", () => showOutdated());
results.addEventListener("stopped", ({ detail }) => showBanner("stopped", detail.message, "Try again", () => results.more()));
results.addEventListener("failed", ({ detail }) => {
  grid.clear();
  selection.describe(null);
  isFocusLost = false;
  if (detail.code === "question") box.showProblem(detail);
  showFailure(detail, ask);
});

/** An image that was open before its answer came in gets its names and scores. */
function showViewerAnew() {
  viewer.imageId = null;
  showViewer();
}

grid.addEventListener("open", ({ detail: { hit } }) => {
  isViewerPushed = true;
  state.set({ image: hit.image_id, slot: hit.slot });
});
grid.addEventListener("toggle", ({ detail: { hit, rank } }) => selection.toggle(hit.image_id, rank));
grid.addEventListener("range", ({ detail: { rank } }) => selection.range(results.hits, rank, results.passes));
grid.addEventListener("appended", () => grid.mark((id) => selection.has(id)));
grid.addEventListener("end", () => results.more());

selection.addEventListener("change", ({ detail }) => state.set({ selected: detail }, { replace: true }));
selection.addEventListener("clear", () => {
  if (byId("selection").contains(document.activeElement)) focusResults();
  state.set({ selected: [] }); // an entry of its own: Back brings them again
});
selection.addEventListener("full", () => toast(`At most ${MOST_SELECTED.toLocaleString("en")} images can be selected; an export of the best may have more`));

histogram.addEventListener("move", ({ detail }) => results.moveThreshold(detail));
histogram.addEventListener("wanted", () => results.deepen());
histogram.addEventListener("settle", ({ detail }) => state.set({ min: detail }, { replace: true }));

box.addEventListener("ask", ({ detail: text }) => (text ? (text === state.now.text && results.question ? ask() : state.ask({ text })) : byId("question").focus()));
box.addEventListener("clear", () => state.ask({}));
filters.addEventListener("change", ({ detail }) => state.set({ ...detail, image: null, slot: null }));
picture.addEventListener("ask", ({ detail: key }) => state.ask({ picture: key }));
exporting.addEventListener("outdated", () => showOutdated());
exporting.addEventListener("exported", ({ detail: name }) => toast(`Downloaded ${name}`));

viewer.addEventListener("choose", ({ detail: slot }) => state.set({ slot }, { replace: true }));
viewer.addEventListener("like", ({ detail }) => {
  state.ask(detail);
  isFocusLost = true;
});
viewer.addEventListener("toggle", () => selection.toggle(viewer.imageId));
viewer.addEventListener("known", ({ detail: snapshot }) => hearOf(snapshot));
viewer.addEventListener("move", ({ detail: step }) => {
  const rank = results.shown.findIndex((hit) => hit.image_id === state.now.image) + step;
  const hit = results.shown[rank];
  if (!hit) return;
  state.set({ image: hit.image_id, slot: hit.slot }, { replace: true });
  if (rank + 5 > results.shown.length) results.more();
});
viewer.addEventListener("closed", () => {
  if (state.now.image === null) return;
  const rank = results.hits.findIndex((hit) => hit.image_id === state.now.image);
  if (isViewerPushed) history.back();
  else state.set({ image: null, slot: null }, { replace: true });
  if (rank >= 0) grid.focus(rank);
});

for (const button of document.querySelectorAll("[data-refine]"))
  button.addEventListener("click", () => {
    box.text = `${box.text.trim()}${button.dataset.refine}`;
    box.focus({ end: true });
  });

document.querySelector(".brand").addEventListener("click", (event) => {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  selection.clear(); // an entry of its own here too
  state.ask({ under: "", glob: "", where: "", fold: false, unwanted: null, k: 60 });
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address keeps what is selected
  focusResults();
});

async function start() {
  startSession();
  startThemes();
  startKeys({
    question: () => box.focus(),
    help: () => byId("help").showModal(),
    export: () => exporting.open(),
    filters: () => filters.open(!filters.isOpen),
    all: () => selection.all(results.shown),
    escape: () => selection.clear(),
    grid: () => (results.hits.length ? grid.focus() : document.activeElement.blur()),
  });
  showQuestion();
  filters.show(state.now);
  showSelection();
  try {
    about = await api.about();
  } catch (error) {
    showFailure(error, () => location.reload());
    return;
  }
  showAbout();
  ask();
  if (state.now.image !== null) showViewer();
  setInterval(lookForNewer, LOOK_EVERY);
  document.addEventListener("visibilitychange", lookForNewer);
  if (!isQuestion(state.now) && matchMedia("(hover: hover)").matches) box.focus();
}

function showAbout() {
  box.examples = about.examples ?? [];
  filters.columns = about.columns ?? [];
  byId("sign-out").hidden = !isSignedIn();
  byId("about").textContent = `${about.name}: ${about.num_images.toLocaleString("en")} images, ${about.num_vectors.toLocaleString("en")} objects, snapshot ${about.snapshot_id}, encoder ${about.encoder}.`;
}

start();
