"""One JPEG 2000 tile out of a TIFF (Aperio's compressions, or 34712); damage that can be seen is an error.

OpenJPEG decodes a codestream that breaks off, or whose packets were overwritten, as far as it goes, and OpenSlide takes
what comes. So the codestream's frame is checked first (ITU-T T.800, Annex A): the main header, the chain of tile-part
lengths up to the end marker, and that no marker stands among the packets, where the coder never leaves one. What lies
within packets has no checksum: a byte changed there that forms no marker is decoded by every decoder alike.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.slide.probe import UnknownKind

_SOC, _SIZ, _COD, _SOT, _SOD, _EOC = 0xFF4F, 0xFF51, 0xFF52, 0xFF90, 0xFF93, 0xFFD9
_HOLE_BYTES: Final = 512  # a whole sector of zeros is a hole that a broken copy left
_MOST_PADDING_BYTES: Final = 64  # zeros behind the end marker: writers fill up to 2, 4, 16 or 64 bytes
_JP2: Final = b"\0\0\0\x0cjP  \r\n\x87\n"  # ITU-T T.800, Annex I: boxes around a codestream
_SYCC: Final = 18  # EnumCS of a colour specification box


class Subsampled(UnknownKind):
    """Components of different sizes: OpenSlide repeats the samples, imagecodecs does not decode them."""


@dataclass(frozen=True, slots=True)
class Codestream:
    """What a main header says, and where the first tile-part begins."""

    width: int
    height: int
    components: tuple[tuple[int, int, int], ...]  # bits less 1 (T.800's Ssiz), horizontal, vertical subsampling
    packet_markers: bool  # SOP or EPH markers may stand among the packets
    transformed: bool  # the coder transformed the components (MCT), so the decoder gives RGB
    packets: int  # how many there are at least: one of each component, resolution and layer
    tile_parts_at: int


def read_header(data: bytes) -> Codestream:
    """Read a codestream's main header.

    Raises:
        ValueError: it is none.
    """
    if _word(data, 0) != _SOC or _word(data, 2) != _SIZ:
        raise ValueError("no JPEG 2000 codestream")
    at, width, height, style, transformed, layers, resolutions = 2, 0, 0, 0, False, 1, 1
    components: tuple[tuple[int, int, int], ...] = ()
    while (marker := _word(data, at)) != _SOT:
        length = _word(data, at + 2)
        end = at + 2 + length
        if not 0xFF50 <= marker <= 0xFF70 or length < 3 or end > len(data):
            raise ValueError("a damaged main header")
        if marker == _SIZ:
            right, bottom, left, top = (int.from_bytes(data[at + 6 + 4 * i : at + 10 + 4 * i], "big") for i in range(4))
            width, height = right - left, bottom - top
            sizes = data[at + 40 : end]
            components = tuple((sizes[i], sizes[i + 1], sizes[i + 2]) for i in range(0, len(sizes) - 2, 3))
        elif marker == _COD:
            style, layers, resolutions = data[at + 4], int.from_bytes(data[at + 6 : at + 8], "big"), data[at + 9] + 1
            transformed = data[at + 8] == 1
        at = end
    packets = len(components) * layers * resolutions
    return Codestream(width, height, components, bool(style & 0b110), transformed, packets, at)


def decode_tile(data: bytes, ycbcr: bool, out: NDArray[np.uint8]) -> None:
    """Decode a tile.

    Args:
        data: the codestream, or a JP2 file around one.
        ycbcr: the components are Y, Cb, Cr (Aperio's compression 33003), unless the codestream transforms them itself.
        out: uint8[height, width, 3] for RGB, or uint8[height, width, 1]; its content is undefined after an error.

    Raises:
        UnknownKind: the components are not of 8 bits, or not all of the same size, or not so many.
        ValueError: damaged, or of another size.
    """
    data, ycbcr = _codestream(data, ycbcr)
    header = read_header(data)
    check_kind(header, out.shape[2])
    if (header.height, header.width) != out.shape[:2]:
        raise ValueError(f"a tile of {header.width} x {header.height} px, {out.shape[1]} x {out.shape[0]} was expected")
    _check_frame(data, header)
    try:
        decoded = imagecodecs.jpeg2k_decode(data, numthreads=1)
    except imagecodecs.Jpeg2kError as error:
        raise ValueError(str(error)) from error
    if decoded.ndim == 2:
        decoded = decoded[..., None]
    if decoded.shape != out.shape or decoded.dtype != np.uint8:
        raise ValueError(f"decoded to {decoded.dtype}{list(decoded.shape)}")
    if ycbcr and not header.transformed and out.shape[2] == 3:
        _to_rgb(decoded, out)
    else:
        out[...] = decoded


def check_kind(header: Codestream, samples: int) -> None:
    """Raise UnknownKind unless the components are so many, of 8 bits and all of the full size."""
    if header.components == ((7, 1, 1),) * samples:
        return
    if [bits for bits, _, _ in header.components] == [7] * samples:
        raise Subsampled(f"JPEG 2000 components (bits - 1, subsampling) {header.components}")
    bits = ", ".join(str((less_one & 0x7F) + 1) for less_one, _, _ in header.components)
    raise UnknownKind(
        f"JPEG 2000 of {len(header.components)} components ({bits} bits) where {samples} of 8 were expected"
    )


def _codestream(data: bytes, ycbcr: bool) -> tuple[bytes, bool]:
    """Return what lies in a JP2 file's boxes, and whether its components are Y, Cb, Cr; other data as it is."""
    if data[: len(_JP2)] != _JP2:
        return data, ycbcr
    at, colours = 0, data.find(b"colr\x01")
    if colours >= 0 and len(data) >= colours + 11:
        ycbcr = int.from_bytes(data[colours + 7 : colours + 11], "big") == _SYCC
    while at + 8 <= len(data):
        length, kind, head = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], 8
        if length == 1:
            length, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        end = at + length if length else len(data)
        if end > len(data) or end < at + head:
            raise ValueError("a JP2 file that breaks off")
        if kind == b"jp2c":
            return data[at + head : end], ycbcr
        at = end
    raise ValueError("a JP2 file without a codestream")


