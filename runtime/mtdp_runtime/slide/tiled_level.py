"""A level of tiled JPEG or JPEG 2000 as it lies in a TIFF, and what its tiles say of themselves."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import SlideUnreadable
from mtdp_runtime.slide import tile_jpeg, tile_jpeg2000
from mtdp_runtime.slide.probe import UnknownKind, probe


class NotUnderstood(Exception):
    """Why a slide is left to OpenSlide."""


@dataclass(frozen=True, slots=True)
class TiledLevel:
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
    jpeg_2000: bool
    scanned: NDArray[np.bool_]  # [rows, across]: tiles that have bytes


def decode_tile(level: TiledLevel, data: bytes, reduction: int, out: NDArray[np.uint8]) -> None:
    """Fill out, uint8[tile_height / reduction, tile_width / reduction, 3], with a tile of a level.

    Raises:
        ValueError: it is damaged, or of a kind that is not read.
    """
    if level.jpeg_2000:
        tile_jpeg2000.decode_tile(data, level.colour_space == "YCBCR", out)
    else:
        tile_jpeg.decode_tile(data, level.tables, level.colour_space, reduction, out)


def check_tiles(path: Path, number: int, level: TiledLevel) -> None:
    """Look at some of a level's tiles: one that decodes settles it.

    Raises:
        NotUnderstood: they are whole, and OpenSlide decodes them, but this reader does not.
        SlideUnreadable: no reader decodes them rightly.
    """
    out = np.empty((level.tile_height, level.tile_width, 3), np.uint8)

    def decode(tile: int) -> None:
        data = os.pread(stream.fileno(), level.sizes_bytes[tile], level.offsets[tile])
        decode_tile(level, data, 1, out)

    with path.open("rb") as stream:
        try:
            probe(level.sizes_bytes, decode)
        except tile_jpeg2000.Subsampled as kind:
            raise NotUnderstood(str(kind)) from kind
        except UnknownKind as kind:
            raise SlideUnreadable(f"{path}: level {number} is {kind}", hint="Export it as 8-bit RGB.") from kind


def colours_said(path: Path, level: TiledLevel) -> str:
    """Say where a level's first tile that is whole names other colours than the TIFF does; nothing otherwise."""
    said = level.colour_space
    with path.open("rb") as stream:
        for offset, size_bytes in zip(level.offsets, level.sizes_bytes, strict=True):
            if not size_bytes:
                continue
            data = os.pread(stream.fileno(), size_bytes, offset)
            try:
                if level.jpeg_2000:
                    found = "RGB" if tile_jpeg2000.read_header(data).transformed else said
                else:
                    found = tile_jpeg.colours_of(tile_jpeg.read_head(data), said)
            except ValueError:
                return ""
            if found == said:
                return ""
            codec = "JPEG 2000" if level.jpeg_2000 else "JPEG"
            return f"; its {codec} tiles say {found} where the TIFF says {said}: they are read so, OpenSlide errs there"
    return ""
