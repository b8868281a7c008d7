"""The fast reader: tiled JPEG in a TIFF or an Aperio SVS, straight from the file.

OpenSlide stays the authority: it opens the slide and states its facts, and every read that meets something unusual (a
missing tile, a tile that does not decode) is handed to it. What is gained is that a compressed tile is read once,
decoded once, by libjpeg-turbo, without a detour over ARGB and PIL.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, Final, Self

import numpy as np
import simplejpeg
import tifffile
from numpy.typing import NDArray

from mtdp_runtime.slide import Slide, SlideInfo
from mtdp_runtime.slide.resample import IDENTITY_TOLERANCE, resample_into
from mtdp_runtime.slide.strict_jpeg import decode_strictly
from mtdp_runtime.slide.tile_cache import Key, TileCache
from mtdp_runtime.slide.window import Window, window_of

_CACHE_BYTES: Final = 256 << 20  # two rows of tiles of a slide 160,000 px wide
_VENDORS: Final = frozenset({"aperio", "generic-tiff"})
_JPEG: Final = 7
_COLOUR_SPACES: Final = {2: "RGB", 6: "YCBCR"}  # TIFF's photometric interpretation: how the JPEG holds its colours


class NotUnderstood(Exception):
    """Why a slide is left to OpenSlide."""


class _LeaveToOpenSlide(Exception):
    """This one rectangle is."""


@dataclass(frozen=True, slots=True)
class _TiledLevel:
    """A level as it lies in the file."""

    width: int
    height: int
    tile_width: int
    tile_height: int
    across: int  # tiles in a row
    offsets: tuple[int, ...]
    sizes_bytes: tuple[int, ...]
    tables: bytes | None
    colour_space: str


class TiledJpegReader:
    """A slide whose levels are all tiled JPEG."""

    def __init__(self, reference: Slide) -> None:
        """Take over an open slide.

        Raises:
            NotUnderstood: it must be read through OpenSlide; the reason is the message.
        """
        self._reference = reference
        self._levels = _levels_of(reference.info)
        self._cache = TileCache(_CACHE_BYTES)
        self._file = os.open(reference.info.path, os.O_RDONLY)
        self.info = replace(
            reference.info,
            reader=f"mtdp tiled JPEG (simplejpeg {simplejpeg.__version__}), {reference.info.reader}",
            reader_reason="every level is tiled JPEG",
        )

    def read_into(self, out: NDArray[np.uint8], x0: int, y0: int, scale: float) -> None:
        window = window_of(self.info.levels, x0, y0, out.shape[1], out.shape[0], scale)
        try:
            if abs(window.scale - 1) < IDENTITY_TOLERANCE and not (window.repeat_x or window.repeat_y):
                self._copy(out, window)
                return
            shape = (window.height + window.repeat_y, window.width + window.repeat_x, 3)
            source = np.empty(shape, np.uint8)
            self._copy(source[: window.height, : window.width], window)
        except _LeaveToOpenSlide:
            self._reference.read_into(out, x0, y0, scale)
            return
        if window.repeat_x:
            source[:, -1] = source[:, -2]
        if window.repeat_y:
            source[-1] = source[-2]
        resample_into(out, source, window.scale)

    def close(self) -> None:
        self._reference.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _copy(self, target: NDArray[np.uint8], window: Window) -> None:
        """Fill target, uint8[height, width, 3], with the window's pixels; beyond the level lies the background."""
        level = self._levels[window.level]
        left, top = max(window.lx, 0), max(window.ly, 0)
        right, bottom = min(window.lx + window.width, level.width), min(window.ly + window.height, level.height)
        if right - left < window.width or bottom - top < window.height:
            target[...] = self.info.background
        for row in range(top // level.tile_height, -(-bottom // level.tile_height) if bottom > top else 0):
            y, y_end = max(row * level.tile_height, top), min((row + 1) * level.tile_height, bottom)
            for column in range(left // level.tile_width, -(-right // level.tile_width) if right > left else 0):
                x, x_end = max(column * level.tile_width, left), min((column + 1) * level.tile_width, right)
                tile = self._cache.get((window.level, row * level.across + column), self._decode)
                target[y - window.ly : y_end - window.ly, x - window.lx : x_end - window.lx] = tile[
                    y - row * level.tile_height : y_end - row * level.tile_height,
                    x - column * level.tile_width : x_end - column * level.tile_width,
                ]

    def _decode(self, key: Key) -> NDArray[np.uint8]:
        """Return uint8[tile_height, tile_width, 3]."""
        level = self._levels[key[0]]
        size_bytes = level.sizes_bytes[key[1]]
        try:
            data = os.pread(self._file, size_bytes, level.offsets[key[1]]) if size_bytes else b""
            if len(data) < size_bytes or not data:
                raise _LeaveToOpenSlide
            tile = decode_strictly(data, level.tables, level.colour_space)
        except (OSError, OverflowError, MemoryError, ValueError) as error:
            # OpenSlide tries it again, on a handle of its own, and says what is wrong with it.
            raise _LeaveToOpenSlide from error
        if tile.shape != (level.tile_height, level.tile_width, 3):
            raise _LeaveToOpenSlide
        return tile


def _levels_of(info: SlideInfo) -> tuple[_TiledLevel, ...]:
    """Find OpenSlide's levels among the file's pages."""
    if info.vendor not in _VENDORS:
        raise NotUnderstood(f"{info.vendor} slides are OpenSlide's")
    try:
        with tifffile.TiffFile(info.path) as tiff:
            pages: list[Any] = [page.aspage() for page in tiff.pages if page.is_tiled]
            return tuple(_level_of(pages, level.width, level.height) for level in info.levels)
    except (tifffile.TiffFileError, OSError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise NotUnderstood(f"its TIFF structure: {error}") from error


def _level_of(pages: list[Any], width: int, height: int) -> _TiledLevel:
    found = [page for page in pages if (page.imagewidth, page.imagelength) == (width, height)]
    if len(found) != 1:
        raise NotUnderstood(f"{len(found)} pages of {width} x {height} px, one was expected")
    page = found[0]
    facts = {
        "compression": (int(page.compression), _JPEG),
        "samples per pixel": (page.samplesperpixel, 3),
        "bits per sample": (page.bitspersample, 8),
        "planar configuration": (int(page.planarconfig), 1),
        "fill order": (int(page.fillorder), 1),
        "depth": (page.imagedepth, 1),
    }
    for name, (value, expected) in facts.items():
        if value != expected:
            raise NotUnderstood(f"{name} {value} ({expected} is read here)")
    colour_space = _COLOUR_SPACES.get(int(page.photometric))
    if colour_space is None:
        raise NotUnderstood(f"photometric interpretation {int(page.photometric)}")
    across, down = -(-width // page.tilewidth), -(-height // page.tilelength)
    if not len(page.dataoffsets) == len(page.databytecounts) == across * down:
        raise NotUnderstood(f"{len(page.dataoffsets)} tiles where {across * down} were expected")
    return _TiledLevel(
        width=width,
        height=height,
        tile_width=page.tilewidth,
        tile_height=page.tilelength,
        across=across,
        offsets=tuple(page.dataoffsets),
        sizes_bytes=tuple(page.databytecounts),
        tables=page.jpegtables,
        colour_space=colour_space,
    )
