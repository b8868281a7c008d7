"""The pieces of tissue as polygons in level-0 pixels, and the piece to which each tile belongs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.store.reader import PlacedMask

Point = tuple[float, float]


def rings(tissue: PlacedMask) -> Iterator[list[list[Point]]]:
    """Yield the rings of each piece in level-0 pixels: the outer one, then its holes; the last point is the first.

    They run along the edges of the mask's pixels, exactly. A piece hangs together over edges, not over corners, and no
    ring touches itself.
    """
    count, labels, stats, _ = cv2.connectedComponentsWithStats(tissue.mask.astype(np.uint8), connectivity=4)
    for number in range(1, count):
        left, top, width, height, _ = stats[number].tolist()
        piece = labels[top : top + height, left : left + width] == number
        found = sorted(_loops(piece), key=_twice_area, reverse=True)  # in an image's axes the outer one is positive
        x0, y0, scale = tissue.x0 + left * tissue.scale, tissue.y0 + top * tissue.scale, tissue.scale
        yield [[(x0 + x * scale, y0 + y * scale) for x, y in _corners(loop)] for loop in found]


def _loops(piece: NDArray[np.bool_]) -> Iterator[list[tuple[int, int]]]:
    """Yield the closed walks along the edges of a piece, each corner of a pixel at most once in a walk.

    The piece lies to the right of the walk.
    """
    padded = np.pad(piece, 1).astype(np.int8)
    down, across = np.diff(padded, axis=0)[:, 1:-1], np.diff(padded, axis=1)[1:-1]
    steps: dict[tuple[int, int], list[tuple[int, int]]] = {}  # from a corner, where to
    for edges, sign, begin, step in (
        (down, 1, (0, 0), (1, 0)),  # along the top of a pixel to the right
        (across, -1, (0, 0), (0, 1)),  # along its right side down
        (down, -1, (1, 0), (-1, 0)),
        (across, 1, (0, 1), (0, -1)),
    ):
        for y, x in np.argwhere(edges == sign).tolist():
            steps.setdefault((x + begin[0], y + begin[1]), []).append(step)
    while steps:
        walk: list[tuple[int, int]] = []
        at: dict[tuple[int, int], int] = {}
        corner = next(iter(steps))
        while True:
            if corner in at:  # a ring is closed: what follows it begins here
                start = at[corner]
                yield walk[start:]
                for left in walk[start:]:
                    del at[left]
                del walk[start:]
                if not walk and corner not in steps:
                    break
            at[corner] = len(walk)
            walk.append(corner)
            way = steps[corner].pop()  # where two pixels meet at a corner either will do: both turn, so none crosses
            if not steps[corner]:
                del steps[corner]
            corner = (corner[0] + way[0], corner[1] + way[1])


def _twice_area(loop: list[tuple[int, int]]) -> int:
    return sum(x * y1 - x1 * y for (x, y), (x1, y1) in zip(loop, loop[1:] + loop[:1], strict=True))


def _corners(loop: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return only where a walk turns, and its first point again at the end."""
    ways = [(x1 - x, y1 - y) for (x, y), (x1, y1) in zip(loop, loop[1:] + loop[:1], strict=True)]
    turns = [point for point, before, after in zip(loop, [ways[-1], *ways[:-1]], ways, strict=True) if before != after]
    return [*turns, turns[0]]


def pieces(tissue: PlacedMask) -> tuple[NDArray[np.int32], list[Any]]:
    """Return int32[H, W], the number of the piece from 1, 0 on glass, and a shapely polygon of each piece.

    A piece hangs together over edges of pixels, not over corners; its polygon has its holes. Needs shapely.
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
