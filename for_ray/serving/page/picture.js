// The picture that is asked with: chosen, pasted or dropped, with a region of it; it stays in this tab.

import { byId, isWriting } from "./dom.js";
import { RegionDrawing } from "./region.js";

const LARGEST = 2_000_000; // bytes that are sent as they are; more than an encoder sees is made smaller before
const MOST_PIXELS = 25_000_000; // that the service decodes
const SIDE = 1600;

/** A file as the API takes it: base64. */
function base64Of(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result.slice(reader.result.indexOf(",") + 1)));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(blob);
  });
}

/** The picture, smaller where it is large; as it is where this browser cannot read it. */
async function shrunk(blob) {
  try {
    const bitmap = await createImageBitmap(blob);
    if (blob.size <= LARGEST && bitmap.width * bitmap.height <= MOST_PIXELS) return blob;
    const scale = Math.min(1, SIDE / Math.max(bitmap.width, bitmap.height));
    const canvas = new OffscreenCanvas(Math.max(1, Math.round(bitmap.width * scale)), Math.max(1, Math.round(bitmap.height * scale)));
    canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    return await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
  } catch {
    return blob;
  }
}

const visit = Math.random().toString(36).slice(2, 8); // an address of another visit names none of these pictures

/** The pictures of this visit, by key; `ask` events carry the key of the one that is to be looked for. */
export class Picture extends EventTarget {
  #dialog = byId("picture");
  #drawing = new RegionDrawing(this.#dialog.querySelector(".figure"));
  #asked = new Map();
  #encoded = new WeakMap(); // of files: what is sent of them, made once
  #file = null;
  #url = null;

  constructor() {
    super();
    byId("upload").addEventListener("click", () => byId("file").click());
    byId("file").addEventListener("change", (event) => this.#choose(event));
    document.addEventListener("paste", (event) => this.#paste(event));
    this.#listenToDrops();
    this.#listenToDialog();
  }

  /** Whether this tab still has the picture. */
  has(key) {
    return this.#asked.has(key);
  }

  /** Where the page shows it from. */
  urlOf(key) {
    return this.#asked.get(key).url;
  }

  regionOf(key) {
    return this.#asked.get(key).region;
  }

  /** A picture and its region as parts of a question. */
  async bodyOf(key) {
    const { file, region } = this.#asked.get(key);
    if (!this.#encoded.has(file)) this.#encoded.set(file, await base64Of(await shrunk(file)));
    return { image: this.#encoded.get(file), ...(region ? { region } : {}) };
  }

  /** Show a picture that was asked with, to draw on it. */
  reopen(key) {
    const { file, url, region } = this.#asked.get(key);
    this.#open(file, url, region);
  }

  take(file) {
    this.#open(file, URL.createObjectURL(file), null);
  }

  #open(file, url, region) {
    [this.#file, this.#url] = [file, url];
    this.#dialog.querySelector("img").src = url;
    this.#drawing.turn(true);
    this.#drawing.set(region);
    if (!this.#dialog.open) this.#dialog.showModal();
  }

  #ask() {
    const key = `${visit}-${this.#asked.size + 1}`;
    this.#asked.set(key, { file: this.#file, url: this.#url, region: this.#drawing.region });
    this.#dialog.close();
    this.dispatchEvent(new CustomEvent("ask", { detail: key }));
  }

  #choose(event) {
    const [file] = event.target.files;
    if (file) this.take(file);
    event.target.value = ""; // so that the same file can be chosen again
  }

  #paste(event) {
    const file = [...(event.clipboardData?.files ?? [])].find((each) => each.type.startsWith("image/"));
    if (!file || (isWriting(event.target) && event.clipboardData.getData("text/plain"))) return;
    event.preventDefault();
    this.take(file);
  }

  #listenToDrops() {
    const drop = byId("drop");
    const hasFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
    document.addEventListener("dragover", (event) => {
      if (!hasFile(event)) return;
      event.preventDefault();
      drop.hidden = false;
    });
    document.addEventListener("dragleave", (event) => event.relatedTarget === null && (drop.hidden = true));
    document.addEventListener("drop", (event) => {
      if (!hasFile(event)) return;
      event.preventDefault();
      drop.hidden = true;
      const file = [...event.dataTransfer.files].find((each) => each.type.startsWith("image/"));
      if (file) this.take(file);
    });
  }

  #listenToDialog() {
    const button = (name) => this.#dialog.querySelector(`[data-do=${name}]`);
    this.#drawing.addEventListener("change", () => {
      button("whole").hidden = !this.#drawing.region;
      button("ask").textContent = this.#drawing.region ? "Search with this region" : "Search with the whole picture";
    });
    button("whole").addEventListener("click", () => this.#drawing.set(null));
    button("close").addEventListener("click", () => this.#dialog.close());
    button("ask").addEventListener("click", () => this.#ask());
    this.#dialog.querySelector("img").addEventListener("load", ({ target }) =>
      target.closest(".well").style.setProperty("--ratio", target.naturalWidth / target.naturalHeight));
    this.#dialog.addEventListener("keydown", (event) => {
      if (event.key.toLowerCase() === "r" && !event.ctrlKey && !event.metaKey) this.#drawing.begin();
    });
  }
}
