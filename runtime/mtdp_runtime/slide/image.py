"""Images that OpenSlide does not read, or not rightly: OME-TIFF, TIFF without tiles, PNG, JPEG, OME-Zarr.

tifffile knows the structure of a TIFF, Pillow a PNG's and a JPEG's, zarr an OME-Zarr's. A TIFF is read piece by piece
(its tiles or strips) and an OME-Zarr chunk by chunk; a PNG or JPEG is decoded whole and held. Only what is 8-bit RGB,
or surely means it, is taken.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final, Self

import numpy as np
import PIL
import tifffile
from numpy.typing import NDArray

from mtdp_runtime.errors import SlideUnreadable, TileUnreadable
from mtdp_runtime.slide import Level, SlideInfo, Source
from mtdp_runtime.slide.ome_zarr import levels_of_zarr
from mtdp_runtime.slide.picture import JPEG_MAGIC, PNG_MAGIC, levels_of_picture
from mtdp_runtime.slide.probe import UnknownKind
from mtdp_runtime.slide.pyramid import Candidate, judge, left_out
from mtdp_runtime.slide.same_picture import other_pictures, shows_something_else
from mtdp_runtime.slide.scale import Scale
from mtdp_runtime.slide.source import source_at
from mtdp_runtime.slide.tiff_image import levels_of_tiff
from mtdp_runtime.slide.tiff_pieces import Pieces
from mtdp_runtime.slide.tile_cache import Key, TileCache
from mtdp_runtime.slide.window import Window, read_averaged
from mtdp_runtime.slide.zarr_folder import is_zarr, size_bytes_of

_CACHE_BYTES: Final = 256 << 20
_WHITE: Final = (255, 255, 255)
_TIFF_MAGICS: Final = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class NotAnImage(Exception):
    """Why a file is not read here."""


def kind_of_file(path: Path) -> str:
    """Return "TIFF", "PNG", "JPEG" or "OME-Zarr" by what a file (a folder) holds, whatever its name; "" for others."""
    if path.is_dir():
        return "OME-Zarr" if is_zarr(path) else ""
    try:
        with path.open("rb") as stream:
            magic = stream.read(8)
    except OSError:
        return ""
    if magic.startswith(_TIFF_MAGICS):
        return "TIFF"
    return "PNG" if magic == PNG_MAGIC else "JPEG" if magic.startswith(JPEG_MAGIC) else ""


class ImageReader:
    """An image as a slide."""

    def __init__(self, path: Path, slide_mpp: float | None, given_by: str, reason: str) -> None:
        """Open a file, or an OME-Zarr's folder.

        Raises:
            NotAnImage: it is not one of these, or not 8-bit RGB.
            SlideUnreadable: its pixels are not square, or it is damaged.
        """
        self._path = path
        self._cache = TileCache(_CACHE_BYTES)
        self._file = -1
        try:
            self._levels, scale, vendor, reader, files = self._open(path)
        except UnknownKind as kind:
            self.close()
            raise NotAnImage(str(kind)) from kind
        except (NotAnImage, SlideUnreadable):
            self.close()
            raise
        except Exception as error:  # a damaged structure finds many ways
            self.close()
            raise NotAnImage(f"it is damaged: {error}") from error
        verdicts = judge([Candidate(one.width, one.height, None, one.tile) for one in self._levels])
        kept = [
            (one, by.downsample) for one, by in zip(self._levels, verdicts, strict=True) if by.downsample is not None
        ]
        kept.sort(key=lambda level: level[1])
        self._levels = tuple(one for one, _ in kept)
        first = self._levels[0]
        self.info = SlideInfo(
            path=path,
            size_bytes=size_bytes_of(path) if path.is_dir() else path.stat().st_size,
            vendor=vendor,
            levels=tuple(Level(one.width, one.height, downsample) for one, downsample in kept),
            mpp=slide_mpp if slide_mpp is not None else scale[0],
            mpp_source=given_by if slide_mpp is not None else scale[1],
            bounds=(0, 0, first.width, first.height),
            background=_WHITE,
            quickhash=_quickhash(files),
            reader=reader,
            reader_reason=reason + left_out(verdicts),
        )
        self._leave_out_other_pictures()

    def _leave_out_other_pictures(self) -> None:
        """Keep as levels what shows the same as level 0; where a window cannot be read, reading says so later."""

        def read(level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
            pixels = np.empty((height, width, 3), np.uint8)
            self._fill(pixels, Window(Source(level), x, y, width, height, 0.0, 0.0, 1.0))
            return pixels

        try:
            others = other_pictures(self.info.levels, read)
        except TileUnreadable:
            return
        if others:
            kept = [i for i in range(len(self._levels)) if i not in others]
            self.info = replace(
                self.info,
                levels=tuple(self.info.levels[i] for i in kept),
                reader_reason=self.info.reader_reason + shows_something_else(self.info.levels, others),
            )
            self._levels = tuple(self._levels[i] for i in kept)
            self._cache = TileCache(_CACHE_BYTES)  # whose keys name levels by their numbers

    def _open(self, path: Path) -> tuple[tuple[Pieces, ...], Scale, str, str, tuple[Path, ...]]:
        """Return the levels, the scale, the vendor, the reader, and the files that tell this image from others."""
        kind = kind_of_file(path)
        if kind == "TIFF":
            self._file = os.open(path, os.O_RDONLY)
            return *levels_of_tiff(path, self._file), f"tifffile {tifffile.__version__}", (path,)
        if kind == "OME-Zarr":
            return levels_of_zarr(path)
        if not kind:
            raise NotAnImage("it is no TIFF, PNG, JPEG or OME-Zarr")
        return *levels_of_picture(path), f"Pillow {PIL.__version__}", (path,)

    def read_into(self, out: NDArray[np.uint8], x0: int, y0: int, scale: float, source: Source | None = None) -> None:
        chosen = source or source_at(self.info, x0, y0, scale, max(out.shape[:2]))
        read_averaged(out, self.info, chosen, x0, y0, scale, self._fill)

    def _fill(self, target: NDArray[np.uint8], window: Window) -> None:
        """Fill target, uint8[height, width, 3], with the window's pixels; beyond the level lies the background."""
        index = window.source.level
        level = self._levels[index]
        left, top = max(window.lx, 0), max(window.ly, 0)
        right, bottom = min(window.lx + window.width, level.width), min(window.ly + window.height, level.height)
        if right - left < window.width or bottom - top < window.height:
            target[...] = self.info.background
            if right <= left or bottom <= top:
                return
        wide, high = level.piece_width, level.piece_height
        for row in range(top // high, -(-bottom // high)):
            for column in range(left // wide, -(-right // wide)):
                key = (index, 1, row * level.across + column)
                piece = self._piece(key)
                y, y_end = max(row * high, top), min((row + 1) * high, bottom)
                x, x_end = max(column * wide, left), min((column + 1) * wide, right)
                target[y - window.ly : y_end - window.ly, x - window.lx : x_end - window.lx] = piece[
                    y - row * high : y_end - row * high, x - column * wide : x_end - column * wide
                ]
                self._cache.release(key)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _decode(self, key: Key, out: NDArray[np.uint8]) -> None:
        """Fill out with a piece; the last ones of a level may be smaller."""
        piece = self._levels[key[0]].decode(key[2])
        out[: piece.shape[0], : piece.shape[1]] = piece

    def _piece(self, key: Key) -> NDArray[np.uint8]:
        """Return uint8[piece_height, piece_width, 3], to be released."""
        level = self._levels[key[0]]
        try:
            return self._cache.acquire(key, (level.piece_height, level.piece_width, 3), self._decode)
        except Exception as error:  # each codec has errors of its own
            raise TileUnreadable(
                f"{self._path}: cannot decode segment {key[2]} of level {key[0]}: {error}",
                hint="The file is damaged there: compare its checksum with the original and copy it again.",
            ) from error


def _quickhash(files: Iterable[Path]) -> str:
    """Return what tells an image from another of its name: the first and last MiB of its files."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, path.stat().st_size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()
