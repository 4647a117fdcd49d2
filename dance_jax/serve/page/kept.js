/** What the browser keeps for this page. It may refuse to; then values last until the page is closed. */

/** @param {string} store - "localStorage" or "sessionStorage" (of one tab) */
export function kept(store, name) {
  try {
    return window[store].getItem(name) ?? "";
  } catch {
    return "";
  }
}

/** "" removes the value. */
export function keep(store, name, value) {
  try {
    if (value) window[store].setItem(name, value);
    else window[store].removeItem(name);
  } catch {
    // Refused: nothing is kept.
  }
}
