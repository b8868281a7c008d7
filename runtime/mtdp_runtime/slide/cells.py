"""The law of averaging: whole numbers all the way, so that whatever computes it gives the same bits.

`average.c` computes it, the NumPy of `products`, and the graph of `mtdp_export.averaging`:

1. The edges of cells are rounded to 1 / 2**bits of a source pixel, with as many bits as keep a cell below 2**16 of
   these units, and 14 at the most. A pixel weighs the whole number of its units that lie in the cell; their sum is the
   cell's units, S.
2. Rows: weighted sums of bytes, below 2**24; times float32(128 / S), rounded: 1/128 of a grey level, in 15 bits.
3. Columns: weighted sums of these, below 2**31; as float32, times float32(1 / (128 * S)), rounded: the tile.

A sum of whole numbers is the same in any order: in integers of 32 bits; in float32 below 2**24; the second in float64,
or in float32 as two sums, of high bytes and of low ones. What follows is one product of two float32, rounded halves to
even. IEEE 754 leaves nothing open in it.

Beside the 0.5 of the last rounding, a value is off by 1/256 of a grey level from step 2, and in each direction by no
more than 255 / S: 0.02 in all from scale 2 on, where S is above 2**15, and 0.035 at 1. Edges lie at the same places
whatever window they are seen through, and neighbouring cells share theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

LAW: Final = 2  # which features depend on; 1 was sums of float32
GREY: Final = 128  # what a grey level is between the passes
_MOST_BITS: Final = 14  # a whole pixel's weight has 16 bits, one of them for the sign
_MOST_UNITS: Final = 1 << 16  # and one more by rounding; 255 * 128 times as many still is below 2**31


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """Weights along one axis: output i sums `weights[i, j]` times source pixel `first[i] + j`."""

    first: NDArray[np.int32]  # [out_px]
    weights: NDArray[np.int16]  # [out_px, taps]; taps are even in number, zeros fill up
    units: NDArray[np.int64]  # [out_px], the sum of the weights
    whole: int  # each cell is so many whole pixels, the first begins with the first; 0 where that is not so

    @property
    def source_px(self) -> int:
        """The number of pixels that must be there, those of weight 0 among them."""
        taps: int = self.weights.shape[1]
        return int(self.first.max()) + taps

    def down_factors(self) -> NDArray[np.float32]:
        """Return float32[out_px]: what brings a sum over rows to 1/128 of a grey level."""
        return (GREY / self.units).astype(np.float32)

    def across_factors(self) -> NDArray[np.float32]:
        """Return float32[out_px]: what brings a sum of these over columns to grey levels."""
        return (1 / (GREY * self.units)).astype(np.float32)


@lru_cache(maxsize=256)
def cells(out_px: int, source_px: int, scale: float, phase: float) -> Cells:
    """Return the cells of `out_px` outputs over `source_px` source pixels, the first of them beginning at `phase`.

    They end where the source does; one that lies beyond takes its last pixel. A scale below 1 is interpolated linearly
    between the centres of pixels: a cell of one pixel, around the centre that is asked for.
    """
    bits = min(_MOST_BITS, math.frexp(_MOST_UNITS / scale)[1] - 1)  # log2, rounded down, on every machine
    assert bits >= 0, f"a cell of {scale} px"
    unit, out = 1 << bits, np.arange(out_px + 1, dtype=np.float64)
    if scale >= 1:
        edges = np.rint((phase + out * scale) * unit).astype(np.int64)
        low, high = edges[:-1], edges[1:]
    else:
        centre = np.clip(phase + (out[:-1] + 0.5) * scale, 0.5, source_px - 0.5)
        low = np.rint((centre - 0.5) * unit).astype(np.int64)
        high = low + unit
    end = source_px * unit
    low, high = np.clip(low, 0, end - 1), np.clip(high, 1, end)
    first = low // unit
    seen = int(((high - 1) // unit - first).max()) + 1
    taps = seen + seen % 2
    first = np.maximum(np.minimum(first, source_px - taps), 0)
    pixel = (first[:, None] + np.arange(taps)) * unit
    weights = np.clip(np.minimum(high[:, None], pixel + unit) - np.maximum(low[:, None], pixel), 0, None)
    side = int(high[0])
    alike = side % unit == 0 and np.array_equal(low, side * np.arange(out_px)) and bool((high - low == side).all())
    return Cells(first.astype(np.int32), weights.astype(np.int16), high - low, side // unit if alike else 0)
