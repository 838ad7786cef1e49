// What is said instead of results, or above them.

import { byId, el, icon, sentence } from "./dom.js";

/** Instead of results: a title, a line, and what can be done. */
export function showState(title, line = "", ...actions) {
  const parts = [el("h2", {}, title)];
  if (line) parts.push(el("p", {}, line));
  if (actions.length) parts.push(el("div", { class: "actions" }, ...actions));
  byId("state").replaceChildren(...parts);
}

export function clearState() {
  byId("state").replaceChildren();
}

/** A button that does something. */
export function action(text, listener, { isPrimary = false } = {}) {
  return el("button", { type: "button", class: isPrimary ? "primary" : "plain", on: { click: listener } }, text);
}

/**
 * A line above the results, with one thing to do; another of the same kind takes its place, the same one stays as it
 * is: it keeps the focus, and is not read out again.
 */
export function showBanner(kind, text, doText, listener, { dismissed = () => {} } = {}) {
  if (bannerOf(kind)?.querySelector("p").textContent === sentence(text)) return;
  clearBanner(kind);
  const leave = () => {
    clearBanner(kind);
    byId("results").focus();
  };
  const dismiss = () => {
    leave();
    dismissed();
  };
  const close = el("button", { type: "button", class: "tool", "aria-label": "Dismiss", on: { click: dismiss } }, icon("close"));
  const act = action(doText, () => {
    leave();
    listener();
  }, { isPrimary: true });
  byId("notices").append(el("div", { class: `banner ${kind}`, role: "status", data: { kind } }, el("p", {}, sentence(text)), act, close));
}

export function clearBanner(kind) {
  bannerOf(kind)?.remove();
}

const bannerOf = (kind) => byId("notices").querySelector(`[data-kind=${kind}]`);

/** A few words that go by themselves; in the dialog that is open, as it hides all else. */
export function toast(text) {
  const line = el("p", { class: "toast", role: "status" }, text);
  ([...document.querySelectorAll("dialog[open]")].at(-1) ?? document.body).append(line);
  setTimeout(() => line.remove(), 4000);
}
