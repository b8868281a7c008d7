// Tiles that somebody chose by hand, and the files that they are saved as.
import { el, find } from "./dom.js";

const EDGE = "#ffb300";
const DARK = "#00000099";

export class Selection {
  constructor(changed) {
    this.changed = changed;
    this.rows = new Set();
    this.tiles = null;
    this.name = "";
  }

  open(name, tiles, corner) {
    Object.assign(this, { name, tiles, corner });
    this.rows.clear();
    this.show();
  }

  toggle(row) {
    if (!this.rows.delete(row)) this.rows.add(row);
    this.show();
  }

  add(rows) {
    for (const row of rows) this.rows.add(row);
    this.show();
  }

  clear() {
    this.rows.clear();
    this.show();
  }

  show() {
    const box = find("selection");
    if (!this.tiles) {
      box.replaceChildren(el("p", {}, "None for this slide: it has no features."));
    } else {
      const count = this.rows.size;
      box.replaceChildren(
        el("p", { id: "selected" }, count ? `${count} tile${count > 1 ? "s" : ""}` : "None. Shift and click, or Shift and drag, on the slide."),
        el("div", { class: "row" },
          el("button", { id: "save-geojson", disabled: !count, onclick: () => save(`${this.name}-tiles.geojson`, this.geojson()) }, "Save GeoJSON"),
          el("button", { id: "save-csv", disabled: !count, onclick: () => save(`${this.name}-tiles.csv`, this.csv()) }, "Save CSV"),
          el("button", { id: "clear", disabled: !count, onclick: () => this.clear() }, "Clear")),
      );
    }
    this.changed();
  }

  // As QuPath reads it: annotations, counted from the corner of what was scanned.
  geojson() {
    const [left, top] = this.corner;
    const features = this.sorted().map((row) => {
      const [x, y, side] = this.tiles.box(row);
      const [x0, y0, x1, y1] = [x - left, y - top, x - left + side, y - top + side];
      const ring = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]];
      const properties = { objectType: "annotation", name: `tile ${row}`, classification: { name: "Selected", color: [255, 179, 0] } };
      return { type: "Feature", geometry: { type: "Polygon", coordinates: [ring] }, properties };
    });
    return JSON.stringify({ type: "FeatureCollection", features });
  }

  // Level-0 pixels, counted from the corner of level 0, as in the feature file.
  csv() {
    const lines = this.sorted().map((row) => [quoted(this.name), row, ...this.tiles.box(row)].join(","));
    return ["slide,row,x,y,width,height", ...lines, ""].join("\n");
  }

  sorted() {
    return [...this.rows].sort((a, b) => a - b);
  }

  draw(context, { scale }) {
    if (!this.tiles || !this.rows.size) return;
    context.beginPath();
    for (const row of this.rows) context.rect(...this.tiles.box(row));
    for (const [colour, width] of [[DARK, 4], [EDGE, 2]]) {
      context.strokeStyle = colour;
      context.lineWidth = width / scale;
      context.stroke();
    }
  }
}

const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

function save(name, text) {
  const link = el("a", { href: URL.createObjectURL(new Blob([text])), download: name.replaceAll("/", "-") });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
