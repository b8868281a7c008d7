"""WSInfer's tables, which QuPath reads: a line, or a GeoJSON feature, for each tile (WSInfer 0.6, write_geojson.py).

Columns `minx,miny,width,height` are level-0 pixels, then `prob_<class>` for each class of each head. A model without
heads gives `feature_<i>` columns in the CSV, and tiles with the fraction of tissue in the GeoJSON. A tile that could
not be read has empty values in the CSV, and the name of its status in the GeoJSON.

In the GeoJSON a tile is classified as the class that somebody drew, where classes were given (a column `class` in the
CSV); else as that of the largest probability, where the model has one head: of several heads none speaks for the tile.
The outline of each piece of tissue follows the tiles, as an annotation named Tissue.

The CSV counts from the corner of level 0, as WSInfer does. The GeoJSON counts from the corner of what was scanned
(`openslide.bounds-x`, `-y`), since QuPath shows a slide so, and as a mask that is given is read. For most formats the
two are one.
"""

from __future__ import annotations

import csv
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.store.layout import TileStatus
from mtdp_runtime.store.reader import FeatureFile, open_features
from mtdp_runtime.tiling.outlines import rings

_ROWS: Final = 2048
# Tiles have the same identity each time the file is made.
_NAMESPACE: Final = uuid.UUID("6f9a2f1e-3d5b-4c7e-9a41-1f0c2b7d8e55")


def write_csv(h5: Path, target: Path) -> None:
    """Write one line per tile."""
    with open_features(h5) as file, target.open("w", newline="", encoding="utf-8") as stream:
        names, datasets = probability_columns(file)
        if not datasets:
            names, datasets = [f"feature_{i}" for i in range(file.features.shape[1])], [file.features]
        writer = csv.writer(stream, lineterminator="\n")
        known = file.classes
        writer.writerow(["minx", "miny", "width", "height", *names, *(["class"] if known is not None else [])])
        labels = iter(known or ())
        side = file.tile_side
        for coords, values, _, _ in _rows(file, datasets):
            for (x, y), row in zip(coords.tolist(), values.tolist(), strict=True):
                numbers = ("" if value != value else f"{value:.8g}" for value in row)
                writer.writerow([x, y, side, side, *numbers, *([next(labels)] if known is not None else [])])


def write_geojson(h5: Path, target: Path) -> None:
    """Write a FeatureCollection of tiles, ring order as WSInfer's, and of tissue; no coordinate system is named.

    Coordinates are level-0 pixels from the corner of what was scanned, where the grid begins.
    """
    with open_features(h5) as file, target.open("w", encoding="utf-8") as stream:
        names, datasets = probability_columns(file)
        side = file.tile_side
        bounds, grid = file.fact("bounds"), file.fact("grid")  # files of earlier versions hold only the grid
        corner = np.array(bounds[:2] if bounds else [grid["x0"], grid["y0"]], np.int64)
        stream.write('{"type": "FeatureCollection", "features": [')
        comma = ""
        seen: dict[tuple[int, int], int] = {}  # a list that a user gives may name a place again
        known, labels = file.classes, iter(file.classes or ())
        classes = file.heads[0].class_names if len(file.heads) == 1 else ()
        for coords, values, status, fractions in _rows(file, datasets):
            rows = zip((coords - corner).tolist(), values.tolist(), status.tolist(), fractions.tolist(), strict=True)
            for (x, y), row, code, fraction in rows:
                measured = dict(zip(names, row, strict=True)) if names else {"tissue_fraction": round(fraction, 4)}
                again = seen[x, y] = seen.get((x, y), -1) + 1
                feature = _tile(h5.stem, x, y, side, measured if code == TileStatus.GOOD else {}, again)
                label = next(labels) if known is not None else classes[int(np.argmax(row))] if classes else ""
                if label and (code == TileStatus.GOOD or known is not None):
                    feature["properties"]["classification"] = {"name": label}
                if code != TileStatus.GOOD:
                    feature["properties"]["name"] = TileStatus(code).name.lower()
                stream.write(f"{comma}\n{json.dumps(feature)}")
                comma = ","
        for piece in rings(file.tissue) if file.tissue is not None else ():
            stream.write(f"{comma}\n{json.dumps(_tissue(h5.stem, piece, corner.tolist()))}")
            comma = ","
        stream.write("\n]}\n")


def _tile(slide: str, x: int, y: int, side: int, measurements: dict[str, float], again: int = 0) -> dict[str, Any]:
    right, bottom = x + side, y + side
    ring = [[right, y], [right, bottom], [x, bottom], [x, y], [right, y]]
    return {
        "type": "Feature",
        "id": _id_of(f"{slide} {x} {y}{f' {again}' if again else ''}"),
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"isLocked": True, "measurements": measurements, "objectType": "tile"},
    }


def _tissue(slide: str, piece: list[list[tuple[float, float]]], corner: list[int]) -> dict[str, Any]:
    rings_at = [[[x - corner[0], y - corner[1]] for x, y in ring] for ring in piece]
    return {
        "type": "Feature",
        "id": _id_of(f"{slide} tissue {rings_at[0][0]}"),
        "geometry": {"type": "Polygon", "coordinates": rings_at},
        "properties": {"isLocked": True, "objectType": "annotation", "classification": {"name": "Tissue"}},
    }


def probability_columns(file: FeatureFile) -> tuple[list[str], list[h5py.Dataset]]:
    """Return the columns of probabilities; of several heads, each class carries its head's name."""
    alone = len(file.heads) == 1
    names = [
        f"prob_{label}" if alone else f"prob_{head.task}/{label}" for head in file.heads for label in head.class_names
    ]
    return names, [head.probabilities for head in file.heads]


def _rows(
    file: FeatureFile, datasets: list[h5py.Dataset]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.uint8], NDArray[np.float32]]]:
    count = len(file)
    for start in range(0, count, _ROWS):
        part = slice(start, min(start + _ROWS, count))
        empty = np.empty((part.stop - start, 0), np.float32)
        values = np.concatenate([empty, *(dataset[part] for dataset in datasets)], axis=1)
        yield file.coords[part], values, file.status[part], file.tissue_fraction[part]


def _id_of(what: str) -> str:
    """Return the same identifier for the same text, which may hold a name that is no UTF-8."""
    return str(uuid.uuid5(_NAMESPACE, what.encode("utf-8", "backslashreplace").decode()))
