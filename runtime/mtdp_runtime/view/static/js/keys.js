// What can be done, each with its key, its button where it has one, and its line in the help.
import { el, find } from "./dom.js";

const ICONS = {
  in: "M12 5v14M5 12h14", out: "M5 12h14", home: "M4 11l8-7 8 7M6 10v10h12V10",
  turn: "M20 12a8 8 0 1 1-2.6-5.9M20 3v4h-4", map: "M4 5h16v14H4zM13 6v6h6",
  full: "M4 9V4h5M20 9V4h-5M4 15v5h5M20 15v5h-5", panel: "M4 5h16v14H4zM15 5v14", help: "M9 9a3 3 0 1 1 4 2.8c-.8.3-1 .9-1 2.2M12 18v.01",
};

export function bind(actions) {
  const byKey = new Map(actions.flatMap((action) => action.keys.map((key) => [key, action])));
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input:not([type=checkbox]), select, textarea");
    if (event.ctrlKey || event.metaKey || event.altKey || find("help").open || (typing && event.key !== "Escape")) return;
    if (event.key === "Enter" && event.target.closest("button, a")) return;
    const action = byKey.get(event.key);
    if (!action) return;
    event.preventDefault();
    action.run(event.key);
  });
  for (const action of actions.filter((one) => one.icon)) {
    const label = `${action.text} (${action.keys[0]})`;
    find("tools").append(el("button", { class: "icon", title: label, "aria-label": action.text, onclick: () => action.run(action.keys[0]) }, icon(action.icon)));
  }
  help(actions);
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

const SHOWN = { ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓", Escape: "Esc" };

function help(actions) {
  const rows = actions.map((action) => {
    const keys = (action.shown ?? action.keys).flatMap((key) => [el("kbd", {}, SHOWN[key] ?? key), " "]);
    return el("tr", {}, el("td", {}, ...keys), el("td", {}, action.text));
  });
  const mouse = [
    ["Drag, wheel", "move, zoom"], ["Click", "find tiles like this one"], ["Shift + click", "select a tile, or not any more"],
    ["Shift + drag", "select all tiles in a rectangle"],
  ].map(([what, text]) => el("tr", {}, el("td", {}, what), el("td", {}, text)));
  find("help").append(
    el("h2", { id: "help-title" }, "Keyboard and mouse"), el("table", {}, ...rows, ...mouse),
    el("p", {}, el("button", { onclick: () => find("help").close() }, "Close")),
  );
}
