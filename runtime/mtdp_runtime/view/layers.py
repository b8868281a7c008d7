"""What can be laid over a slide, as plain numbers: the page draws it.

Tiles lie on a lattice: the page draws a cell of it as one pixel of a picture, however many tiles there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.report.colours import BAD, shown_colours
from mtdp_runtime.store.layout import TileStatus
from mtdp_runtime.store.reader import FeatureFile

_MOST_CELLS: Final = 16_000_000  # of a lattice: what a browser holds as one picture
_MOST_OVERLAP: Final = 8  # steps in a side, of tiles that lie on a lattice
PALETTES: Final[Mapping[str, int]] = {  # perceptually uniform; lightness alone tells the value, so nobody is left out
    "viridis": cv2.COLORMAP_VIRIDIS,
    "cividis": cv2.COLORMAP_CIVIDIS,
    "inferno": cv2.COLORMAP_INFERNO,
    "magma": cv2.COLORMAP_MAGMA,
}


@dataclass(frozen=True, slots=True)
class Lattice:
    """Where the tiles of a layer are: a tile at (x, y) is in column round((x - x0) / step) of its row.

    Tiles that somebody listed may lie anywhere; the page sees that, and draws each for itself.
    """

    x0: int  # level-0 pixels, as all here
    y0: int
    step: float
    side: float  # of a tile
    columns: int
    rows: int


@dataclass(frozen=True, slots=True)
class Layer:
    """Something that the page can draw, and where it gets it."""

    id: str
    name: str
    kind: str  # tissue, grid, colours, or values: a number for each tile
    columns: tuple[str, ...] = ()  # of values: one is shown at a time
    low: float | None = None  # ends of the palette, where they do not follow from the values
    high: float | None = None
    tiles: str = "features"  # whose tiles
    note: str = ""


def palettes() -> dict[str, list[list[int]]]:
    """Return 256 colours, RGB, for each palette."""
    ramp = np.arange(256, dtype=np.uint8)
    return {name: cv2.applyColorMap(ramp, code).reshape(256, 3)[:, ::-1].tolist() for name, code in PALETTES.items()}


def lattice_of(file: FeatureFile) -> Lattice:
    """Return where the tiles of a feature file are."""
    grid, attrs = file.fact("grid"), file.tile_attrs
    side = float(attrs["patch_size_level0"])
    if grid is not None and "columns" in grid:
        return Lattice(grid["x0"], grid["y0"], grid["step0"], side, grid["columns"], grid["rows"])
    return lattice_over(file.coords, max(spacing_of(file.coords), side / _MOST_OVERLAP), side)


def lattice_over(coords: NDArray[np.int64], step: float, side: float) -> Lattice:
    """Return the lattice of tiles at int64[N, 2] level-0 x, y, a step apart; coarser where it had too many cells."""
    if not len(coords):
        return Lattice(0, 0, step, side, 0, 0)
    (left, top), (right, bottom) = coords.min(axis=0).tolist(), coords.max(axis=0).tolist()
    while (columns := round((right - left) / step) + 1) * (rows := round((bottom - top) / step) + 1) > _MOST_CELLS:
        step *= 2
    return Lattice(left, top, step, side, columns, rows)


def spacing_of(coords: NDArray[np.int64]) -> float:
    """Return how far apart tiles at int64[N, 2] are: places are rounded, so neighbours differ by a pixel or so.

    >>> spacing_of(np.array([[0, 0], [448, 0], [897, 0], [1793, 448]]))
    448.333
    """
    gaps = np.concatenate([np.diff(np.unique(coords[:, axis])) for axis in (0, 1)]) if len(coords) else np.empty(0)
    gaps = gaps[gaps > 2]
    return float(gaps[gaps <= gaps.min() * 1.1 + 2].mean().round(3)) if len(gaps) else 256.0


def side_of(coords: NDArray[np.int64]) -> float:
    """Return the side of tiles that nobody states: their distance on a lattice, else what covers their area once."""
    spacing = spacing_of(coords)
    if not len(coords):
        return spacing
    cells = (coords - coords.min(axis=0)) / spacing
    if (np.abs(cells - np.rint(cells)).max() * spacing) <= max(2.0, 0.02 * spacing):
        return spacing
    return float(max(spacing, np.sqrt(np.ptp(coords, axis=0).prod() / len(coords)).round()))


def layers_of(file: FeatureFile) -> list[Layer]:
    """Return what a feature file holds that can be drawn."""
    found = []
    if file.tissue is not None:
        found.append(Layer("tissue", "Tissue", "tissue"))
    if len(file):
        bad = int((file.status != TileStatus.GOOD).sum())
        found.append(Layer("grid", "Tiles", "grid", note=f"{bad} could not be read: red" if bad else ""))
    if file.good.any():
        found.append(
            Layer("colours", "Features as colours", "colours", note="Tiles of one colour look alike to the model.")
        )
        found.append(Layer("similarity", "Similarity to the chosen tile", "values", high=1.0))
    found += [
        Layer(f"head:{head.task}", head.task, "values", head.class_names, 0.0, 1.0) for head in file.heads if len(file)
    ]
    return found


def colours_of(file: FeatureFile) -> NDArray[np.uint8]:
    """Return uint8[N, 3] RGB: the colours that the reports of the file's folder have, too; bad tiles are grey."""
    colours = shown_colours(file.path.parent, file)
    return np.full((len(file), 3), BAD, np.uint8) if colours is None else colours.of_file(file)


def values_of(file: FeatureFile, layer: str, column: int) -> NDArray[np.float32]:
    """Return float32[N], one class of a head; NaN for bad tiles.

    Raises:
        LookupError: there is no such layer or column.
    """
    for head in file.heads:
        if layer == f"head:{head.task}" and 0 <= column < len(head.class_names):
            values = np.asarray(head.probabilities[:, column], np.float32)
            values[~file.good] = np.nan
            return values
    raise LookupError(f"no layer {layer}, column {column}")


def as_json(layer: Layer) -> dict[str, Any]:
    """Return a layer as the page reads it."""
    return asdict(layer)
