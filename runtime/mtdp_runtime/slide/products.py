"""Averaging with NumPy alone: the law of `cells` as products of small dense matrices."""

from __future__ import annotations

import math
import threading
from functools import lru_cache
from typing import Final, NamedTuple, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.slide.cells import Cells

_ROWS_BYTES: Final = 512 << 10  # of source rows at once: they stay in a core's own cache
# Multiplications in one product of matrices: OpenBLAS takes up to as many without starting threads of its own.
_ALONE: Final = 1 << 18

_HALVINGS: Final = (2, 4, 8, 16, 32, 64, 128)  # no step of the law but the last rounds anything

_own = threading.local()
Number = TypeVar("Number", np.uint8, np.float32, np.float64)


class Bands(NamedTuple):
    """Weights of `size` neighbouring outputs in a block; a block sees the same number of source pixels."""

    first: tuple[int, ...]  # the source pixel that each block begins with
    weights: NDArray[np.float64]  # [blocks, size, seen]; rows of zeros fill the last block
    down: NDArray[np.float32]  # [blocks * size], the factors of sums over rows
    across: NDArray[np.float32]  # the same of sums over columns


def average(out: NDArray[np.uint8], source: NDArray[np.uint8], down: Cells, across: Cells) -> None:
    """Fill out, uint8[H, W, 3], from source, uint8[h, w, 3]."""
    height, width = out.shape[:2]
    if down.whole == across.whole and down.whole in _HALVINGS:
        _halve(out, source, down.whole)
        return
    grey = _across(_down(source, bands(down), height), bands(across))
    rounded = cv2.convertScaleAbs(grey, dst=_scratch("rounded", np.uint8, *grey.shape))  # halves to even
    channels = rounded.reshape(3, height, -1)[:, :, :width]
    out[...] = cv2.merge([channels[0], channels[1], channels[2]])


def _halve(out: NDArray[np.uint8], source: NDArray[np.uint8], whole: int) -> None:
    """Fill out by OpenCV: however it rounds halves, of the picture and its negative one gives the even number."""
    height, width = out.shape[:2]
    at_once = max(1, _ROWS_BYTES // (whole * whole * width * 3))
    for top in range(0, height, at_once):
        part = out[top : top + at_once]
        cells = source[top * whole : (top + len(part)) * whole, : width * whole]
        found = cv2.resize(cells, (width, len(part)), interpolation=cv2.INTER_AREA)
        negative = cv2.bitwise_not(cells, dst=_scratch("negative", np.uint8, *cells.shape))
        other = cv2.bitwise_not(cv2.resize(negative, (width, len(part)), interpolation=cv2.INTER_AREA))
        part[...] = cv2.copyTo(other, found & 1, found)


def _down(source: NDArray[np.uint8], bands: Bands, out_px: int) -> NDArray[np.float64]:
    """Return float64[3, out_px, w]: sums of uint8[h, w, 3] over rows, in 15 bits. It is this thread's until its next.

    Before they are rounded, the sums are below 2**24, so float32 holds each exactly.
    """
    height, width = source.shape[:2]
    blocks, size, seen = bands.weights.shape
    lines, across = source.reshape(height, width * 3), width * 3
    weights = bands.weights.astype(np.float32)
    sums = _scratch("sums", np.float32, blocks * size, across)
    found = _scratch("down", np.float64, blocks * size, across)
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
                np.matmul(weights[block], seen_rows[columns], out=part[columns])
        these = slice(start * size, end * size)
        sums[these] *= bands.down[these, None]
        np.rint(sums[these], out=found[these], casting="unsafe")
    planes = _scratch("planes", np.float64, 3, out_px, width)
    cv2.split(found[:out_px].reshape(out_px, width, 3), [planes[0], planes[1], planes[2]])
    return planes


def _across(planes: NDArray[np.float64], bands: Bands) -> NDArray[np.float32]:
    """Return float32[3 * h, blocks * size], in grey levels: sums of float64[3, h, w] over columns, and zeros."""
    channels, height, width = planes.shape
    blocks, size, seen = bands.weights.shape
    lines = planes.reshape(channels * height, width)
    sums = _scratch("across", np.float64, channels * height, blocks * size)
    at_most = max(1, _ALONE // (size * seen))
    for block, first in enumerate(bands.first):
        for top in range(0, len(lines), at_most):
            rows = slice(top, top + at_most)
            part = sums[rows, block * size : (block + 1) * size]
            np.matmul(lines[rows, first : first + seen], bands.weights[block].T, out=part)
    grey = _scratch("grey", np.float32, *sums.shape)
    np.copyto(grey, sums, casting="same_kind")
    grey *= bands.across
    return grey


def _scratch(name: str, dtype: type[Number], *shape: int) -> NDArray[Number]:
    """Return memory of this thread: the kernel clears the pages of new memory, which takes as long as the sums do."""
    needed = math.prod(shape)
    memory: NDArray[Number] | None = getattr(_own, name, None)
    if memory is None or memory.size < needed:
        memory = np.empty(needed, dtype)
        setattr(_own, name, memory)
    return memory[:needed].reshape(shape)


@lru_cache(maxsize=256)
def bands(of: Cells) -> Bands:
    """Return the weights of cells, some outputs together."""
    out_px, taps = of.weights.shape
    size = min(8, max(1, 24 // max(1, taps - 2)), out_px)
    blocks = -(-out_px // size)
    block = np.arange(out_px) // size
    first = np.minimum.reduceat(of.first, np.arange(0, out_px, size))
    seen = int((of.first - first[block]).max()) + taps
    first = np.minimum(first, of.source_px - seen)
    weights = np.zeros((blocks * size, seen))
    at = (of.first - first[block])[:, None] + np.arange(taps)
    np.put_along_axis(weights[:out_px], at, of.weights.astype(np.float64), axis=1)
    spare = (0, blocks * size - out_px)
    return Bands(
        tuple(first.tolist()),
        weights.reshape(blocks, size, seen),
        np.pad(of.down_factors(), spare),
        np.pad(of.across_factors(), spare),
    )
