// The layers as a person works with them: on and off, opacity, palette, threshold, and a legend with numbers.
import { el, find, short } from "./dom.js";

const SWATCH = { tissue: "#00875a", grid: "#205cbe", annotations: "#e65100" };

let cards = []; // of the slide that is shown: what brings each up to date

export function showLayers(layers) {
  const made = layers.all.map((layer, number) => card(layers, layer, number));
  cards = made.map(({ refresh }) => refresh);
  find("layers").replaceChildren(...made.map(({ node }) => node));
  if (!made.length) find("layers").append(el("p", {}, "None for this slide."));
  refreshLayers();
}

// What changed is made anew, and nothing else: a control that somebody holds must stay.
export function refreshLayers() {
  for (const refresh of cards) refresh();
}

function card(layers, layer, number) {
  const more = el("div", { class: "more" });
  const check = el("input", {
    type: "checkbox", id: `layer-${number}`, "data-layer": layer.id,
    onchange: () => layers.set(layer, { shown: check.checked }),
  });
  const swatch = SWATCH[layer.kind] ? el("i", { class: "swatch" }) : null;
  if (swatch) swatch.style.background = SWATCH[layer.kind];
  const name = el("label", { class: "name", for: check.id }, check, swatch, el("span", {}, layer.name));
  if (number < 9) name.title = `Key ${number + 1}`;
  let state = null;
  const refresh = () => {
    check.checked = layer.shown;
    more.hidden = !layer.shown;
    const now = JSON.stringify([layer.column, layer.palette, Boolean(layer.data), layer.data?.low, layers.chosen < 0]);
    if (state === now) return;
    state = now;
    more.replaceChildren(slider("Opacity", `Opacity of ${layer.name}`, 0, 1, 0.01, layer.opacity,
      (value) => `${Math.round(value * 100)} %`, (opacity) => layers.set(layer, { opacity })));
    if (layer.kind === "values") more.append(...valueControls(layers, layer));
    if (layer.note) more.append(el("p", { class: "note" }, layer.note));
  };
  return { node: el("div", { class: "layer" }, el("div", { class: "head" }, name), more), refresh };
}

function valueControls(layers, layer) {
  const parts = [];
  if (layer.columns.length > 1) {
    parts.push(choice(layer.id.startsWith("head:") ? "Class" : "Column", `What is shown of ${layer.name}`, layer.columns.map((text, i) => [i, text]), layer.column,
      (value) => layers.set(layer, { column: Number(value) })));
  }
  parts.push(choice("Palette", `Palette of ${layer.name}`, Object.keys(layers.palettes).map((key) => [key, key]),
    layer.palette, (palette) => layers.set(layer, { palette })));
  if (layer.id === "similarity" && layers.chosen < 0) return [el("p", { class: "note" }, "Click a tile on the slide first.")];
  if (!layer.data) return parts;
  const { low, high } = layer.data;
  parts.push(slider("Show from", `Show ${layer.name} from this value`, low, high, (high - low) / 200 || 1,
    layer.threshold ?? low, short, (value) => layers.set(layer, { threshold: value <= low ? null : value })));
  parts.push(legend(layers.palettes[layer.palette], low, high));
  return parts;
}

function slider(text, label, min, max, step, value, say, changed) {
  const output = el("output", {}, say(value));
  const input = el("input", {
    type: "range", min, max, step, "aria-label": label,
    oninput: () => {
      output.value = say(input.valueAsNumber);
      changed(input.valueAsNumber);
    },
  });
  input.value = value;
  return el("div", { class: "line" }, el("span", {}, text), input, output);
}

function choice(text, label, options, value, changed) {
  const select = el("select", { "aria-label": label, onchange: () => changed(select.value) },
    ...options.map(([key, name]) => el("option", { value: key, selected: key === value }, name)));
  return el("div", { class: "line" }, el("span", {}, text), select);
}

function legend(palette, low, high) {
  const canvas = el("canvas", { width: 256, height: 1, role: "img", "aria-label": `Palette from ${short(low)} to ${short(high)}` });
  const context = canvas.getContext("2d");
  const image = context.createImageData(256, 1);
  palette.forEach((colour, i) => image.data.set([...colour, 255], 4 * i));
  context.putImageData(image, 0, 0);
  const numbers = [low, (low + high) / 2, high].map((value) => el("span", {}, short(value)));
  return el("div", { class: "legend" }, canvas, el("div", {}, ...numbers));
}
