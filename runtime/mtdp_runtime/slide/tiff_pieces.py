"""A level of a TIFF as a raster of pieces, each decoded at once to RGB.

A piece is a tile or a strip; where the colours lie in separate planes (PlanarConfiguration 2, or a directory for each),
it is one of each plane.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.slide.pixel_kind import JPEG, JPEG_2000, PixelKind, kind_of
from mtdp_runtime.slide.probe import UnknownKind, probe
from mtdp_runtime.slide.tiff_codecs import check_codec, decode_bytes, decode_picture, is_of_bytes, unpack
from mtdp_runtime.slide.ycbcr import YCbCr, ycbcr_of

_MOST_SEGMENT_BYTES: Final = 1 << 30  # what is decoded in one piece
_MOST_PROBED_BYTES: Final = 256 << 20  # what is decoded only to see whether it can be
_COLOUR_SPACE: Final = {"rgb": "RGB", "ycbcr": "YCBCR"}


@dataclass(frozen=True, slots=True)
class Pieces:
    """A level as a raster of pieces, each decoded at once."""

    width: int
    height: int
    piece_width: int
    piece_height: int
    decode: Callable[[int], NDArray[np.uint8]]  # number -> uint8[piece_height or less, piece_width or less, 3]
    tile: tuple[int, int] | None = None  # width and height of its tiles, which a level may be padded to; none of strips

    @property
    def across(self) -> int:
        return -(-self.width // self.piece_width)


@dataclass(frozen=True, slots=True)
class _Plane:
    """Some of the samples of a level, as they lie in the file."""

    file: int
    kind: PixelKind
    samples: int  # of a pixel in this plane
    width: int
    height: int
    wide: int  # of a segment
    high: int
    tiled: bool
    offsets: tuple[int, ...]
    sizes_bytes: tuple[int, ...]
    predictor: int
    tables: bytes | None
    ycbcr: YCbCr | None

    def segment(self, number: int) -> NDArray[np.uint8] | None:
        """Return uint8[rows, columns, samples], RGB where there are three; None where nothing was ever written."""
        size_bytes = self.sizes_bytes[number]
        if not size_bytes:
            return None
        data = os.pread(self.file, size_bytes, self.offsets[number])
        if len(data) < size_bytes:
            raise ValueError(f"the file ends {size_bytes - len(data)} bytes too early")
        rows = self.high if self.tiled else min(self.high, self.height - number * self.high)
        compression, shape = self.kind.compression, (rows, self.wide, self.samples)
        if not is_of_bytes(compression):
            said = _COLOUR_SPACE.get(self.kind.colours, "GRAY") if self.samples >= 3 else "GRAY"
            return decode_picture(data, compression, self.tables, said, shape, self.high)[:rows]
        if self.ycbcr is None or not self.ycbcr.subsampled:
            pixels = decode_bytes(data, compression, self.predictor, shape, self.high)
            return pixels if self.ycbcr is None else self.ycbcr.to_rgb(pixels)
        sizes_bytes = tuple(self.ycbcr.packed_bytes(height, self.wide) for height in (rows, self.high))
        packed = unpack(data, compression, sizes_bytes)
        return self.ycbcr.to_rgb(self.ycbcr.unpack(packed, rows, self.wide))


def pieces_of(pages: Sequence[Any], file: int) -> Pieces:
    """Return a level of one directory, or of three that hold its red, green and blue.

    Raises:
        UnknownKind: its pixels are of a kind that is not read here.
    """
    kinds = [kind_of(page) for page in pages]
    if len(pages) == 1:
        page, kind = pages[0], kinds[0]
        planes = [_plane(page, kind, file, index) for index in range(kind.samples if kind.planes else 1)]
    else:
        if any(kind.colours != "grey" for kind in kinds):
            raise UnknownKind(f"{len(pages)} planes of {', '.join(kind.colours for kind in kinds)}, not of one sample")
        planes = [_plane(page, kind, file, 0) for page, kind in zip(pages, kinds, strict=True)]
    first, kind = planes[0], kinds[0]
    if any(
        (one.width, one.height, one.wide, one.high) != (first.width, first.height, first.wide, first.high)
        for one in planes
    ):
        raise UnknownKind("its colours lie in planes of different sizes")
    finish = _finish(pages[0], kind, len(planes))

    def decode(number: int) -> NDArray[np.uint8]:
        parts = [plane.segment(number) for plane in planes]
        if all(part is None for part in parts):
            return np.full((first.high, first.wide, 3), 255, np.uint8)
        if any(part is None for part in parts):
            raise ValueError("some of its colours were never written")
        whole = [part for part in parts if part is not None]
        return finish(whole[0] if len(whole) == 1 else np.concatenate(whole, axis=2))

    if first.wide * first.high * first.samples <= _MOST_PROBED_BYTES:
        probe(first.sizes_bytes, decode)
    tile = (first.wide, first.high) if first.tiled else None
    return Pieces(first.width, first.height, first.wide, first.high, decode, tile)


def samples_of(pieces: Pieces, most: int = 16) -> list[NDArray[np.uint8]]:
    """Return pieces from all over a level; the damaged ones are left out, to be told when a tile needs them."""
    last, found = pieces.across * -(-pieces.height // pieces.piece_height) - 1, []
    for number in sorted({i * last // (most - 1) for i in range(most)}):
        try:
            found.append(pieces.decode(number))
        except Exception:  # each codec has errors of its own  # noqa: S112
            continue
    return found


def on_white(pixels: NDArray[np.uint8], premultiplied: bool = False) -> NDArray[np.uint8]:
    """Return uint8[H, W, 3] of RGB or RGBA: what is transparent becomes white."""
    if pixels.shape[2] == 3:
        return pixels
    weight = pixels[..., 3:].astype(np.float32) / 255
    seen = pixels[..., :3] if premultiplied else pixels[..., :3] * weight
    return np.asarray(np.rint(np.minimum(seen + 255 * (1 - weight), 255)), np.uint8)


def _finish(page: Any, kind: PixelKind, planes: int) -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]]:
    """Return what makes RGB of a piece's samples."""
    if kind.colours == "palette":
        tag = page.tags.get("ColorMap")
        colours = None if tag is None else np.asarray(tag.value, np.uint16)
        if colours is None or colours.size != 3 * 256:
            raise UnknownKind("a palette of other than 256 colours")
        # TIFF wants 16 bits; where all fit into 8, a writer has kept 8, and libtiff reads them so, too.
        palette = (colours.reshape(3, 256).T >> (8 if colours.max() > 255 else 0)).astype(np.uint8)
        return lambda pixels: palette[pixels[..., 0]]
    if kind.colours == "inverted grey":
        return lambda pixels: np.repeat(255 - pixels, 3, axis=2)
    if kind.colours == "grey" and planes == 1:
        return lambda pixels: np.repeat(pixels, 3, axis=2)
    return lambda pixels: on_white(np.ascontiguousarray(pixels), kind.premultiplied)


