// Runs before the page is drawn, so that the chosen colours do not flash.
(() => {
  let theme = null;
  try {
    theme = JSON.parse(localStorage.getItem("for_ray.theme"));
  } catch {
    // a browser that keeps nothing follows the system
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
