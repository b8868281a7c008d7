"""One tile into its place in a batch."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import StorageFailed, TileUnreadable
from mtdp_runtime.faults import RETRY_AFTER_S, system_fault
from mtdp_runtime.slide import Slide, Source
from mtdp_runtime.store.layout import TileStatus


def read_tile(
    slide: Slide, out: NDArray[np.uint8], x0: int, y0: int, scale: float, source: Source | None = None
) -> tuple[TileStatus, str]:
    """Fill out, uint8[tile_px, tile_px, 3], and return the tile's status with the reason where it is bad.

    A bad tile's pixels are zero; they only keep its place in the batch. What the system says of a read (an error of the
    disk) is no tile's fault: it is tried again for some seconds.

    Raises:
        StorageFailed: it lasts.
    """
    for wait_s in (*RETRY_AFTER_S, None):
        try:
            slide.read_into(out, x0, y0, scale, source)
        except TileUnreadable as error:
            fault = system_fault(error)
            if fault is None:
                out[...] = 0
                return TileStatus.UNREADABLE, str(error)
            if wait_s is None or not fault.passing:
                raise StorageFailed(
                    f"{error} ({fault.reason})", hint="The storage said so. The next run goes on from here."
                ) from error
            time.sleep(wait_s)
        else:
            break
    return TileStatus.GOOD, ""
