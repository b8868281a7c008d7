"""Square windows in an image: grids, shares of a mask, and samples around objects (the paper's supplement).

All coordinates are pixels of the source image; a window is (x, y) of its top left corner and a side. A window never
reaches over the border: nothing is padded.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Point = tuple[float, float]  # (x, y)
Corner = tuple[int, int]

# The paper says "random shift" and no more. A quarter of the side keeps the object's centre in the middle half of the
# window, so that a training crop seldom cuts it off; at a border, a sixteenth is left around it.
SHIFT_SHARE = 1 / 4
MARGIN_SHARE = 1 / 16
WINDOWS_AN_OBJECT = 10
_DRAWS_A_WINDOW = 20


def grid(width: int, height: int, side: int, stride: int) -> list[Corner]:
    """Windows from the top left corner on, row by row; what is left over at the right and below is dropped.

    >>> grid(5, 4, 2, 2)
    [(0, 0), (2, 0), (0, 2), (2, 2)]
    """
    return [(x, y) for y in range(0, height - side + 1, stride) for x in range(0, width - side + 1, stride)]


def cover(width: int, height: int, side: int) -> list[Corner]:
    """As few windows as hold every pixel: the last column and row are flush with the border, and so overlap.

    >>> cover(5, 4, 2)
    [(0, 0), (2, 0), (3, 0), (0, 2), (2, 2), (3, 2)]
    """
    return [(x, y) for y in _flush(height, side) for x in _flush(width, side)]


def _flush(length: int, side: int) -> list[int]:
    starts = list(range(0, length - side + 1, side))
    if starts and starts[-1] + side < length:
        starts.append(length - side)
    return starts


def shares(mask: NDArray[np.bool_], corners: Iterable[Corner], side: int) -> list[float]:
    """The share of true pixels of bool[H, W] in each window, 0 to 1."""
    table = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
    table[1:, 1:] = mask.cumsum(0, dtype=np.int64).cumsum(1)
    return [
        float(table[y + side, x + side] - table[y, x + side] - table[y + side, x] + table[y, x]) / side**2
        for x, y in corners
    ]


def holds(corner: Corner, side: int, point: Point) -> bool:
    """Whether the point lies in the window."""
    return corner[0] <= point[0] < corner[0] + side and corner[1] <= point[1] < corner[1] + side


def without(corners: Iterable[Corner], side: int, points: Sequence[Point]) -> list[Corner]:
    """The windows in which none of the points lies: the negatives of a detection task."""
    return [corner for corner in corners if not any(holds(corner, side, point) for point in points)]


def around(
    point: Point, width: int, height: int, side: int, rng: random.Random, avoid: Sequence[Point] = ()
) -> list[Corner]:
    """Ten different windows at a random shift that all hold the point and none of the points to avoid.

    Fewer where there is no room for ten: another object too near, or an image hardly larger than a window.
    """
    found: list[Corner] = []
    columns, rows = _reach(point[0], width, side), _reach(point[1], height, side)
    for _ in range(WINDOWS_AN_OBJECT * _DRAWS_A_WINDOW):
        corner = (rng.randint(*columns), rng.randint(*rows))
        if corner in found or not holds(corner, side, point) or any(holds(corner, side, other) for other in avoid):
            continue
        found.append(corner)
        if len(found) == WINDOWS_AN_OBJECT:
            break
    return found


def _reach(centre: float, length: int, side: int) -> tuple[int, int]:
    """The first and last place of a window on one axis. Where a border stops it, it may go as far the other way."""
    last, shift, margin = length - side, round(SHIFT_SHARE * side), round(MARGIN_SHARE * side)
    low = min(max(round(centre - side / 2) - shift, 0), last)
    high = min(max(round(centre - side / 2) + shift, 0), last)
    if low == 0:
        high = max(high, min(last, shift, math.floor(centre) - margin))
    if high == last:
        low = min(low, max(0, last - shift, math.ceil(centre) - side + margin))
    return low, high
