"""Images that OpenSlide does not read, or not in full: OME-TIFF, TIFF without tiles, PNG, JPEG.

tifffile knows the structure of a TIFF and imagecodecs decodes it; Pillow reads the rest. A TIFF is read segment by
segment (its tiles or strips), a PNG or JPEG is decoded whole and held. Only 8-bit RGB or RGBA is taken: what the
colours of anything else mean is not for us to guess.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import PIL
import tifffile
from numpy.typing import NDArray
from PIL import Image

from mtdp_runtime.errors import SlideUnreadable, TileUnreadable
from mtdp_runtime.slide import Level, SlideInfo, Source
from mtdp_runtime.slide.pyramid import Candidate, judge, left_out
from mtdp_runtime.slide.scale import Scale, scale_of_tags
from mtdp_runtime.slide.source import source_at
from mtdp_runtime.slide.tiff_series import scale_in, the_slide
from mtdp_runtime.slide.tile_cache import Key, TileCache
from mtdp_runtime.slide.window import Window, read_averaged

TIFF_SUFFIXES: Final = frozenset({".tif", ".tiff"})
PLAIN_SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg"})
_CACHE_BYTES: Final = 256 << 20
_MOST_SEGMENT_BYTES: Final = 1 << 30  # what is decoded in one piece
_WHITE: Final = (255, 255, 255)
_RGB: Final = (2, 6)  # photometric interpretations: RGB, YCbCr
_PREMULTIPLIED: Final = (1,)  # values of ExtraSamples
_ALPHAS: Final = (_PREMULTIPLIED, (2,))


class NotAnImage(Exception):
    """Why a file is not read here."""


@dataclass(frozen=True, slots=True)
class _Pieces:
    """A level as a raster of segments, each decoded at once."""

    width: int
    height: int
    piece_width: int
    piece_height: int
    decode: Callable[[int], NDArray[np.uint8]]  # number -> uint8[piece_height or less, piece_width or less, 3]

    @property
    def across(self) -> int:
        return -(-self.width // self.piece_width)


class ImageReader:
    """A TIFF, PNG or JPEG as a slide."""

    def __init__(self, path: Path, slide_mpp: float | None, given_by: str, reason: str) -> None:
        """Open a file.

        Raises:
            NotAnImage: it is not one of these, or not 8-bit RGB.
        """
        self._path = path
        self._cache = TileCache(_CACHE_BYTES)
        self._file = -1
        if path.suffix.lower() in TIFF_SUFFIXES:
            self._file = os.open(path, os.O_RDONLY)
            try:
                self._levels, scale, vendor = _tiff(path, self._file)
            except (NotAnImage, SlideUnreadable):
                os.close(self._file)
                raise
            reader = f"tifffile {tifffile.__version__}"
        else:
            self._levels, scale, vendor = _plain(path)
            reader = f"Pillow {PIL.__version__}"
        verdicts = judge([Candidate(one.width, one.height, None, _tile(one)) for one in self._levels])
        kept = [
            (one, by.downsample) for one, by in zip(self._levels, verdicts, strict=True) if by.downsample is not None
        ]
        self._levels = tuple(one for one, _ in kept)
        first = self._levels[0]
        self.info = SlideInfo(
            path=path,
            size_bytes=path.stat().st_size,
            vendor=vendor,
            levels=tuple(Level(one.width, one.height, downsample) for one, downsample in kept),
            mpp=slide_mpp if slide_mpp is not None else scale[0],
            mpp_source=given_by if slide_mpp is not None else scale[1],
            bounds=(0, 0, first.width, first.height),
            background=_WHITE,
            quickhash=_quickhash(path),
            reader=reader,
            reader_reason=reason + left_out(verdicts),
        )

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


def _tile(level: _Pieces) -> tuple[int, int]:
    return level.piece_width, level.piece_height


def on_white(pixels: NDArray[np.uint8], premultiplied: bool = False) -> NDArray[np.uint8]:
    """Return uint8[H, W, 3] of RGB or RGBA: what is transparent becomes white."""
    if pixels.shape[2] == 3:
        return pixels
    weight = pixels[..., 3:].astype(np.float32) / 255
    seen = pixels[..., :3] if premultiplied else pixels[..., :3] * weight
    return np.asarray(np.rint(np.minimum(seen + 255 * (1 - weight), 255)), np.uint8)


def odd_channel(page: Any) -> str:
    """Say what is wrong with a TIFF page's fourth channel; nothing where it has none, or it is transparency.

    TIFF 6.0, ExtraSamples: 1 is alpha with which the colours are multiplied, 2 is alpha alone. Anything else is data of
    somebody's own, which must neither hide the colours nor be thrown away unasked.
    """
    if page.samplesperpixel != 4 or int(page.photometric) not in _RGB:
        return ""
    extra = tuple(int(value) for value in page.extrasamples)
    return "" if extra in _ALPHAS else f"it does not say what its fourth channel is (ExtraSamples {extra or 'missing'})"


def _quickhash(path: Path) -> str:
    """Return what tells the file from another of its name: its first and last MiB."""
    with path.open("rb") as stream:
        digest = hashlib.sha256(stream.read(1 << 20))
        stream.seek(max(0, path.stat().st_size - (1 << 20)))
        digest.update(stream.read())
    return digest.hexdigest()


def _plain(path: Path) -> tuple[tuple[_Pieces, ...], Scale, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.mode not in ("RGB", "RGBA"):
                    raise NotAnImage(f"its pixels are {image.mode}, not 8-bit RGB")
                pixels = on_white(np.asarray(image))
                dpi, kind = image.info.get("dpi", ("", "")), str(image.format)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise NotAnImage(f"Pillow refuses it: {error}") from error
    height, width, _ = pixels.shape
    scale = scale_of_tags(path, str(dpi[0]), str(dpi[1]), "inch")
    return (_Pieces(width, height, width, height, lambda _: pixels),), scale, kind


def _tiff(path: Path, file: int) -> tuple[tuple[_Pieces, ...], Scale, str]:
    try:
        with tifffile.TiffFile(path) as tiff:
            series = the_slide(tiff)
            for level in series.levels:
                if len(level.pages) != 1:
                    raise NotAnImage(f"an image of {len(level.pages)} planes (channels, depths or times), not RGB")
            pages = [level.pages[0] for level in series.levels]
            for page in pages:
                _check_is_here(page, tiff)
            scale = scale_in(path, tiff, pages[0].aspage())
            levels = tuple(_pieces(page.aspage(), file) for page in pages)
            return levels, scale, "ome-tiff" if tiff.is_ome else "tiff"
    except (NotAnImage, SlideUnreadable):
        raise
    except Exception as error:  # a damaged structure finds many ways
        raise NotAnImage(f"tifffile refuses it: {error}") from error


def _check_is_here(page: Any, tiff: Any) -> None:
    """Raise NotAnImage where a page of a multi-file OME-TIFF lies in another file than the one that is open."""
    if page is None:
        raise NotAnImage("its pixels lie in another file, which is not there")
    if page.parent.filehandle.path != tiff.filehandle.path:
        raise NotAnImage(f"its pixels lie in another file: name that one, {page.parent.filename}")


def _pieces(page: Any, file: int) -> _Pieces:
    if page.dtype != np.uint8 or page.samplesperpixel not in (3, 4) or page.imagedepth != 1:
        raise NotAnImage(f"its pixels are {page.samplesperpixel} x {page.dtype}, not 8-bit RGB")
    if int(page.photometric) not in _RGB:
        raise NotAnImage(f"its colours are {page.photometric.name}, not RGB")
    if odd_channel(page):
        raise NotAnImage(odd_channel(page))
    if int(page.planarconfig) != 1:
        raise NotAnImage("its colours lie in separate planes")
    if page.compression not in tifffile.TIFF.DECOMPRESSORS:
        raise NotAnImage(f"compression {int(page.compression)} is unknown")
    width, height = int(page.imagewidth), int(page.imagelength)
    wide, high = (page.tilewidth, page.tilelength) if page.is_tiled else (width, min(page.rowsperstrip, height))
    wide, high = int(wide), int(high)
    if wide * high * page.samplesperpixel > _MOST_SEGMENT_BYTES:
        raise NotAnImage(f"one strip or tile of it has {wide} x {high} px: convert it to a tiled TIFF")
    if len(page.dataoffsets) != (-(-width // wide)) * (-(-height // high)):
        raise NotAnImage(f"{len(page.dataoffsets)} segments do not make {width} x {height} px")
    offsets, sizes, tables = tuple(page.dataoffsets), tuple(page.databytecounts), page.jpegtables
    premultiplied = tuple(page.extrasamples) == _PREMULTIPLIED
    decode = page.decode  # knows the page's compression, predictor and colours, and holds no file

    def one(number: int) -> NDArray[np.uint8]:
        if not sizes[number]:  # never scanned
            return np.full((high, wide, 3), 255, np.uint8)
        data = os.pread(file, sizes[number], offsets[number])
        if len(data) < sizes[number]:
            raise OSError(f"the file ends {sizes[number] - len(data)} bytes too early")
        pixels, _, shape = decode(data, number, jpegtables=tables)
        if pixels is None:
            return np.full((high, wide, 3), 255, np.uint8)
        rows, columns = min(high, height - number // (-(-width // wide)) * high), wide
        if pixels.shape[1] < rows or pixels.shape[2] < min(columns, shape[2]):
            raise ValueError(f"{pixels.shape[2]} x {pixels.shape[1]} px where {columns} x {rows} were expected")
        return on_white(np.ascontiguousarray(pixels[0]), premultiplied)

    return _Pieces(width, height, wide, high, one)
