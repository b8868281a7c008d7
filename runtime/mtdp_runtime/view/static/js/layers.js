// The layers of a slide: what each is, how it is shown, and how it is drawn.
import * as server from "./server.js";
import { failure } from "./notices.js";
import { Tiles } from "./tiles.js";

const TISSUE = "#00875a";
const GRID = [32, 92, 190];
const BAD = [214, 40, 40];
const MOST_FILLED = 500; // areas of one colour: beyond it their edges say enough
const ANNOTATION = "#e65100";
const OUTLINES_FROM_PX = 7; // on the screen: below it tiles are areas, above it outlines

export class Layers {
  constructor(palettes, changed) {
    this.palettes = palettes;
    this.changed = changed; // called when something is to be drawn again
    this.all = [];
    this.number = 0;
  }

  open(number, described) {
    this.number = number;
    this.corner = described.slide?.bounds ?? [0, 0];
    this.chosen = -1; // the tile that others are compared with
    this.tiles = new Map(); // by whose they are: "features", ...
    this.all = described.layers.map((layer) => ({
      ...layer,
      lattice: layer.lattice ?? described.features?.lattice,
      shown: ["tissue", "annotations"].includes(layer.kind),
      opacity: layer.kind === "values" || layer.kind === "colours" ? 0.65 : 0.9,
      palette: "viridis",
      threshold: null,
      column: 0,
      data: null,
      raster: null,
    }));
    for (const layer of this.all) this.#load(layer);
  }

  // Change how a layer is shown, and show it so.
  set(layer, change) {
    Object.assign(layer, change);
    if ("column" in change) Object.assign(layer, { data: null, threshold: null, stale: Boolean(layer.loading) });
    if ("column" in change || "palette" in change || "threshold" in change) layer.raster = null;
    this.#load(layer);
    this.changed();
  }

  // Compare with another tile from now on.
  choose(row) {
    this.chosen = row;
    const layer = this.all.find((one) => one.id === "similarity");
    if (layer) this.set(layer, { column: row, opacity: layer.opacity });
  }

  async tilesOf(layer) {
    if (!this.tiles.has(layer.tiles)) {
      const [number, whose] = [this.number, layer.tiles];
      this.tiles.set(whose, server.numbers(number, `tiles/${whose}`, Int32Array).then((xy) => new Tiles(layer.lattice, xy)));
    }
    return this.tiles.get(layer.tiles);
  }

  async #load(layer) {
    if (!layer.shown || layer.data || layer.loading) return;
    if (layer.id === "similarity" && this.chosen < 0) return;
    layer.loading = true;
    const number = this.number;
    try {
      const data = await this.#fetch(layer, number);
      if (number === this.number && this.all.includes(layer)) layer.data = data;
    } catch (error) {
      failure(error);
      layer.shown = false;
    }
    layer.loading = false;
    this.changed(true);
    if (layer.stale) this.#load(Object.assign(layer, { stale: false, data: null, raster: null }));
  }

  async #fetch(layer, number) {
    if (layer.kind === "tissue") {
      const path = new Path2D();
      for (const ring of (await server.json(number, "tissue")).flat()) {
        ring.forEach(([x, y], i) => (i ? path.lineTo(x, y) : path.moveTo(x, y)));
        path.closePath();
      }
      return { path };
    }
    if (layer.kind === "annotations") return outlines(await server.json(number, `annotations/${layer.id.split(":")[1]}`), this.corner);
    const tiles = await this.tilesOf(layer);
    if (layer.kind === "grid") return { tiles, bad: await server.numbers(number, "status", Uint8Array) };
    if (layer.kind === "colours") return { tiles, colours: await server.numbers(number, "colours", Uint8Array) };
    const what = layer.id === "similarity" ? `similarity/${this.chosen}` : `values/${encodeURIComponent(layer.id)}/${layer.column}`;
    const values = await server.numbers(number, what, Float32Array);
    let [low, high] = [Infinity, -Infinity];
    for (const value of values) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
    return { tiles, values, low: layer.low ?? low, high: layer.high ?? high };
  }

  drawers() {
    return this.all
      .filter((layer) => layer.shown && layer.data)
      .map((layer) => (context, view) => {
        context.globalAlpha = layer.opacity;
        DRAW[layer.kind](context, view, layer, this.palettes);
      });
  }
}

