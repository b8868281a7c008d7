// Where the tiles of a layer are, and which one is at a place. A cell of the lattice is a pixel of a picture, however many
// tiles there are; tiles that lie on no lattice (a list that somebody gave) are drawn one by one.

const OFF = 0.02; // of a step: what rounding to whole pixels moves a tile, at most

export class Tiles {
  constructor(lattice, coords) {
    Object.assign(this, lattice); // x0, y0, step, side, columns, rows: level-0 pixels
    this.coords = coords; // Int32Array, x and y of each
    this.count = coords.length / 2;
    this.cells = new Int32Array(this.count); // of each tile
    this.at = new Int32Array(this.columns * this.rows).fill(-1); // tile of each cell
    this.regular = this.#onLattice();
    if (!this.regular) this.#inBuckets();
    this.shift = (this.side - this.step) / 2; // where tiles overlap, each cell is the middle of one
  }

  #onLattice() {
    const off = Math.max(2, OFF * this.step);
    for (let row = 0; row < this.count; row++) {
      const [x, y] = [this.coords[2 * row] - this.x0, this.coords[2 * row + 1] - this.y0];
      const [column, line] = [Math.round(x / this.step), Math.round(y / this.step)];
      if (Math.abs(x - column * this.step) > off || Math.abs(y - line * this.step) > off) return false;
      if (column < 0 || line < 0 || column >= this.columns || line >= this.rows) return false;
      const cell = line * this.columns + column;
      if (this.at[cell] >= 0) return false;
      this.cells[row] = cell;
      this.at[cell] = row;
    }
    return true;
  }

  #inBuckets() {
    this.at = null;
    this.buckets = new Map(); // "column,row" of squares as large as a tile, with the tiles that begin there
    for (let row = 0; row < this.count; row++) {
      const key = this.#bucket(this.coords[2 * row], this.coords[2 * row + 1]).join();
      if (!this.buckets.has(key)) this.buckets.set(key, []);
      this.buckets.get(key).push(row);
    }
  }

  #bucket(x, y) {
    return [Math.floor(x / this.side), Math.floor(y / this.side)];
  }

  // The tile whose middle is nearest, -1 where none covers the place.
  find(x, y) {
    const covers = (row) => {
      const [left, top] = [x - this.coords[2 * row], y - this.coords[2 * row + 1]];
      return left >= 0 && top >= 0 && left <= this.side && top <= this.side;
    };
    if (!this.regular) {
      const far = (row) => Math.hypot(x - this.side / 2 - this.coords[2 * row], y - this.side / 2 - this.coords[2 * row + 1]);
      return this.within([x, y, x, y]).filter(covers).reduce((best, row) => (best < 0 || far(row) < far(best) ? row : best), -1);
    }
    const column = Math.round((x - this.side / 2 - this.x0) / this.step);
    const line = Math.round((y - this.side / 2 - this.y0) / this.step);
    if (column < 0 || line < 0 || column >= this.columns || line >= this.rows) return -1;
    const row = this.at[line * this.columns + column];
    return row >= 0 && covers(row) ? row : -1;
  }

  // The tiles that touch a box, and perhaps their neighbours, in no order that means anything.
  within([left, top, right, bottom]) {
    const found = [];
    if (!this.regular) {
      const [from, to] = [this.#bucket(left - this.side, top - this.side), this.#bucket(right, bottom)];
      if ((to[0] - from[0]) * (to[1] - from[1]) > this.buckets.size) return Array.from({ length: this.count }, (_, row) => row);
      for (let line = from[1]; line <= to[1]; line++) {
        for (let column = from[0]; column <= to[0]; column++) found.push(...(this.buckets.get(`${column},${line}`) ?? []));
      }
      return found;
    }
    const from = (value, first) => Math.max(0, Math.floor((value - this.side - first) / this.step));
    const to = (value, first, count) => Math.min(count - 1, Math.ceil((value - first) / this.step));
    for (let line = from(top, this.y0); line <= to(bottom, this.y0, this.rows); line++) {
      for (let column = from(left, this.x0); column <= to(right, this.x0, this.columns); column++) {
        const row = this.at[line * this.columns + column];
        if (row >= 0) found.push(row);
      }
    }
    return found;
  }

  box(row) {
    return [this.coords[2 * row], this.coords[2 * row + 1], this.side, this.side];
  }

  // What `draw` draws; paint(row) gives red, green, blue, alpha in 0..255, or null.
  raster(paint) {
    if (!this.regular) return Array.from({ length: this.count }, (_, row) => css(paint(row)));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, this.columns);
    canvas.height = Math.max(1, this.rows);
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    for (let row = 0; row < this.count; row++) {
      const colour = paint(row);
      if (colour) image.data.set(colour, 4 * this.cells[row]);
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }

  draw(context, raster, { box }) {
    if (this.regular) {
      const [width, height] = [this.columns * this.step, this.rows * this.step];
      context.drawImage(raster, this.x0 + this.shift, this.y0 + this.shift, width, height);
      return;
    }
    for (const row of this.within(box)) {
      if (!raster[row]) continue;
      context.fillStyle = raster[row];
      context.fillRect(...this.box(row));
    }
  }
}

const css = (colour) => colour && `rgba(${colour[0]},${colour[1]},${colour[2]},${colour[3] / 255})`;
