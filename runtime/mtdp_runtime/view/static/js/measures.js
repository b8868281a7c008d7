// The scale bar, and where the pointer is, in level-0 pixels and in micrometres.
import { find, short } from "./dom.js";

const NICE = [1, 2, 5];
const MOST_PX = 160;

export function showScale(stage) {
  const { mpp } = stage.facts;
  const unit = mpp ?? 1; // without a scale the bar is in pixels, and says so
  const most = MOST_PX * stage.scale * unit;
  const power = 10 ** Math.floor(Math.log10(most));
  const length = Math.max(...NICE.map((n) => n * power).filter((n) => n <= most), power);
  const bar = find("scale-bar");
  bar.querySelector("span").textContent = mpp ? (length >= 1000 ? `${length / 1000} mm` : `${length} µm`) : `${length} px`;
  bar.querySelector("i").style.width = `${length / unit / stage.scale}px`;
}

export function showPlace(stage, position) {
  const [x, y] = stage.level0(position).map(Math.round);
  const { mpp, width, height } = stage.facts;
  const inside = x >= 0 && y >= 0 && x < width && y < height;
  const um = mpp ? `  ·  ${short(x * mpp)}, ${short(y * mpp)} µm` : "  ·  no scale known";
  find("place").value = inside ? `${x.toLocaleString("en")}, ${y.toLocaleString("en")} px${um}` : "";
}
