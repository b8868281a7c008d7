"""Where OpenSlide gives the pixels of a level as they are.

`read_region` takes a place in level-0 pixels, which are whole numbers, and divides it by the level's downsample. Where
that is no integer (a side of odd length halved: 2.0005), the place falls between two pixels of the level, and
OpenSlide 4 hands it to Cairo, which blends them. From a place that falls on a pixel all further pixels come as they
are, up to the 4096 that OpenSlide paints in one go; such places lie up to a whole level apart. A level in which some
pixel has none near enough before it is good for overviews only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.slide import Level
from mtdp_runtime.slide.window import PIECE_PX

# Cairo counts in 1/256 of a pixel. Measured with OpenSlide 4.0.1: up to 0.97 of them nothing is blended, from 1.03 on
# it is.
_UNSEEN: Final = 1 / 512
_PAINTED_PX: Final = 4096


@dataclass(frozen=True, slots=True)
class Lattice:
    """A level as OpenSlide addresses it."""

    index: int  # OpenSlide's number of the level
    downsample: float  # as OpenSlide divides by it
    exact: NDArray[np.int64]  # ascending: the pixels of the level that a level-0 pixel falls on; () where all do
    whole: bool  # every pixel can be read as it is

    def place(self, pixel: int) -> tuple[int, int]:
        """Return the level-0 place to read from so that `pixel` comes as it is, and the pixels that come before it."""
        first = pixel
        if len(self.exact) and self.whole:
            first = int(self.exact[np.searchsorted(self.exact, pixel, side="right") - 1])
        return round(first * self.downsample), pixel - first


def lattices_of(levels: Sequence[Level], indices: Sequence[int], downsamples: Sequence[float]) -> tuple[Lattice, ...]:
    """Return how OpenSlide addresses each of `levels`, given its numbers of them and its downsamples."""
    own = zip(levels, indices, downsamples, strict=True)
    return tuple(_lattice(index, downsample, max(level.width, level.height)) for level, index, downsample in own)


def _lattice(index: int, downsample: float, side: int) -> Lattice:
    pixels = np.arange(side + 1)
    off = np.abs(np.rint(pixels * downsample) / downsample - pixels)
    exact = pixels[off < _UNSEEN].astype(np.int64)
    if len(exact) == len(pixels):
        return Lattice(index, downsample, exact[:0], whole=True)
    farthest = int(np.diff(np.append(exact, side)).max())
    return Lattice(index, downsample, exact, whole=farthest + PIECE_PX <= _PAINTED_PX)
