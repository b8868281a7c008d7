// The strip of tiles that are most like one: of the slide, and of the run.
import { el, find } from "./dom.js";
import * as server from "./server.js";
import { failure } from "./notices.js";

const AGAIN_MS = 700; // while the run is still being read

export class Similar {
  constructor({ go, select, closed }) {
    Object.assign(this, { go, select, closed });
    this.asked = 0;
  }

  close() {
    this.asked += 1;
    find("similar").hidden = true;
    find("similar").replaceChildren();
    this.closed();
  }

  async show(number, name, row, names) {
    const asked = ++this.asked;
    let told;
    try {
      told = await server.json(number, `similar/${row}`);
    } catch (error) {
      failure(error);
      return;
    }
    if (asked !== this.asked) return;
    const strip = find("similar");
    strip.hidden = false;
    const mine = told.slide.map((one) => ({ ...one, slide: number }));
    strip.replaceChildren(
      el("button", { class: "icon close", "aria-label": "Close the similar tiles", title: "Close (Esc)", onclick: () => this.close() }, "×"),
      this.#band(el("h2", {}, "On this slide"), [{ slide: number, row, cosine: null }, ...mine], names, number,
        el("button", { onclick: () => this.select(told.slide.map((one) => one.row)) }, "Select these")),
    );
    if (told.run) strip.append(this.#run(told.run, names, number, row));
    if (told.run && !told.run.tiles && !told.run.refusal) {
      setTimeout(() => { if (asked === this.asked) this.show(number, name, row, names); }, AGAIN_MS);
    }
  }

  #run(run, names, number, row) {
    const title = el("h2", {}, "In the run");
    if (run.refusal) return el("div", { class: "band" }, title, el("p", {}, run.refusal));
    if (!run.tiles) return el("div", { class: "band" }, title, el("p", {}, `Reading the features: ${run.read} of ${run.files} slides ...`));
    const others = run.found.filter((one) => one.slide !== number || one.row !== row);
    const band = this.#band(title, others, names, number);
    band.dataset.tiles = run.tiles;
    if (run.left_out.length) band.append(el("p", { title: run.left_out.join("\n") }, `${run.left_out.length} slides could not be read`));
    return band;
  }

  #band(title, tiles, names, here, more = null) {
    const items = tiles.map((one) => {
      const where = one.slide === here ? "" : names[one.slide];
      const said = one.cosine === null ? "this tile" : one.cosine.toFixed(3);
      const image = el("img", { src: server.tileUrl(one.slide, one.row), alt: "", loading: "lazy", width: 70, height: 70 });
      const label = `${said}${where ? ` ${where}` : ""}: go to tile ${one.row}`;
      return el("li", {}, el("button", { class: "tile", "aria-label": label, title: label, "data-row": one.row, "data-slide": one.slide,
        onclick: () => this.go(one.slide, one.row) }, image, el("span", {}, said), where ? el("br") : null, where ? el("span", {}, where) : null));
    });
    return el("div", { class: "band" }, title, el("ol", {}, ...items), more);
  }
}
