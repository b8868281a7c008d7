"""Area-averaged resampling by a float scale, from a float place."""

from __future__ import annotations

import math
import threading
from functools import lru_cache
from typing import Final, NamedTuple, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

# A scale so close to 1 that no pixel of a tile moves by more than this: the pixels are taken as they are.
STILL_PX: Final = 0.02
_NOTHING_PX: Final = 1e-6  # a place this close to a pixel's edge lies on it: the rounding of floats
_ROWS_BYTES: Final = 512 << 10  # of float32 source rows at once: they stay in a core's own cache
# Multiplications in one product of matrices: OpenBLAS takes up to as many without starting threads of its own.
_ALONE: Final = 1 << 18

_own = threading.local()
Number = TypeVar("Number", np.uint8, np.float32)


class Bands(NamedTuple):
    """Weights of `size` neighbouring outputs in a block; a block sees the same number of source pixels."""

    first: tuple[int, ...]  # the source pixel that each block begins with
    weights: NDArray[np.float32]  # [blocks, size, seen]; rows of zeros fill the last block


def is_still(scale: float, out_px: int) -> bool:
    """Tell whether a scale moves no pixel of `out_px` in a row.

    >>> is_still(1.00005, 224), is_still(1.0005, 224)
    (True, False)
    """
    return abs(scale - 1) * out_px <= STILL_PX


def is_whole(
    scale: float, height: int, width: int, source_height: int, source_width: int, phase_x: float, phase_y: float
) -> bool:
    """Tell whether every cell is a whole number of whole pixels, all of which are there: sums of whole numbers."""
    whole = round(scale)
    all_there = source_height >= height * whole and source_width >= width * whole
    return not phase_x and not phase_y and scale == whole and all_there


def resample_into(
    out: NDArray[np.uint8], source: NDArray[np.uint8], scale: float, phase_x: float = 0.0, phase_y: float = 0.0
) -> None:
    """Fill out, uint8[H, W, 3], with averages over cells of scale x scale source pixels.

    The first cell begins phase_x, phase_y pixels from the source's corner. Cells are fractions of pixels wherever they
    begin and end; neither the scale nor the place is rounded. Each value is rounded once. Below 1 the result is
    interpolated linearly between the centres of pixels.

    Args:
        source: uint8[h, w, 3], as large as the cells reach; where it ends before, its last pixel goes on.
    """
    height, width = out.shape[:2]
    if not phase_x and not phase_y and is_still(scale, max(height, width)):
        out[...] = source[:height, :width]
        return
    if is_whole(scale, height, width, source.shape[0], source.shape[1], phase_x, phase_y):
        whole = round(scale)
        cells = source[: height * whole, : width * whole]
        out[...] = cv2.resize(cells, (width, height), interpolation=cv2.INTER_AREA)
        return
    rows = _down(source, bands(height, source.shape[0], scale, phase_y), height)
    sums = _across(rows, bands(width, source.shape[1], scale, phase_x))
    rounded = cv2.convertScaleAbs(sums, dst=_scratch("rounded", np.uint8, *sums.shape))
    planes = rounded.reshape(3, height, -1)[:, :, :width]
    out[...] = cv2.merge([planes[0], planes[1], planes[2]])


