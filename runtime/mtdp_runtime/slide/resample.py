"""Area-averaged resampling by a float scale, from a float place."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.slide import compiled, products
from mtdp_runtime.slide.cells import cells

# A scale so close to 1 that no pixel of a tile moves by more than this: the pixels are taken as they are.
STILL_PX: Final = 0.02
_NOTHING_PX: Final = 1e-6  # a place this close to a pixel's edge lies on it: the rounding of floats


def is_still(scale: float, out_px: int) -> bool:
    """Tell whether a scale moves no pixel of `out_px` in a row.

    >>> is_still(1.00005, 224), is_still(1.0005, 224)
    (True, False)
    """
    return abs(scale - 1) * out_px <= STILL_PX


def resample_into(
    out: NDArray[np.uint8], source: NDArray[np.uint8], scale: float, phase_x: float = 0.0, phase_y: float = 0.0
) -> None:
    """Fill out, uint8[H, W, 3], with averages over cells of scale x scale source pixels.

    The first cell begins phase_x, phase_y pixels from the source's corner. Cells are fractions of pixels wherever they
    begin and end, as the law of `cells` says. Below 1 the result is interpolated linearly between pixels' centres.

    Args:
        source: uint8[h, w, 3], as large as the cells reach; where it ends before, its last pixel goes on.
    """
    height, width = out.shape[:2]
    if not phase_x and not phase_y and is_still(scale, max(height, width)):
        out[...] = source[:height, :width]
        return
    down, across = cells(height, source.shape[0], scale, phase_y), cells(width, source.shape[1], scale, phase_x)
    if down.source_px > source.shape[0] or across.source_px > source.shape[1]:  # for a pixel that weighs nothing
        beyond = (max(0, of.source_px - side) for of, side in zip((down, across), source.shape[:2], strict=True))
        source = np.pad(source, [*((0, px) for px in beyond), (0, 0)], mode="edge")
    library = compiled.compiled()
    if isinstance(library, str):
        products.average(out, source, down, across)
    else:
        compiled.average(library, out, source, down, across)


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
