// The slide itself: OpenSeadragon, and the map between the screen and level-0 pixels.
import { pictureUrl, why } from "./server.js";
import { failure } from "./notices.js";

const OSD = window.OpenSeadragon;
const WHITE = "data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACH5BAAAAAAALAAAAAABAAEAAAICRAEAOw==";

export class Stage {
  constructor(element) {
    this.osd = OSD({
      element,
      drawer: "canvas",
      showNavigationControl: false,
      showNavigator: true,
      navigatorPosition: "TOP_LEFT",
      navigatorSizeRatio: 0.17,
      navigatorAutoFade: false,
      animationTime: 0.4,
      springStiffness: 9,
      minZoomImageRatio: 0.7,
      maxZoomPixelRatio: 8,
      visibilityRatio: 0.2,
      imageLoaderLimit: 6,
      maxImageCacheCount: 150,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
      gestureSettingsTouch: { clickToZoom: false, pinchRotate: false },
      gestureSettingsPen: { clickToZoom: false },
    });
    this.facts = null;
    this.unread = []; // boxes in level-0 pixels that cannot be decoded
    this.osd.addHandler("canvas-key", (event) => { event.preventDefaultAction = true; });
    this.osd.addHandler("tile-load-failed", (event) => this.#failed(event.tile));
  }

  async open(number, facts) {
    this.facts = facts;
    this.unread = [];
    const { width, height } = facts;
    const source = facts.there
      ? {
          width, height, tileSize: facts.tile_px, tileOverlap: facts.overlap_px, minLevel: facts.first_level,
          maxLevel: facts.last_level, getTileUrl: (level, x, y) => pictureUrl(number, level, x, y),
        }
      : { width, height, tileSize: Math.max(width, height), minLevel: 0, maxLevel: 0, getTileUrl: () => WHITE };
    await new Promise((done) => {
      this.osd.addOnceHandler("open", done);
      this.osd.open(source);
    });
    this.osd.viewport.setRotation(0, true);
    this.home(true);
  }

  home(now = false) {
    const [x, y, width, height] = this.facts.bounds;
    const side = this.facts.width;
    this.osd.viewport.fitBounds(new OSD.Rect(x / side, y / side, width / side, height / side), now);
  }

  // [a, b, c, d, e, f] for a canvas: level-0 pixels to CSS pixels, as it is drawn now.
  transform() {
    const side = this.facts.width;
    const at = (x, y) => this.osd.viewport.pixelFromPoint(new OSD.Point(x, y), true);
    const [origin, right, down] = [at(0, 0), at(1, 0), at(0, 1)];
    return [
      (right.x - origin.x) / side, (right.y - origin.y) / side, (down.x - origin.x) / side, (down.y - origin.y) / side,
      origin.x, origin.y,
    ];
  }

  level0(position) {
    const point = this.osd.viewport.pointFromPixel(position, true);
    return [point.x * this.facts.width, point.y * this.facts.width];
  }

  // Level-0 pixels to a pixel of the screen, where the view is going to.
  get scale() {
    return this.facts.width / (this.osd.viewport.getContainerSize().x * this.osd.viewport.getZoom());
  }

  get view() {
    const centre = this.osd.viewport.getCenter();
    return {
      x: centre.x * this.facts.width, y: centre.y * this.facts.width, scale: this.scale,
      rotation: this.osd.viewport.getRotation(),
    };
  }

  show({ x, y, scale, rotation }, now = false) {
    const { viewport } = this.osd;
    if (rotation !== undefined) viewport.setRotation(rotation, now);
    if (scale) viewport.zoomTo(this.facts.width / (viewport.getContainerSize().x * scale), null, now);
    if (x !== undefined) viewport.panTo(new OSD.Point(x / this.facts.width, y / this.facts.width), now);
    viewport.applyConstraints(now);
  }

  pan(right, down) {
    const { viewport } = this.osd;
    const size = viewport.getContainerSize();
    viewport.panBy(viewport.deltaPointsFromPixels(new OSD.Point(right * size.x, down * size.y)));
    viewport.applyConstraints();
  }

  zoom(factor) {
    this.osd.viewport.zoomBy(factor);
    this.osd.viewport.applyConstraints();
  }

  rotate(degrees) {
    this.osd.viewport.setRotation(this.osd.viewport.getRotation() + degrees);
  }

  toggleMap() {
    const box = this.osd.navigator.element.parentElement;
    box.hidden = !box.hidden;
  }

  async #failed(tile) {
    const { tile_px: side, last_level: last, there } = this.facts;
    const url = String(tile.getUrl());
    if (!there || tile.level === undefined) return;
    const scale = 2 ** (last - tile.level);
    const error = await why(url);
    if (!error) return;
    this.unread.push([tile.x * side * scale, tile.y * side * scale, side * scale, side * scale]);
    failure(error);
    this.osd.forceRedraw();
  }
}