def _check_frame(data: bytes, header: Codestream) -> None:
    """Raise ValueError unless tile-part follows tile-part up to the end marker, with nothing but packets in them."""
    # A packet without data is a zero byte, too: as many of them as there are may follow each other.
    hole = bytes(max(_HOLE_BYTES, header.packets + _MOST_PADDING_BYTES))
    if hole in data:
        raise ValueError(f"{len(hole)} zero bytes in a row")
    at = header.tile_parts_at
    foreign = rb"\xff[\x90\x93-\xff]" if header.packet_markers else rb"\xff[\x90-\xff]"
    whole = data.rstrip(b"\0")
    while (marker := _word(data, at)) == _SOT:
        length = int.from_bytes(data[at + 6 : at + 10], "big")
        end = at + length if length else len(whole) - 2  # 0: up to the end marker
        if end > len(data) or end < at + 14:
            raise ValueError("it breaks off")
        packets = at + 12
        while (marker := _word(data, packets)) != _SOD:
            length = _word(data, packets + 2)
            if not 0xFF50 <= marker <= 0xFF70 or length < 3 or packets >= end:
                raise ValueError("a damaged tile-part header")
            packets += 2 + length
        if re.compile(foreign).search(data, packets + 2, end):
            raise ValueError("a marker among its packets")
        at = end
    behind = data[at + 2 :]
    padded = len(behind) <= 1 or (len(behind) <= _MOST_PADDING_BYTES and not behind.strip(b"\0"))
    if marker != _EOC or not padded:
        raise ValueError("no end marker where one was expected")


def _word(data: bytes, at: int) -> int:
    """Return two bytes as a number; -1 behind the end."""
    return int.from_bytes(data[at : at + 2], "big") if at + 2 <= len(data) else -1


def _to_rgb(ycbcr: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Convert by ITU-T T.871 with chroma rounded to grey levels first, as OpenSlide does."""
    red, green, blue = _chroma()
    y, cb, cr = (ycbcr[..., i] for i in range(3))
    for channel, shift in enumerate((red[cr], green[cb, cr], blue[cb])):
        out[..., channel] = np.clip(shift + y, 0, 255)


@lru_cache(maxsize=1)
def _chroma() -> tuple[NDArray[np.int16], NDArray[np.int16], NDArray[np.int16]]:
    """Return what to add to Y: for red int16[Cr], for green int16[Cb, Cr], for blue int16[Cb]."""
    c = np.arange(256) - 128.0
    green = np.floor(-0.34414 * c[:, None] - 0.71414 * c[None, :] + 0.5)
    return np.rint(1.402 * c).astype(np.int16), green.astype(np.int16), np.rint(1.772 * c).astype(np.int16)
