"""The fast reader: tiles of JPEG or JPEG 2000 in a TIFF or an Aperio SVS, straight from the file.

OpenSlide stays the authority: it opens the slide and states its facts, and it is asked where the disk gives an error.
A damaged tile is not handed to it, since its decoders are laxer and would make up pixels. What is gained is that a
compressed tile is read once and decoded once, without a detour over ARGB and PIL, that damage is told, and that where
nothing was scanned nothing is read.
"""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from typing import Any, Final, Self

import imagecodecs
import numpy as np
import simplejpeg
import tifffile
from numpy.typing import NDArray

from mtdp_runtime.errors import TileUnreadable
from mtdp_runtime.slide import Slide, SlideInfo, Source
from mtdp_runtime.slide.openslide import REFERENCE
from mtdp_runtime.slide.source import source_at
from mtdp_runtime.slide.tiff_check import check_offsets
from mtdp_runtime.slide.tile_cache import Key, TileCache
from mtdp_runtime.slide.tile_jpeg import REDUCTIONS
from mtdp_runtime.slide.tiled_level import NotUnderstood, TiledLevel, check_tiles, colours_said, decode_tile
from mtdp_runtime.slide.window import Window, read_averaged

_CACHE_BYTES: Final = 256 << 20  # two rows of tiles of a slide 160,000 px wide
_VENDORS: Final = frozenset({"aperio", "generic-tiff"})
_JPEG: Final = 7
_JPEG_2000: Final = {33003: "YCBCR", 33005: "RGB"}  # Aperio's compressions say how the colours are held
_COLOUR_SPACES: Final = {2: "RGB", 6: "YCBCR"}  # TIFF's photometric interpretation: how the JPEG holds its colours
# What tifffile raises on a structure that is damaged, or that it does not know.
BROKEN_TIFF: Final = (
    tifffile.TiffFileError,
    OSError,
    ValueError,
    IndexError,
    KeyError,
    AttributeError,
    TypeError,
    ArithmeticError,
    struct.error,
)


class _LeaveToOpenSlide(Exception):
    """This one rectangle is, because the disk gave an error."""


