// Keys that work wherever nothing is being written and no dialog is open; `?` lists them.

import { byId, isWriting } from "./dom.js";

const isPlain = (event) => !event.ctrlKey && !event.metaKey && !event.altKey;

/** @param {Object<string, Function>} doing what to do: `question`, `help`, `export`, `filters`, `all`, `escape`, `grid` */
export function startKeys(doing) {
  const actions = { "/": doing.question, "?": doing.help, e: doing.export, f: doing.filters, Escape: doing.escape };
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || document.querySelector("dialog[open]")) return;
    if (isWriting(event.target)) {
      if (event.key === "Escape") doing.grid();
      return;
    }
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "a") doing.all();
    else if (isPlain(event) && event.key in actions) actions[event.key]();
    else if (isPlain(event) && event.key.startsWith("Arrow") && event.target.matches("body, main")) doing.grid();
    else return;
    event.preventDefault();
  });
  byId("keys").addEventListener("click", doing.help);
  byId("help").querySelector("[data-do=close]").addEventListener("click", () => byId("help").close());
}
