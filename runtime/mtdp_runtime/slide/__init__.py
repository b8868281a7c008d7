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
    downsample: float  # level-0 pixels per pixel of this level covers
    whole: bool = True  # the reader gives its pixels as they are, wherever they lie; False where neighbours are blended


@dataclass(frozen=True, slots=True)
class Source:
    """What a rectangle is resampled from: whole pixels of one level, or of a level that the decoder reduces.

    `slide.source` chooses it: `grid_source` for tiles, `overview_source` for pictures of a whole slide.
    """

    level: int
    reduction: int = 1  # by the JPEG decoder: 1, 2, 4 or 8
    rough: bool = False  # for an overview: neighbouring pixels may be blended before the resampling


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
    own_decoder: bool = False  # whether tiles are decoded here, strictly, and not by a library that reads slides
    reductions: tuple[int, ...] = ()  # factors by which the reader's decoder may itself reduce a level, for overviews
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

    def read_into(self, out: NDArray[np.uint8], x0: int, y0: int, scale: float, source: Source | None = None) -> None:
        """Fill out, uint8[H, W, 3] RGB, from the level-0 rectangle at (x0, y0) of W * scale by H * scale pixels.

        Each pixel is the exact area average of whole pixels of one source, fractions of them at its borders included;
        below a scale of 1 it is interpolated. What lies outside the slide, or was never scanned, is the background
        colour.

        Args:
            out: where the pixels go.
            x0: level-0 pixel.
            y0: level-0 pixel.
            scale: level-0 pixels per output pixel.
            source: what to resample from, the same for all tiles of a grid: `grid_source`. Where None, what the law
                allows at this place (`source_at`).

        Raises:
            TileUnreadable: the rectangle cannot be decoded. Nothing is ever invented in its place.
        """
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...