class TiledTiffReader:
    """A slide whose levels are all tiled JPEG or JPEG 2000."""

    def __init__(self, reference: Slide) -> None:
        """Take over an open slide.

        Raises:
            NotUnderstood: it must be read through OpenSlide; the reason is the message.
        """
        self._reference = reference
        self._levels = _levels_of(reference.info)
        # Where tiles are missing, OpenSlide draws Aperio's coarser levels from the finer ones, far around each of them.
        missing = any(not level.scanned.all() for level in self._levels)
        self._drawn_from_finer = missing and reference.info.vendor == "aperio"
        codecs = sorted({"JPEG 2000" if level.jpeg_2000 else "JPEG" for level in self._levels})
        versions = {
            "JPEG": f"simplejpeg {simplejpeg.__version__}",
            "JPEG 2000": f"imagecodecs {imagecodecs.__version__}, {imagecodecs.jpeg2k_version()}",
        }
        self._cache = TileCache(_CACHE_BYTES)
        self._file = os.open(reference.info.path, os.O_RDONLY)
        reductions = REDUCTIONS if all(_reducible(level) for level in self._levels) else ()
        levels = reference.info.levels
        self.info = replace(
            reference.info,
            reader=f"mtdp tiled {' and '.join(codecs)} ({', '.join(versions[codec] for codec in codecs)}), "
            f"{reference.info.reader}",
            reader_reason=f"every level is tiled {' or '.join(codecs)}"
            + colours_said(reference.info.path, self._levels[0])
            + reference.info.reader_reason.removeprefix(REFERENCE),
            own_decoder=True,
            reductions=reductions,
            levels=tuple(replace(level, whole=level.whole or not self._drawn_from_finer) for level in levels),
        )

    def read_into(self, out: NDArray[np.uint8], x0: int, y0: int, scale: float, source: Source | None = None) -> None:
        chosen = source or source_at(self.info, x0, y0, scale, max(out.shape[:2]))
        if not (chosen.level and self._drawn_from_finer):
            try:
                read_averaged(out, self.info, chosen, x0, y0, scale, self._fill)
                return
            except _LeaveToOpenSlide:
                pass
        self._reference.read_into(out, x0, y0, scale, chosen)

    def close(self) -> None:
        self._reference.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _fill(self, target: NDArray[np.uint8], window: Window) -> None:
        """Fill target, uint8[height, width, 3], with the window's pixels; beyond the level lies the background."""
        index, reduction = window.source.level, window.source.reduction
        level = self._levels[index]
        tile_width, tile_height = level.tile_width // reduction, level.tile_height // reduction
        left, top = max(window.lx, 0), max(window.ly, 0)
        right = min(window.lx + window.width, level.width // reduction)
        bottom = min(window.ly + window.height, level.height // reduction)
        if right - left < window.width or bottom - top < window.height:
            target[...] = self.info.background
            if right <= left or bottom <= top:
                return
        rows = range(top // tile_height, -(-bottom // tile_height))
        columns = range(left // tile_width, -(-right // tile_width))
        shape = (tile_height, tile_width, 3)
        if not level.scanned[rows.start : rows.stop, columns.start : columns.stop].any():
            target[...] = self.info.background
            return
        if len(rows) == len(columns) == 1 and target.shape == shape and target.flags.c_contiguous:
            key = (index, reduction, rows[0] * level.across + columns[0])
            scanned = level.scanned[rows[0], columns[0]]
            if scanned and bottom - top == tile_height and right - left == tile_width and not self._cache.holds(key):
                self._decode(key, target)
                return
        # Tiles come row by row: what the next row of them needs, too, is kept, and little more.
        self._cache.limit(min(_CACHE_BYTES, (len(rows) + 1) * level.across * tile_height * tile_width * 3))
        for row in rows:
            y, y_end = max(row * tile_height, top), min((row + 1) * tile_height, bottom)
            for column in columns:
                x, x_end = max(column * tile_width, left), min((column + 1) * tile_width, right)
                part = np.s_[y - window.ly : y_end - window.ly, x - window.lx : x_end - window.lx]
                if not level.scanned[row, column]:
                    target[part] = self.info.background
                    continue
                key = (index, reduction, row * level.across + column)
                tile = self._cache.acquire(key, shape, self._decode)
                target[part] = tile[
                    y - row * tile_height : y_end - row * tile_height,
                    x - column * tile_width : x_end - column * tile_width,
                ]
                self._cache.release(key)

    def _decode(self, key: Key, out: NDArray[np.uint8]) -> None:
        """Fill out, uint8[tile_height / reduction, tile_width / reduction, 3]."""
        level, reduction, number = self._levels[key[0]], key[1], key[2]
        size_bytes = level.sizes_bytes[number]
        try:
            data = os.pread(self._file, size_bytes, level.offsets[number])
        except OSError as error:  # OpenSlide tries it again, on a handle of its own
            raise _LeaveToOpenSlide from error
        except (OverflowError, MemoryError):  # a size that no tile has
            data = b""
        try:
            if len(data) < size_bytes:
                raise ValueError(f"the file ends {size_bytes - len(data)} bytes too early")
            decode_tile(level, data, reduction, out)
        except ValueError as error:
            row, column = divmod(number, level.across)
            raise TileUnreadable(
                f"{self.info.path}: cannot decode the tile in column {column}, row {row} of level {key[0]}: "
                f"{'JPEG 2000' if level.jpeg_2000 else 'JPEG'}: {error}",
                hint="The file is damaged there: compare its checksum with the original and copy it again.",
            ) from error


def _levels_of(info: SlideInfo) -> tuple[TiledLevel, ...]:
    """Find OpenSlide's levels among the file's pages."""
    if info.vendor not in _VENDORS:
        raise NotUnderstood(f"{info.vendor} slides are OpenSlide's")
    try:
        with tifffile.TiffFile(info.path) as tiff:
            pages: list[Any] = [page.aspage() for page in tiff.pages if page.is_tiled]
            levels = tuple(_level_of(pages, level.width, level.height) for level in info.levels)
    except BROKEN_TIFF as error:
        raise NotUnderstood(f"its TIFF structure: {error}") from error
    for number, level in enumerate(levels):
        check_offsets(info.path, level.offsets, level.sizes_bytes)
        check_tiles(info.path, number, level)
    return levels


def _reducible(level: TiledLevel) -> bool:
    """Tell whether the decoder reduces, and the reduced tiles lie side by side without a gap."""
    return not level.jpeg_2000 and level.tile_width % max(REDUCTIONS) == 0 == level.tile_height % max(REDUCTIONS)


def _level_of(pages: list[Any], width: int, height: int) -> TiledLevel:
    found = [page for page in pages if (page.imagewidth, page.imagelength) == (width, height)]
    if len(found) != 1:
        raise NotUnderstood(f"{len(found)} pages of {width} x {height} px, one was expected")
    page = found[0]
    compression = int(page.compression)
    if compression != _JPEG and compression not in _JPEG_2000:
        raise NotUnderstood(f"compression {compression} ({_JPEG}, 33003 and 33005 are read here)")
    facts = {
        "samples per pixel": (page.samplesperpixel, 3),
        "bits per sample": (page.bitspersample, 8),
        "planar configuration": (int(page.planarconfig), 1),
        "fill order": (int(page.fillorder), 1),
        "depth": (page.imagedepth, 1),
    }
    for name, (value, expected) in facts.items():
        if value != expected:
            raise NotUnderstood(f"{name} {value} ({expected} is read here)")
    colour_space = _JPEG_2000.get(compression, _COLOUR_SPACES.get(int(page.photometric)))
    if colour_space is None:
        raise NotUnderstood(f"photometric interpretation {int(page.photometric)}")
    across, down = -(-width // page.tilewidth), -(-height // page.tilelength)
    if not len(page.dataoffsets) == len(page.databytecounts) == across * down:
        raise NotUnderstood(f"{len(page.dataoffsets)} tiles where {across * down} were expected")
    return TiledLevel(
        width=width,
        height=height,
        tile_width=page.tilewidth,
        tile_height=page.tilelength,
        across=across,
        offsets=tuple(page.dataoffsets),
        sizes_bytes=tuple(page.databytecounts),
        tables=page.jpegtables,
        colour_space=colour_space,
        jpeg_2000=compression in _JPEG_2000,
        scanned=(np.asarray(page.databytecounts) != 0).reshape(down, across),
    )
