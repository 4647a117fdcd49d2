/** Light and dark: as the system says, or as the user chose. */

import { byId, setText } from "./dom.js";

const CHOICES = ["system", "light", "dark"];
const KEPT = "dance_jax.theme";

/** @param {() => void} onChange - pictures must be drawn again */
export function startTheme(onChange) {
  let chosen = kept();
  const apply = () => {
    document.documentElement.dataset.theme = chosen;
    setText(byId("theme-button"), `Theme: ${chosen}`);
    onChange();
  };
  byId("theme-button").addEventListener("click", () => {
    chosen = CHOICES[(CHOICES.indexOf(chosen) + 1) % CHOICES.length];
    keep(chosen);
    apply();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", onChange);
  apply();
}

function kept() {
  try {
    const found = localStorage.getItem(KEPT);
    return CHOICES.includes(found) ? found : "system";
  } catch {
    return "system"; // The browser keeps nothing for this page.
  }
}

function keep(choice) {
  try {
    localStorage.setItem(KEPT, choice);
  } catch {
    // The choice lasts until the page is closed.
  }
}
