// The service's HTTP API; every failure is an ApiError with one line to show.

export class ApiError extends Error {
  /** @param {{code?: string, position?: number|null, status?: number}} about as the service says it */
  constructor(message, { code = "", position = null, status = 0 } = {}) {
    super(message);
    Object.assign(this, { code, position, status });
  }
}

let unlock = null;
let unlocking = null;

/** What to do when a token is needed; resolves when there is a session. */
export function whenLocked(ask) {
  unlock = ask;
}

const absolute = (path) => new URL(path, document.baseURI);

async function call(path, options = {}) {
  const response = await send(path, options);
  if (response.ok) return response;
  const error = await failure(response);
  if (error.status === 401 && unlock && !options.isLogin) {
    unlocking ??= unlock().finally(() => (unlocking = null));
    await unlocking;
    return call(path, options);
  }
  throw error;
}

async function send(path, { method = "GET", body, signal }) {
  const content = body === undefined ? {} : { body: JSON.stringify(body), headers: { "Content-Type": "application/json" } };
  try {
    return await fetch(absolute(path), { method, signal, credentials: "same-origin", ...content });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The service does not answer: check that it runs, and try again.", { code: "network" });
  }
}

async function failure(response) {
  let said = {};
  try {
    said = await response.json();
  } catch {
    // a proxy's own page
  }
  const wait = response.headers.get("Retry-After");
  const more = response.status === 429 && wait ? ` Try again in ${wait} s.` : "";
  const message = (said.error || `The service answered with ${response.status}.`) + more;
  return new ApiError(message, { code: said.code, position: said.position ?? null, status: response.status });
}

export const about = async () => (await call("about")).json();
export const health = async () => (await call("healthz")).json();

/** Ask: the body of POST /search. */
export const search = async (question, signal) => (await call("search", { method: "POST", body: question, signal })).json();

/** What the index knows of an image: its slots and columns. */
export const objectsOf = async (imageId, signal) => (await call(`images/${imageId}/objects`, { signal })).json();

export const imageUrl = (imageId) => absolute(`images/${imageId}`).href;
export const thumbnailUrl = (imageId, side) => absolute(`thumbnails/${imageId}?side=${side}`).href;

/** Why a picture did not come, in one line; null where it comes now: the reason of an `img` is known to nobody else. */
export async function whyMissing(url) {
  try {
    const response = await call(url);
    await response.body?.cancel();
    return null;
  } catch (error) {
    return error.message;
  }
}

/** Export hits; the file and the name that the service gives it. */
export async function exportHits(body) {
  const response = await call("export", { method: "POST", body });
  const named = /filename="?([^";]+)"?/.exec(response.headers.get("Content-Disposition") ?? "");
  return { blob: await response.blob(), name: named ? named[1] : `hits.${body.format === "coco" ? "json" : body.format}` };
}

export const signIn = (token) => call("session", { method: "POST", body: { token }, isLogin: true });
export const signOut = () => call("session", { method: "DELETE", isLogin: true });
