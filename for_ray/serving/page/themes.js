// Light, dark, or as the system has it.

import { announce, byId, kept } from "./dom.js";

const ORDER = ["system", "light", "dark"];
const SAID = { system: "as the system", light: "light", dark: "dark" };

function apply(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").setAttribute("aria-label", `Colours: ${SAID[theme]}`);
  byId("theme").title = `Colours: ${SAID[theme]}`;
}

/** A button that goes from one to the next; `theme.js` reads what it keeps. */
export function startThemes() {
  apply(document.documentElement.dataset.theme ?? "system");
  byId("theme").addEventListener("click", () => {
    const now = document.documentElement.dataset.theme ?? "system";
    const next = ORDER[(ORDER.indexOf(now) + 1) % ORDER.length];
    apply(next);
    announce(`Colours: ${SAID[next]}`);
    kept.write("for_ray.theme", next);
  });
}
