// Elements from data: texts become text nodes, never markup.

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/**
 * Make an element.
 *
 * @param {string} tag
 * @param {object} attributes `class`, `on` ({event: listener}), `data` ({name: value}); true and false set and
 *   leave out an attribute, everything else is its text.
 * @param {...(Node|string)} children strings become text nodes
 */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name === "data") Object.assign(element.dataset, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** One of the symbols that stand at the top of the page. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.classList.add("icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** Put an element where a box (x0, y0, x1, y1, fractions) lies in its positioned parent. */
export function placeBox(element, [x0, y0, x1, y1]) {
  element.style.left = `${x0 * 100}%`;
  element.style.top = `${y0 * 100}%`;
  element.style.width = `${(x1 - x0) * 100}%`;
  element.style.height = `${(y1 - y0) * 100}%`;
}

/** Have a screen reader say it. */
export function announce(text) {
  byId("live").textContent = text;
}

/** Whether keys go into a text that is being written. */
export function isWriting(target) {
  return target instanceof Element && target.matches("input:not([type=checkbox]):not([type=radio]), textarea, select");
}

/** A line of the service as a sentence of the page. */
export function sentence(line) {
  const text = line.split("\n")[0].trim();
  return text && text[0].toUpperCase() + text.slice(1) + (/[.!?…]$/.test(text) ? "" : ".");
}

/** The last part of a uri. */
export const fileName = (uri) => uri.replace(/\/+$/, "").split("/").pop() || uri;

export const NUM_COLOURS = 8;

/** The class of a name's colour; the one colour where the question has no names. */
export const colourOf = (names, name) => `colour-${Math.max(names.indexOf(name), 0) % NUM_COLOURS}`;

/** What a browser keeps between visits; one that keeps nothing gives the fallback. */
export const kept = {
  read(key, fallback) {
    try {
      return JSON.parse(localStorage.getItem(key)) ?? fallback;
    } catch {
      return fallback;
    }
  },
  write(key, value) {
    try {
      localStorage.setItem(key, JSON.stringify(value));
    } catch {
      // private windows refuse
    }
  },
};