// GeoJSON as lines and areas with the colour of their class; QuPath counts from the corner of what was scanned.
function outlines(document, [left, top]) {
  const found = new Map(); // by colour
  const of = (colour) => {
    if (!found.has(colour)) found.set(colour, { edges: new Path2D(), areas: [], points: [] });
    return found.get(colour);
  };
  const point = ([x, y]) => [x + left, y + top];
  const walk = (node, colour) => {
    if (Array.isArray(node)) return node.forEach((one) => walk(one, colour));
    const { type, geometry, properties, features, geometries, coordinates: at } = node;
    const own = properties?.classification?.color ?? properties?.color;
    const drawn = Array.isArray(own) ? `rgb(${own})` : colour;
    if (features) return walk(features, drawn);
    if (geometry) walk(geometry, drawn);
    if (properties?.childObjects) walk(properties.childObjects, colour);
    if (geometries) return walk(geometries, drawn);
    const paths = { Polygon: [at], MultiPolygon: at, LineString: [[at]], MultiLineString: [at], Point: [], MultiPoint: [] }[type] ?? [];
    for (const rings of paths) {
      const path = new Path2D();
      for (const ring of rings) ring.map(point).forEach(([x, y], i) => (i ? path.lineTo(x, y) : path.moveTo(x, y)));
      of(drawn).edges.addPath(path);
      if (type.endsWith("Polygon")) of(drawn).areas.push(path);
    }
    for (const one of { Point: [at], MultiPoint: at }[type] ?? []) of(drawn).points.push(point(one));
  };
  walk(document, ANNOTATION);
  return found;
}

const DRAW = {
  annotations(context, { scale }, { data }) {
    for (const [colour, { edges, areas, points }] of data) {
      context.strokeStyle = colour;
      context.fillStyle = colour;
      context.lineWidth = 2.5 / scale;
      context.stroke(edges);
      for (const [x, y] of points) {
        context.beginPath();
        context.arc(x, y, 5 / scale, 0, 2 * Math.PI);
        context.fill();
      }
      if (areas.length > MOST_FILLED) continue;
      context.save();
      context.globalAlpha *= 0.1;
      for (const path of areas) context.fill(path, "evenodd");
      context.restore();
    }
  },

  colours(context, view, layer) {
    const { tiles, colours } = layer.data;
    layer.raster ??= tiles.raster((row) => [...colours.subarray(3 * row, 3 * row + 3), 255]);
    tiles.draw(context, layer.raster, view);
  },

  tissue(context, { scale }, { data }) {
    context.strokeStyle = TISSUE;
    context.fillStyle = "#00875a1c";
    context.lineWidth = 2 / scale;
    context.lineJoin = "round";
    context.fill(data.path, "evenodd");
    context.stroke(data.path);
  },

  grid(context, view, layer) {
    const { tiles, bad } = layer.data;
    const { scale, box } = view;
    if (tiles.step * scale < OUTLINES_FROM_PX) {
      layer.raster ??= tiles.raster((row) => (bad[row] ? [...BAD, 230] : [...GRID, 105]));
      tiles.draw(context, layer.raster, view);
      return;
    }
    context.lineWidth = 1 / scale;
    for (const wrong of [0, 1]) {
      context.strokeStyle = `rgb(${wrong ? BAD : GRID})`;
      context.beginPath();
      for (const row of tiles.within(box)) if (bad[row] === wrong) context.rect(...tiles.box(row));
      context.stroke();
    }
  },

  values(context, view, layer, palettes) {
    const { tiles, values, low, high } = layer.data;
    const palette = palettes[layer.palette];
    const least = layer.threshold ?? -Infinity;
    layer.raster ??= tiles.raster((row) => {
      const value = values[row];
      if (!(value >= least)) return null; // not a number: a bad tile
      const place = high > low ? (value - low) / (high - low) : 0.5;
      return [...palette[Math.round(255 * Math.min(1, Math.max(0, place)))], 255];
    });
    tiles.draw(context, layer.raster, view);
  },
};
