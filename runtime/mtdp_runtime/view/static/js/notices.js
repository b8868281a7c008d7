// What is not as it should be, in words.
import { el, find } from "./dom.js";

const seen = new Set();

export function clear() {
  seen.clear();
  find("notices").replaceChildren();
}

export function notice(text, hint = "", calm = false) {
  if (seen.has(text)) return;
  seen.add(text);
  const box = el("div", { class: calm ? "notice calm" : "notice" }, calm ? el("span", {}, text) : el("b", {}, text));
  if (hint) box.append(el("span", {}, hint));
  find("notices").append(box);
}

export const failure = (error) => notice(error.message, error.hint ?? "");
