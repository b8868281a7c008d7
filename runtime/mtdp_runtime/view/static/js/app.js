// The page: one slide at a time, its layers, and the view that the address holds.
import { el, find } from "./dom.js";
import * as hash from "./hash.js";
import * as keys from "./keys.js";
import { Layers } from "./layers.js";
import { showPlace, showScale } from "./measures.js";
import * as notices from "./notices.js";
import { Overlay } from "./overlay.js";
import { refreshLayers, showLayers } from "./panel.js";
import { Selection } from "./selection.js";
import * as server from "./server.js";
import { Similar } from "./similar.js";
import { Stage } from "./stage.js";

const state = { names: [], number: 0, name: "" };
const session = await server.session();
state.names = session.slides.map((slide) => slide.name);

const stage = new Stage(find("slide"));
const overlay = new Overlay(stage);
const layers = new Layers(session.palettes, (loaded) => {
  if (loaded) refreshLayers();
  redraw();
});

const selection = new Selection(() => redraw());
const similar = new Similar({
  go: (number, row) => (number === state.number ? goTo(row) : open(number, {}, row)),
  select: (rows) => selection.add(rows),
  closed: () => { if (layers.chosen >= 0) { layers.choose(-1); refreshLayers(); } },
});
let box = null; // that is being dragged, in level-0 pixels

function redraw() {
  overlay.drawers = [...layers.drawers(), drawChosen, (context, view) => selection.draw(context, view), drawBox];
  overlay.ask();
  remember();
}

function drawChosen(context, { scale }) {
  if (layers.chosen < 0 || !selection.tiles) return;
  for (const [colour, width] of [["#000000cc", 5], ["#ffffff", 2.5]]) {
    context.strokeStyle = colour;
    context.lineWidth = width / scale;
    context.strokeRect(...selection.tiles.box(layers.chosen));
  }
}

function drawBox(context, { scale }) {
  if (!box) return;
  context.strokeStyle = "#ffb300";
  context.lineWidth = 2 / scale;
  context.fillStyle = "#ffb30026";
  const corners = [[box[0], box[1]], [box[2], box[1]], [box[2], box[3]], [box[0], box[3]]];
  context.beginPath();
  corners.forEach((at) => context.lineTo(...at));
  context.closePath();
  context.fill();
  context.stroke();
}

// Find what is like a tile, and compare all with it.
function choose(row) {
  layers.choose(row);
  refreshLayers();
  similar.show(state.number, state.name, row, state.names);
}

function goTo(row) {
  const [x, y, side] = selection.tiles.box(row);
  stage.show({ x: x + side / 2, y: y + side / 2, scale: Math.min(stage.scale, side / 220) });
  choose(row);
}

function at(position) {
  return selection.tiles ? selection.tiles.find(...stage.level0(position)) : -1;
}

let timer = 0;
function remember() {
  clearTimeout(timer);
  timer = setTimeout(() => { if (stage.facts && stage.osd.isOpen()) hash.write(state.name, stage.view, layers.all); }, 150);
}

async function open(number, wanted = {}, row = -1) {
  Object.assign(state, { number, name: state.names[number] });
  notices.clear();
  similar.close();
  selection.open("", null);
  find("title").textContent = state.name;
  document.title = `${state.name} - mtdp-view`;
  find("slide-choice").value = number;
  const described = await server.slide(number);
  if (state.number !== number) return;
  for (const { text, hint, about } of described.notices) notices.notice(text, hint, about === "note");
  showFacts(described);
  layers.open(number, described);
  for (const one of wanted.layers ?? []) {
    const layer = layers.all.find((each) => each.id === one.id);
    if (layer) Object.assign(layer, one, { palette: session.palettes[one.palette] ? one.palette : layer.palette });
  }
  if (wanted.layers) {
    const ids = wanted.layers.map((one) => one.id);
    for (const layer of layers.all) layers.set(layer, { shown: ids.includes(layer.id) });
  }
  showLayers(layers);
  if (!described.slide) {
    stage.osd.close();
    stage.facts = null;
    document.body.dataset.state = "no-slide";
    return;
  }
  await stage.open(number, described.slide);
  if (wanted.x !== undefined) stage.show(wanted, true);
  if (described.features?.tiles) {
    const tiles = await layers.tilesOf({ tiles: "features", lattice: described.features.lattice });
    if (state.number !== number) return;
    selection.open(state.name, tiles, described.slide.bounds);
    if (row >= 0) goTo(row);
  }
  redraw();
  showScale(stage);
  document.body.dataset.state = "open";
}

