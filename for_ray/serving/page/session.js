// Signing in, where the service asks for a token; the cookie that keeps it is out of the page's reach.

import { signIn, signOut, whenLocked } from "./api.js";
import { byId, kept } from "./dom.js";
import { toast } from "./notices.js";

const SIGNED_IN = "for_ray.signed-in";

/** Ask for the token until the service takes it. */
function unlock() {
  const dialog = byId("token");
  const form = dialog.querySelector("form");
  const problem = form.querySelector(".problem");
  problem.textContent = "";
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    const submit = async (event) => {
      event.preventDefault();
      try {
        await signIn(form.elements.token.value);
      } catch (error) {
        problem.textContent = error.status === 401 ? "That is not the token." : error.message;
        form.elements.token.select();
        return;
      }
      form.removeEventListener("submit", submit);
      form.reset();
      kept.write(SIGNED_IN, true);
      dialog.close();
      resolve();
    };
    form.addEventListener("submit", submit);
  });
}

/** Show the form whenever a token is needed. */
export function startSession() {
  whenLocked(unlock);
  byId("token").addEventListener("cancel", (event) => event.preventDefault()); // nothing works without
  byId("sign-out").addEventListener("click", async () => {
    try {
      await signOut();
    } catch (error) {
      if (error.status !== 401) return toast(error.message); // 401: the session ended before
    }
    kept.write(SIGNED_IN, false);
    location.assign(location.pathname);
  });
}

export const isSignedIn = () => kept.read(SIGNED_IN, false) === true;