def _plane(page: Any, kind: PixelKind, file: int, index: int) -> _Plane:
    """Return a directory's plane of a number; the only one where its samples lie together."""
    predictor = int(page.predictor)
    check_codec(kind.compression, predictor)
    width, height = int(page.imagewidth), int(page.imagelength)
    tiled = bool(page.is_tiled)
    wide, high = (page.tilewidth, page.tilelength) if tiled else (width, min(page.rowsperstrip, height))
    wide, high, samples = int(wide), int(high), 1 if kind.planes else kind.samples
    if wide * high * samples > _MOST_SEGMENT_BYTES:
        raise UnknownKind(f"one strip or tile of it has {wide} x {high} px: convert it to a tiled TIFF")
    count = -(-width // wide) * -(-height // high)
    offsets, sizes_bytes = tuple(page.dataoffsets), tuple(page.databytecounts)
    if not len(offsets) == len(sizes_bytes) == count * (kind.samples // samples):
        raise UnknownKind(f"{len(offsets)} segments do not make {width} x {height} px")
    own = slice(index * count, (index + 1) * count)
    ycbcr = ycbcr_of(page) if kind.colours == "ycbcr" and is_of_bytes(kind.compression) else None
    if kind.colours == "ycbcr" and (kind.planes or (ycbcr is not None and ycbcr.subsampled and predictor != 1)):
        raise UnknownKind("YCbCr in separate planes, or subsampled with a predictor")
    if kind.colours == "ycbcr" and ycbcr is None and not _converts(kind):
        raise UnknownKind(f"YCbCr in TIFF compression {kind.compression}")
    return _Plane(
        file=file,
        kind=kind,
        samples=samples,
        width=width,
        height=height,
        wide=wide,
        high=high,
        tiled=tiled,
        offsets=offsets[own],
        sizes_bytes=sizes_bytes[own],
        predictor=predictor,
        tables=page.jpegtables,
        ycbcr=ycbcr,
    )


def _converts(kind: PixelKind) -> bool:
    """Say whether a picture's own decoder gives RGB of YCbCr."""
    return kind.compression in {JPEG, *JPEG_2000}
