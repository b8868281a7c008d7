"""A slide as a pyramid of small pictures, each level half the size of the next: the layout of Deep Zoom (DZI).

Level 0 is one pixel; the last level is the slide's own pixels. Neighbouring pictures share `OVERLAP_PX` on each side,
so that a browser that scales them leaves no seam. Pixels come from the slide's own reader, whatever the format.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.slide import Slide
from mtdp_runtime.slide.source import overview_source

TILE_PX: Final = 510  # without what is shared: 512 with it
OVERLAP_PX: Final = 1
_QUALITY: Final = 87  # of JPEG
_LEAST_LEVEL: Final = 8  # nobody asks for less than a picture of 256 pixels


class NoSuchTile(LookupError):
    """The pyramid has no picture there."""


@dataclass(frozen=True, slots=True)
class Pyramid:
    """The geometry of a slide's pictures.

    >>> pyramid = Pyramid(100_000, 80_000)
    >>> pyramid.last_level, pyramid.first_level, pyramid.scale(15), pyramid.tiles(17)
    (17, 8, 4, (197, 157))
    """

    width: int  # level-0 pixels
    height: int

    @property
    def last_level(self) -> int:
        """The level that is the slide's own pixels."""
        return (max(self.width, self.height) - 1).bit_length()

    @property
    def first_level(self) -> int:
        """The smallest level that is worth a look."""
        return min(_LEAST_LEVEL, self.last_level)

    def scale(self, level: int) -> int:
        """Return the level-0 pixels that a pixel of the level covers, along one side."""
        return 1 << (self.last_level - level)

    def size(self, level: int) -> tuple[int, int]:
        """Return width and height of a level."""
        scale = self.scale(level)
        return -(-self.width // scale), -(-self.height // scale)

    def tiles(self, level: int) -> tuple[int, int]:
        """Return columns and rows of pictures."""
        width, height = self.size(level)
        return -(-width // TILE_PX), -(-height // TILE_PX)

    def box(self, level: int, column: int, row: int) -> tuple[int, int, int, int]:
        """Return left, top, right and bottom of a picture, in pixels of its level.

        Raises:
            NoSuchTile: it lies outside.
        """
        if not self.first_level <= level <= self.last_level:
            raise NoSuchTile(f"level {level}: there are {self.first_level} to {self.last_level}")
        columns, rows = self.tiles(level)
        if not (0 <= column < columns and 0 <= row < rows):
            raise NoSuchTile(f"column {column}, row {row}: level {level} has {columns} columns and {rows} rows")
        width, height = self.size(level)
        return (
            max(0, column * TILE_PX - OVERLAP_PX),
            max(0, row * TILE_PX - OVERLAP_PX),
            min(width, (column + 1) * TILE_PX + OVERLAP_PX),
            min(height, (row + 1) * TILE_PX + OVERLAP_PX),
        )


def read_picture(slide: Slide, level: int, column: int, row: int) -> NDArray[np.uint8]:
    """Return uint8[H, W, 3] RGB: a picture of the pyramid, its shared borders included.

    Raises:
        NoSuchTile: it lies outside.
        TileUnreadable: it cannot be decoded.
    """
    pyramid = Pyramid(slide.info.width, slide.info.height)
    left, top, right, bottom = pyramid.box(level, column, row)
    scale = pyramid.scale(level)
    out = np.empty((bottom - top, right - left, 3), np.uint8)
    slide.read_into(out, left * scale, top * scale, scale, overview_source(slide.info, scale))
    return out


def read_square(slide: Slide, x0: int, y0: int, side_px: int, scale: float) -> NDArray[np.uint8]:
    """Return uint8[side_px, side_px, 3] RGB: a tile at (x0, y0) as a model saw it.

    Raises:
        TileUnreadable: it cannot be decoded.
    """
    out = np.empty((side_px, side_px, 3), np.uint8)
    slide.read_into(out, x0, y0, scale)
    return out


def jpeg(image: NDArray[np.uint8]) -> bytes:
    """Return uint8[H, W, 3] RGB as a JPEG."""
    _, encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    return encoded.tobytes()


class PictureCache:
    """Encoded pictures, the ones used last, in bounded memory."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._pictures: OrderedDict[tuple[object, ...], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[object, ...], make: Callable[[], bytes]) -> bytes:
        """Return a picture, made where it is not here; an error of `make` is not remembered."""
        with self._lock:
            found = self._pictures.get(key)
            if found is not None:
                self._pictures.move_to_end(key)
                return found
        made = make()
        with self._lock:
            if key not in self._pictures:
                self._pictures[key] = made
                self._bytes += len(made)
            while self._bytes > self._limit_bytes:
                self._bytes -= len(self._pictures.popitem(last=False)[1])
        return made
