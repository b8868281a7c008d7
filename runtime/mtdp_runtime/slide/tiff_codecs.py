"""One strip or tile of a TIFF, decoded strictly: what is damaged, or too short, is an error and never a picture.

Where a codec has a checksum it is verified, and what it gives must be as long as the pixels are. LZW and PackBits have
none, and Zstandard and LZMA need not, so what they give must be exactly as long: a wrong byte mostly changes the
length. What no codec can see (a wrong value among uncompressed pixels, a flipped bit in a WebP) no reader can.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable
from typing import Final

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.slide import tile_jpeg, tile_jpeg2000
from mtdp_runtime.slide.pixel_kind import JPEG, JPEG_2000
from mtdp_runtime.slide.probe import UnknownKind

_NONE, _LZW, _PACKBITS, _ADOBE_DEFLATE, _DEFLATE, _LZMA, _ZSTD = 1, 5, 32773, 8, 32946, 34925, 50000
_WEBP: Final = frozenset({50001, 34927})
_JPEG_XL: Final = frozenset({50002, 52546})
_YCBCR_JPEG_2000: Final = 33003
_EXACT: Final = frozenset({_LZW, _PACKBITS, _LZMA, _ZSTD})
_HOLE: Final = bytes(512)  # a whole sector of zeros, as a broken copy leaves it: no coder of pictures writes it
_HORIZONTAL: Final = 2  # Predictor: differences along the row


def _inflate(data: bytes, most_bytes: int) -> bytes:
    stream = zlib.decompressobj()
    out = stream.decompress(data, most_bytes + 1)
    if not stream.eof:  # only at the end is the checksum compared
        raise ValueError(f"zlib: more than {most_bytes} bytes" if len(out) > most_bytes else "zlib: it breaks off")
    return out


_BYTES: Final[dict[int, Callable[[bytes, int], bytes]]] = {
    _NONE: lambda data, _: data,
    _LZW: lambda data, _: bytes(imagecodecs.lzw_decode(data)),
    _PACKBITS: lambda data, _: bytes(imagecodecs.packbits_decode(data)),
    _ADOBE_DEFLATE: _inflate,
    _DEFLATE: _inflate,
    _LZMA: lambda data, _: lzma.decompress(data),
    _ZSTD: lambda data, most: bytes(imagecodecs.zstd_decode(data)),
}
_PICTURES: Final[dict[int, Callable[[bytes], NDArray[np.uint8]]]] = {
    **dict.fromkeys(_WEBP, imagecodecs.webp_decode),
    **dict.fromkeys(_JPEG_XL, imagecodecs.jpegxl_decode),
}


def check_codec(compression: int, predictor: int) -> None:
    """Raise UnknownKind where a compression or a predictor is not decoded here."""
    if compression not in _BYTES and compression not in _PICTURES and compression not in {JPEG, *JPEG_2000}:
        raise UnknownKind(f"compressed in a way that is not read here (TIFF compression {compression})")
    if predictor not in (1, _HORIZONTAL):
        raise UnknownKind(f"coded with predictor {predictor}, which is for floating-point numbers")


def unpack(data: bytes, compression: int, sizes_bytes: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return the bytes of a segment: at least the first of `sizes_bytes`, which are all those that it may have.

    Raises:
        ValueError: damaged.
    """
    out = np.frombuffer(_BYTES[compression](data, max(sizes_bytes)), np.uint8)
    if len(out) < sizes_bytes[0]:
        raise ValueError(f"{len(out)} bytes where {sizes_bytes[0]} were expected")
    if compression in _EXACT and len(out) not in sizes_bytes:
        raise ValueError(f"{len(out)} bytes where {sizes_bytes[-1]} were expected")
    return out


def is_of_bytes(compression: int) -> bool:
    """Say whether a codec knows bytes only, and nothing of pixels."""
    return compression in _BYTES


def decode_bytes(
    data: bytes, compression: int, predictor: int, shape: tuple[int, int, int], most_rows: int
) -> NDArray[np.uint8]:
    """Decode a segment of a codec that knows bytes only.

    Args:
        shape: rows, columns and samples that are wanted.
        most_rows: rows of a whole segment; the last strip of a level may be written whole.

    Returns: uint8[shape].

    Raises:
        ValueError: damaged.
    """
    row_bytes = shape[1] * shape[2]
    flat = unpack(data, compression, (shape[0] * row_bytes, most_rows * row_bytes))
    pixels = flat[: shape[0] * row_bytes].reshape(shape)
    return np.cumsum(pixels, axis=1, dtype=np.uint8) if predictor == _HORIZONTAL else pixels


def decode_picture(
    data: bytes, compression: int, tables: bytes | None, colour_space: str, shape: tuple[int, int, int], most_rows: int
) -> NDArray[np.uint8]:
    """Decode a segment that is a picture of its own: JPEG, JPEG 2000, WebP or JPEG XL.

    Args:
        colour_space: as `tile_jpeg.decode_tile` takes it.
        shape: rows, columns and samples that are wanted; `most_rows` as for `decode_bytes`.

    Returns: uint8[rows or more, columns, samples], RGB or grey.

    Raises:
        ValueError: damaged.
    """
    rows, columns, samples = shape
    if compression == JPEG:
        head = tile_jpeg.read_head(data)
        out = np.empty((head.height if rows < head.height <= most_rows else rows, columns, samples), np.uint8)
        tile_jpeg.decode_tile(data, tables, colour_space, 1, out)
        return out
    if compression in JPEG_2000:
        out = np.empty((_rows_of(data, rows, most_rows), columns, samples), np.uint8)
        tile_jpeg2000.decode_tile(data, compression == _YCBCR_JPEG_2000 or colour_space == "YCBCR", out)
        return out
    if _HOLE in data:
        raise ValueError(f"{len(_HOLE)} zero bytes in a row")
    pixels = np.asarray(_PICTURES[compression](data))
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (columns, samples) or not rows <= pixels.shape[0] <= most_rows:
        raise ValueError(f"decoded to {pixels.dtype}{list(pixels.shape)}, uint8{list(shape)} was expected")
    return pixels


def _rows_of(data: bytes, rows: int, most_rows: int) -> int:
    """Return how many rows a JPEG 2000 strip has: the last one of a level may be whole."""
    at = data.find(b"\xff\x4f\xff\x51", 0, 1024)  # a JP2 file's boxes come first
    height = tile_jpeg2000.read_header(data[at:]).height if at >= 0 else rows
    return height if rows < height <= most_rows else rows