function showFacts({ slide, features }) {
  const facts = [];
  if (slide) {
    facts.push(["Size", `${slide.width.toLocaleString("en")} × ${slide.height.toLocaleString("en")} px`]);
    facts.push(["Scale", slide.mpp ? `${Number(slide.mpp.toPrecision(5))} µm/px${slide.mpp_source ? ` (${slide.mpp_source})` : ""}` : "not stated by the file"]);
    if (slide.mpp) facts.push(["Extent", `${(slide.width * slide.mpp / 1000).toFixed(1)} × ${(slide.height * slide.mpp / 1000).toFixed(1)} mm`]);
    if (slide.reader) facts.push(["Reader", slide.reader]);
    facts.push(["File", slide.path]);
  }
  if (features) {
    facts.push(["Tiles", `${features.tiles.toLocaleString("en")} of ${features.tile_px} px${features.mpp ? ` at ${features.mpp} µm/px` : ""}`]);
    facts.push(["Features", `${features.dimensions} numbers a tile, of ${features.model}`], ["In", features.path]);
  }
  find("facts").replaceChildren(...facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

function middle() {
  const { x, y } = stage.view;
  return selection.tiles ? selection.tiles.find(x, y) : -1;
}

function another(by) {
  const number = state.number + by;
  if (number >= 0 && number < state.names.length) open(number);
}

const STEP = 0.2; // of the window
keys.bind([
  { keys: ["+", "="], shown: ["+"], text: "Zoom in", icon: "in", run: () => stage.zoom(1.5) },
  { keys: ["-"], text: "Zoom out", icon: "out", run: () => stage.zoom(1 / 1.5) },
  { keys: ["0"], text: "Whole slide", icon: "home", run: () => stage.home() },
  { keys: ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"], text: "Move",
    run: (key) => stage.pan(...{ ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] }[key]) },
  { keys: ["r"], text: "Rotate by 90° to the right", icon: "turn", run: () => stage.rotate(90) },
  { keys: ["R"], text: "Rotate by 90° to the left", run: () => stage.rotate(-90) },
  { keys: ["1", "2", "3", "4", "5", "6", "7", "8", "9"], shown: ["1", "…", "9"], text: "Show or hide a layer",
    run: (key) => { const layer = layers.all[Number(key) - 1]; if (layer) { layers.set(layer, { shown: !layer.shown }); refreshLayers(); } } },
  { keys: ["Enter"], text: "Find tiles like the one in the middle", run: () => { const row = middle(); if (row >= 0) choose(row); } },
  { keys: ["x"], text: "Select the tile in the middle, or not any more", run: () => { const row = middle(); if (row >= 0) selection.toggle(row); } },
  { keys: ["Escape"], text: "Close the similar tiles, then clear the selection",
    run: () => (find("similar").hidden ? selection.clear() : similar.close()) },
  { keys: ["n"], text: "Next slide", run: () => another(1) },
  { keys: ["p"], text: "Previous slide", run: () => another(-1) },
  { keys: ["m"], text: "Mini-map", icon: "map", run: () => stage.toggleMap() },
  { keys: ["l"], text: "Side panel", icon: "panel", run: () => document.body.classList.toggle("no-panel") },
  { keys: ["f"], text: "Full screen", icon: "full",
    run: () => (document.fullscreenElement ? document.exitFullscreen() : document.documentElement.requestFullscreen().catch(() => {})) },
  { keys: ["?"], text: "This help", icon: "help", run: () => find("help").showModal() },
]);

find("slide-choice").append(...state.names.map((name, number) => el("option", { value: number }, name)));
find("slide-choice").addEventListener("change", (event) => open(Number(event.target.value)));
find("slides").hidden = state.names.length < 2;
find("layers").addEventListener("change", (event) => { if (event.target.matches("[type=checkbox], select")) refreshLayers(); });
for (const event of ["update-viewport", "resize"]) stage.osd.addHandler(event, () => { if (stage.facts) { showScale(stage); remember(); } });
new window.OpenSeadragon.MouseTracker({
  element: stage.osd.canvas.parentElement,
  moveHandler: (event) => { if (stage.facts) showPlace(stage, event.position); },
});
stage.osd.addHandler("canvas-click", (event) => {
  if (!event.quick) return;
  const row = at(event.position);
  if (row < 0) return;
  if (event.originalEvent.shiftKey) selection.toggle(row);
  else choose(row);
});
stage.osd.addHandler("canvas-drag", (event) => {
  if (!selection.tiles || !(box || event.originalEvent.shiftKey)) return;
  event.preventDefaultAction = true;
  const [x, y] = stage.level0(event.position);
  const from = event.position.minus(event.delta);
  box ??= [...stage.level0(from), x, y];
  box.splice(2, 2, x, y);
  overlay.ask();
});
stage.osd.addHandler("canvas-drag-end", () => {
  if (!box) return;
  const [left, right] = [Math.min(box[0], box[2]), Math.max(box[0], box[2])];
  const [top, bottom] = [Math.min(box[1], box[3]), Math.max(box[1], box[3])];
  selection.add(selection.tiles.within([left, top, right, bottom]).filter((row) => {
    const [x, y, side] = selection.tiles.box(row);
    return x + side / 2 >= left && x + side / 2 <= right && y + side / 2 >= top && y + side / 2 <= bottom;
  }));
  box = null;
  overlay.ask();
});
window.addEventListener("hashchange", () => {
  const wanted = hash.read();
  const number = Math.max(0, state.names.indexOf(wanted.slide));
  if (number !== state.number) open(number, wanted);
  else if (wanted.x !== undefined) stage.show(wanted);
});

const wanted = hash.read();
await open(Math.max(0, state.names.indexOf(wanted.slide)), wanted);
window.mtdpView = { stage, layers, state, selection }; // for whoever automates the page
