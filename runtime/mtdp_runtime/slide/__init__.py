"""A slide: its facts, and reading a rectangle of it at a scale."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Level:
    """One resolution of the pyramid."""

    width: int
    height: int
    downsample: float  # level-0 pixels a pixel of this level covers


@dataclass(frozen=True, slots=True)
class SlideInfo:
    """The facts of a slide. They are stored with the features as they are."""

    path: Path
    size_bytes: int
    vendor: str
    levels: tuple[Level, ...]  # the finest first
    mpp: float | None  # micrometres a level-0 pixel covers
    mpp_source: str  # what said so
    bounds: tuple[int, int, int, int]  # x0, y0, width, height of what was scanned, in level-0 pixels
    background: tuple[int, int, int]  # RGB that stands where nothing was scanned
    quickhash: str  # identifies the content; empty where the format gives none
    reader: str  # which reader, with its version
    reader_reason: str  # why this one
    reductions: tuple[int, ...] = ()  # factors by which the reader's decoder may itself reduce a level; () where never
    read_from: Path | None = None  # the file that is read, where `path` is not it: a copy, or one of a DICOM folder

    @property
    def width(self) -> int:
        """Level-0 pixels."""
        return self.levels[0].width

    @property
    def height(self) -> int:
        """Level-0 pixels."""
        return self.levels[0].height


class Slide(Protocol):
    """An open slide. Any number of threads may call `read_into` at once."""

    @property
    def info(self) -> SlideInfo: ...

    def read_into(self, out: NDArray[np.uint8], x0: int, y0: int, scale: float) -> None:
        """Fill out, uint8[H, W, 3] RGB, from the level-0 rectangle at (x0, y0) of W * scale by H * scale pixels.

        The pixels come from the level that `level_for` names and are area-averaged from there. What lies outside the
        slide, or was never scanned, is the background colour.

        Raises:
            TileUnreadable: the rectangle cannot be decoded. Nothing is ever invented in its place.
        """
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


# A level counts as fine enough when it is coarser than the target by less than this: a pyramid of 2220 pixels halved
# has a downsample of 2.0009, and nobody wants level 0 decoded for that.
LEVEL_TOLERANCE = 0.01


def level_for(levels: tuple[Level, ...], scale: float) -> int:
    """Return the coarsest level that is at least as fine as `scale` (level-0 pixels an output pixel).

    >>> level_for((Level(4000, 4000, 1.0), Level(2000, 2000, 2.0), Level(500, 500, 8.0)), 4.0)
    1
    """
    fine = [i for i, level in enumerate(levels) if level.downsample <= scale * (1 + LEVEL_TOLERANCE)]
    return max(fine, key=lambda i: levels[i].downsample, default=0)


def reduction_for(info: SlideInfo, scale: float) -> int:
    """Return the factor by which the decoder reduces the level that `level_for` names; 1 for none.

    It never reduces beyond the target, so what is left is averaging, by a scale of at least 1.
    """
    left = scale / info.levels[level_for(info.levels, scale)].downsample
    return max((factor for factor in info.reductions if factor <= left + 1e-9), default=1)


def resampling_of(info: SlideInfo, scale: float) -> str:
    """Name what is done to the pixels of the level that `level_for` names: a part of what makes the features."""
    left = scale / info.levels[level_for(info.levels, scale)].downsample
    reduction = reduction_for(info, scale)
    return ("area" if left >= 1 else "linear") if reduction == 1 else f"jpeg 1/{reduction}, area"
