// One canvas over the slide; all layers are drawn on it, in their order, whenever the view moves.

export class Overlay {
  constructor(stage) {
    this.stage = stage;
    this.drawers = []; // functions (context, view), bottom first
    this.canvas = document.createElement("canvas");
    this.canvas.className = "overlay";
    stage.osd.canvas.append(this.canvas);
    stage.osd.addHandler("update-viewport", () => this.draw());
    stage.osd.addHandler("resize", () => this.ask());
    this.asked = false;
  }

  // Draw at the next frame, once, however often it is asked for.
  ask() {
    if (this.asked) return;
    this.asked = true;
    requestAnimationFrame(() => {
      this.asked = false;
      this.draw();
    });
  }

  draw() {
    const { canvas, stage } = this;
    if (!stage.facts || !stage.osd.isOpen()) return;
    const dense = window.devicePixelRatio || 1;
    const [width, height] = [stage.osd.canvas.clientWidth, stage.osd.canvas.clientHeight];
    if (canvas.width !== Math.round(width * dense) || canvas.height !== Math.round(height * dense)) {
      canvas.width = Math.round(width * dense);
      canvas.height = Math.round(height * dense);
    }
    const context = canvas.getContext("2d");
    const matrix = stage.transform();
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.setTransform(...matrix.map((value) => value * dense));
    context.imageSmoothingEnabled = false;
    const view = { scale: Math.hypot(matrix[0], matrix[1]), box: this.#box(matrix, width, height) };
    for (const drawer of [...this.drawers, hatch(stage.unread)]) {
      context.save();
      drawer(context, view);
      context.restore();
    }
  }

  // Left, top, right and bottom of what is seen, in level-0 pixels, whatever the rotation.
  #box([a, b, c, d, e, f], width, height) {
    const det = a * d - b * c;
    const corners = [[0, 0], [width, 0], [0, height], [width, height]].map(([x, y]) => [
      (d * (x - e) - c * (y - f)) / det, (a * (y - f) - b * (x - e)) / det,
    ]);
    const [xs, ys] = [corners.map((p) => p[0]), corners.map((p) => p[1])];
    return [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
  }
}

// Nothing is invented where the slide cannot be decoded: hatched, so that nobody takes it for glass.
const hatch = (boxes) => (context, { scale }) => {
  if (!boxes.length) return;
  context.strokeStyle = "#c62828";
  context.lineWidth = 1.5 / scale;
  for (const [x, y, width, height] of boxes) {
    context.save();
    context.beginPath();
    context.rect(x, y, width, height);
    context.clip();
    context.strokeRect(x, y, width, height);
    context.beginPath();
    for (let at = -height; at < width; at += Math.max(16 / scale, width / 40)) {
      context.moveTo(x + at, y + height);
      context.lineTo(x + at + height, y);
    }
    context.stroke();
    context.restore();
  }
};
