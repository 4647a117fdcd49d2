/** Light and dark: as the system says, or as the user chose. */

import { byId, setText } from "./dom.js";
import { keep, kept } from "./kept.js";

const CHOICES = ["system", "light", "dark"];
const KEPT = ["localStorage", "dance_jax.theme"];

/** @param {() => void} onChange - pictures must be drawn again */
export function startTheme(onChange) {
  let at = Math.max(0, CHOICES.indexOf(kept(...KEPT)));
  const apply = () => {
    document.documentElement.dataset.theme = CHOICES[at];
    setText(byId("theme-button"), `Theme: ${CHOICES[at]}`);
    onChange();
  };
  byId("theme-button").addEventListener("click", () => {
    at = (at + 1) % CHOICES.length;
    keep(...KEPT, CHOICES[at]);
    apply();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", onChange);
  apply();
}