def _down(source: NDArray[np.uint8], bands: Bands, out_px: int) -> NDArray[np.float32]:
    """Return float32[3, out_px, w]: weighted sums of uint8[h, w, 3] over rows. It is this thread's until its next."""
    height, width = source.shape[:2]
    blocks, size, seen = bands.weights.shape
    lines, across = source.reshape(height, width * 3), width * 3
    sums = _scratch("sums", np.float32, blocks * size, across)
    at_once = max(1, _ROWS_BYTES // (seen * across * 4))
    at_most = max(1, _ALONE // (size * seen))
    for start in range(0, blocks, at_once):
        end = min(start + at_once, blocks)
        top, bottom = bands.first[start], bands.first[end - 1] + seen
        rows = _scratch("rows", np.float32, bottom - top, across)
        np.copyto(rows, lines[top:bottom])
        for block in range(start, end):
            seen_rows = rows[bands.first[block] - top : bands.first[block] - top + seen]
            part = sums[block * size : (block + 1) * size]
            for left in range(0, across, at_most):
                columns = np.s_[:, left : left + at_most]
                np.matmul(bands.weights[block], seen_rows[columns], out=part[columns])
    planes = _scratch("planes", np.float32, 3, out_px, width)
    cv2.split(sums[:out_px].reshape(out_px, width, 3), [planes[0], planes[1], planes[2]])
    return planes


def _across(planes: NDArray[np.float32], bands: Bands) -> NDArray[np.float32]:
    """Return float32[3 * h, blocks * size]: weighted sums of float32[3, h, w] over columns; the last may be zeros."""
    channels, height, width = planes.shape
    blocks, size, seen = bands.weights.shape
    lines = planes.reshape(channels * height, width)
    sums = _scratch("across", np.float32, channels * height, blocks * size)
    at_most = max(1, _ALONE // (size * seen))
    for block, first in enumerate(bands.first):
        for top in range(0, len(lines), at_most):
            rows = slice(top, top + at_most)
            part = sums[rows, block * size : (block + 1) * size]
            np.matmul(lines[rows, first : first + seen], bands.weights[block].T, out=part)
    return sums


def _scratch(name: str, dtype: type[Number], *shape: int) -> NDArray[Number]:
    """Return memory of this thread: the kernel clears the pages of new memory, which takes as long as the sums do."""
    needed = math.prod(shape)
    memory: NDArray[Number] | None = getattr(_own, name, None)
    if memory is None or memory.size < needed:
        memory = np.empty(needed, dtype)
        setattr(_own, name, memory)
    return memory[:needed].reshape(shape)


@lru_cache(maxsize=256)
def bands(out_px: int, source_px: int, scale: float, phase: float) -> Bands:
    """Return the weights of `out_px` outputs over `source_px` source pixels: float64 sums, kept as float32."""
    size = min(8, max(1, int(24 / scale)), out_px)
    blocks = -(-out_px // size)
    out = np.arange(blocks * size, dtype=np.float64)
    if scale >= 1:
        low, high = phase + out * scale, phase + (out + 1) * scale
    else:  # linear between two centres: a cell of one pixel, around the centre that is asked for
        centre = np.clip(phase + (out + 0.5) * scale, 0.5, source_px - 0.5)
        low, high = centre - 0.5, centre + 0.5
    low, high = np.clip(low, 0, source_px - _NOTHING_PX), np.clip(high, _NOTHING_PX, source_px)
    last = np.minimum(np.arange(1, blocks + 1) * size, out_px) - 1
    first = np.floor(low[::size]).astype(np.int64)
    seen = int((np.ceil(high[last]).astype(np.int64) - first).max())
    first = np.minimum(first, source_px - seen)
    pixel = (first[:, None] + np.arange(seen))[:, None, :]
    low, high = low.reshape(blocks, size, 1), high.reshape(blocks, size, 1)
    weights = np.clip(np.minimum(high, pixel + 1) - np.maximum(low, pixel), 0, None)
    weights /= np.maximum(weights.sum(axis=2, keepdims=True), _NOTHING_PX)
    weights.reshape(blocks * size, seen)[out_px:] = 0
    return Bands(tuple(first.tolist()), weights.astype(np.float32))


def span_of(start: float, out_px: int, scale: float) -> tuple[int, int, float]:
    """Return the first source pixel, the end, and the phase for `out_px` outputs from a float place.

    >>> span_of(448.0, 224, 2.0), span_of(100.25, 2, 1.5)
    ((448, 896, 0.0), (100, 104, 0.25))
    """
    if is_still(scale, out_px):
        first = round(start)
        if abs(start - first) <= STILL_PX:
            return first, first + out_px, 0.0
    if scale < 1:  # the centres of the outermost outputs lie between these pixels
        first = math.floor(start + 0.5 * scale - 0.5 + _NOTHING_PX)
        return first, math.floor(start + (out_px - 0.5) * scale - 0.5 - _NOTHING_PX) + 2, start - first
    first = math.floor(start + _NOTHING_PX)
    phase = max(0.0, start - first)
    return first, math.ceil(start + out_px * scale - _NOTHING_PX), phase if phase > _NOTHING_PX else 0.0
