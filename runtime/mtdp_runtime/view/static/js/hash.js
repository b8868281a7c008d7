// The address holds the view: slide, place, scale, rotation, and the layers that are shown.

export function read() {
  const fields = new URLSearchParams(location.hash.slice(1));
  const number = (name) => (fields.has(name) && Number.isFinite(Number(fields.get(name))) ? Number(fields.get(name)) : undefined);
  const layers = (fields.get("layers") ?? "").split(",").filter(Boolean).map((text) => {
    const [id, opacity, palette, threshold, column] = text.split("~");
    return {
      id: decodeURIComponent(id), opacity: Number(opacity) || 0, palette, column: Number(column) || 0,
      threshold: threshold ? Number(threshold) : null,
    };
  });
  return {
    slide: fields.get("slide"), x: number("x"), y: number("y"), scale: number("scale"), rotation: number("rotation"),
    layers: fields.has("layers") ? layers : null,
  };
}

export function write(name, view, layers) {
  const fields = new URLSearchParams({
    slide: name, x: Math.round(view.x), y: Math.round(view.y), scale: Number(view.scale.toPrecision(5)),
  });
  const rotation = Math.round(((view.rotation % 360) + 360) % 360);
  if (rotation) fields.set("rotation", rotation);
  fields.set("layers", layers.filter((layer) => layer.shown).map((layer) => [
    encodeURIComponent(layer.id), layer.opacity, layer.palette, layer.threshold ?? "", layer.column,
  ].join("~")).join(","));
  history.replaceState(null, "", `#${fields}`);
}
