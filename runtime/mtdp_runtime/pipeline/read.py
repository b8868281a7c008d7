"""One tile into its place in a batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import TileUnreadable
from mtdp_runtime.slide import Slide
from mtdp_runtime.store.layout import TileStatus


def read_tile(slide: Slide, out: NDArray[np.uint8], x0: int, y0: int, scale: float) -> tuple[TileStatus, str]:
    """Fill out, uint8[tile_px, tile_px, 3], and return the tile's status with the reason where it is bad.

    A bad tile's pixels are zero; they only keep its place in the batch.
    """
    try:
        slide.read_into(out, x0, y0, scale)
    except TileUnreadable as error:
        out[...] = 0
        return TileStatus.UNREADABLE, str(error)
    return TileStatus.GOOD, ""
