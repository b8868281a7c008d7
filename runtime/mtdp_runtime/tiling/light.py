"""The light of a slide: how it falls off over the glass, and what the glass looks like at each place."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.tiling.cells import OD, box

_WINDOWS: Final = (25, 101, 401)  # cells: 1, 4 and 16 mm; glass is averaged in the smallest that shows enough of it
_LEAST_CELLS: Final = 16
_LEAST_DEGREE: Final = 2
_MOST_DEGREE: Final = 4  # a dark corner falls off faster than a square...
_MUCH: Final = 6  # ...which this much glass shows, one part of so many: little glass would be followed into the void
_STEPS: Final = 32  # to either side: a slide is this long in the polynomial of the light, so that whole numbers do


def light_of(level: NDArray[np.int32], glass: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Return int32[h, w]: how much dimmer than on average the light is, in thousandths of optical density.

    A polynomial of the second degree through the glass: a lamp off centre, a dark corner. It is solved in fractions,
    so that it is the same on every CPU, and kept near to what was seen on glass where it has to guess.
    """
    high, wide = level.shape
    row_steps = (2 * np.arange(high) * _STEPS) // max(1, high - 1)
    column_steps = (2 * np.arange(wide) * _STEPS) // max(1, wide - 1)
    rows, columns = np.nonzero(glass)
    seen = level[rows, columns]
    # All cells of one step to either side have the same powers: they are added up first.
    side = 2 * _STEPS + 1
    at = row_steps[rows] * side + column_steps[columns]
    counts = np.bincount(at, minlength=side**2)
    levels = np.bincount(at, seen, minlength=side**2).astype(np.int64)  # sums of whole numbers below 2**53: exact
    y, x = (axis.ravel() - _STEPS for axis in np.indices((side, side)))
    degree = _MOST_DEGREE if _MUCH * len(seen) >= glass.size else _LEAST_DEGREE
    terms = [x**i * y**j for i in range(degree + 1) for j in range(degree + 1 - i)]
    matrix = [[int((a * b * counts).sum()) for b in terms] + [int((a * levels).sum())] for a in terms]
    factors = _solved(matrix)
    if factors is None:
        return np.zeros_like(level)
    fitted = sum((round(factor * 2**30) * term for factor, term in zip(factors, terms, strict=True)), np.zeros_like(x))
    lowest, highest = int(seen.min()), int(seen.max())
    beyond = (highest - lowest) // 2
    steps = np.clip(fitted >> 30, lowest - beyond, highest + beyond).reshape(side, side)
    everywhere = steps[np.ix_(row_steps, column_steps)]
    return np.asarray(everywhere - int(np.median(everywhere[glass])), np.int32)


def _solved(matrix: list[list[int]]) -> list[Fraction] | None:
    """Solve linear equations of whole numbers (Bareiss: no fraction appears on the way); None without one solution."""
    count, before = len(matrix), 1
    for i in range(count):
        pivot = next((row for row in range(i, count) if matrix[row][i]), None)
        if pivot is None:
            return None
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        top = matrix[i]
        for row in matrix[i + 1 :]:
            part = row[i]
            row[i:] = [(top[i] * below - part * above) // before for above, below in zip(top[i:], row[i:], strict=True)]
        before = top[i]
    solution = [Fraction(0)] * count
    for i in reversed(range(count)):
        known = sum((matrix[i][j] * solution[j] for j in range(i + 1, count)), Fraction(0))
        solution[i] = (matrix[i][count] - known) / matrix[i][i]
    return solution


def lit(cells: NDArray[np.uint8], dimmer: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Return uint8[h, w, 3]: the cells in light that is dimmer by so many thousandths of optical density."""
    # A table of whole numbers: every CPU's exponential function gives the same ones.
    lowest, highest = int(dimmer.min()), int(dimmer.max())
    table = np.array([round(math.exp(-value / OD) * 2**16) for value in range(lowest, highest + 1)], np.int64)
    factor = table[dimmer - lowest][..., None]
    return np.asarray(np.clip((((cells + np.int64(1)) * factor + 2**15) >> 16) - 1, 0, 255), np.uint8)


def local_glass(cells: NDArray[np.uint8], glass: NDArray[np.bool_], colour: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return uint8[h, w, 3]: the glass at each cell, from the glass around it."""
    result = np.broadcast_to(colour, cells.shape).copy()
    weights = glass.astype(np.int32)
    open_yet = np.ones(glass.shape, np.bool_)
    for window in _WINDOWS:
        count = box(weights, window)
        # A tenth of the smallest window, and no less in a larger one.
        here = open_yet & (count >= max(_LEAST_CELLS, _WINDOWS[0] ** 2 // 10))
        if here.any():
            for channel in range(3):
                sums = box(weights * cells[..., channel], window)[here]
                result[here, channel] = (2 * sums + count[here]) // (2 * count[here])
        open_yet &= ~here
        if not open_yet.any():
            break
    return result
