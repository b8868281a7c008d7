"""The pieces of tissue as polygons in level-0 pixels, and the piece to which each tile belongs. Needs shapely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class PlacedMask:
    """bool[H, W]; a pixel covers scale x scale level-0 pixels, the first at (x0, y0)."""

    mask: NDArray[np.bool_]
    scale: float
    x0: float
    y0: float


def pieces(tissue: PlacedMask) -> tuple[NDArray[np.int32], list[Any]]:
    """Return int32[H, W], the number of the piece from 1, 0 on glass, and a shapely polygon of each piece.

    A piece hangs together over edges of pixels, not over corners; its polygon has its holes.
    """
    count, labels, stats, _ = cv2.connectedComponentsWithStats(tissue.mask.astype(np.uint8), connectivity=4)
    polygons = []
    for number in range(1, count):
        left, top, width, height, _ = stats[number].tolist()
        piece = labels[top : top + height, left : left + width] == number
        x0, y0 = tissue.x0 + left * tissue.scale, tissue.y0 + top * tissue.scale
        polygons.append(_outline(piece, tissue.scale, x0, y0))
    return labels, polygons


def piece_of_tiles(
    labels: NDArray[np.int32], tissue: PlacedMask, coords: NDArray[np.int64], tile0: float
) -> NDArray[np.int64]:
    """Return int64[N]: the number of the piece, from 0, that covers most of each tile; -1 where none does."""
    numbers = np.full(len(coords), -1, np.int64)
    starts = np.floor((coords - (tissue.x0, tissue.y0)) / tissue.scale).astype(int).clip(0)
    ends = np.ceil((coords + tile0 - (tissue.x0, tissue.y0)) / tissue.scale).astype(int)
    for tile, ((left, top), (right, bottom)) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        inside = labels[top:bottom, left:right]
        inside = inside[inside > 0]
        if inside.size:
            numbers[tile] = np.bincount(inside).argmax() - 1
    return numbers


def _outline(piece: NDArray[np.bool_], scale: float, x0: float, y0: float) -> Any:
    """Return the union of a piece's pixels, exactly."""
    import shapely

    edges = np.diff(np.pad(piece, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)  # a box for each run of pixels in a row
    _, ends = np.nonzero(edges == -1)
    boxes = shapely.box(x0 + starts * scale, y0 + rows * scale, x0 + ends * scale, y0 + (rows + 1) * scale)
    return shapely.union_all(boxes)
