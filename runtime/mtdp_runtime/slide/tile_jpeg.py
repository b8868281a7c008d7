"""One JPEG tile out of a TIFF: whole, or at 1/2, 1/4 or 1/8 of its size; damage is an error.

libjpeg-turbo reduces within the inverse cosine transform, leaving out the frequencies that the target cannot show, for
a quarter to half of the time of a full decode followed by averaging. Its pixels are not the averages to the last grey
level, so the output states where it was used.

libjpeg calls damaged entropy-coded data a warning and fills the rest of the picture with grey. A decoder that ignores
warnings gives a wrong tile then, and nobody is told; this one takes them as errors.

The JPEG's header is read first: a picture of another size or of other components than the tile's is an error, too, and
what the header says of its colours stands above what the TIFF says (see `colours_of`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from mtdp_runtime.slide.probe import UnknownKind

REDUCTIONS: Final = (2, 4, 8)
_SOI: Final = b"\xff\xd8"
_APP0, _APP14, _COM, _SOS, _EOI = 0xE0, 0xEE, 0xFE, 0xDA, 0xD9
_NOT_A_FRAME: Final = frozenset({0xC4, 0xC8, 0xCC})  # DHT, JPG, DAC: the other markers from C0 to CF begin a frame
# What libjpeg does not decode; it does baseline and progressive, of Huffman or arithmetic coding.
_KINDS: Final = {
    **dict.fromkeys((0xC3, 0xC7), "lossless JPEG"),
    **dict.fromkeys((0xC5, 0xC6), "hierarchical JPEG"),
    **dict.fromkeys((0xCB, 0xCD, 0xCE, 0xCF), "lossless or hierarchical JPEG"),
}
# Adobe's marker (ITU-T T.872, 6.5.3) says how the colours are held: transform 0 is RGB, 1 is YCbCr.
_ADOBE: Final = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
_COLOUR_SPACE: Final = {"RGB": _ADOBE + b"\x00", "YCBCR": _ADOBE + b"\x01", "GRAY": b""}


@dataclass(frozen=True, slots=True)
class JpegHead:
    """What a JPEG says of itself before its first scan."""

    kind: int  # the frame's marker, SOF
    bits: int
    width: int
    height: int
    components: tuple[tuple[int, int], ...]  # identifier, and sampling factors (horizontal << 4 | vertical)
    jfif: bool
    adobe: int | None  # the transform that Adobe's marker names
    segments: bytes  # all that stands between the first and the last marker, without notes

    @property
    def subsampled(self) -> bool:
        """Say whether some components have fewer samples than others."""
        return len({factors for _, factors in self.components}) > 1


def decode_tile(data: bytes, tables: bytes | None, colour_space: str, reduction: int, out: NDArray[np.uint8]) -> None:
    """Decode a TIFF's JPEG tile at 1/reduction of its size.

    Args:
        data: the tile; abbreviated where `tables` holds its quantisation and Huffman tables (TIFF Technical Note 2).
        colour_space: "RGB", "YCBCR" or "GRAY", as the file around it says, or nothing; see `colours_of`.
        reduction: 1, or one of `REDUCTIONS`.
        out: uint8[height / reduction, width / reduction, 3] (1 for "GRAY"), filled with RGB or grey; its content is
            undefined after an error.

    Raises:
        UnknownKind: a JPEG of a kind that is not decoded here.
        ValueError: no JPEG, of another size or other components, damaged, or nothing says what its colours are.
    """
    head = read_head(data)
    check_kind(head, out.shape[2])
    height, width = out.shape[:2]
    if (head.width, head.height) != (width * reduction, height * reduction):
        raise ValueError(
            f"a JPEG of {head.width} x {head.height} px, {width * reduction} x {height * reduction} px were expected"
        )
    colours = colours_of(head, colour_space)
    if not colours:
        raise ValueError("nothing says what its colours are")
    parts = (_SOI, _COLOUR_SPACE[colours], _segments_of_tables(tables), head.segments)
    least = {"min_height": height, "min_width": width} if reduction > 1 else {}
    wanted = "GRAY" if colours == "GRAY" else "RGB"
    try:
        decoded = simplejpeg.decode_jpeg(b"".join(parts), wanted, buffer=out, strict=True, **least)
    except ValueError as error:
        if "subsampling" in str(error):  # 4 x 2, say, which libjpeg itself decodes and its faster interface does not
            factors = ", ".join(f"{both >> 4} x {both & 15}" for _, both in head.components)
            raise UnknownKind(f"JPEG with sampling factors {factors}, which are not read") from error
        raise
    if decoded.shape != out.shape:
        raise ValueError(f"a JPEG of {decoded.shape} at 1/{reduction}, {out.shape} was expected")


def check_kind(head: JpegHead, samples: int) -> None:
    """Raise UnknownKind unless it is decoded here: 8 bits, of so many components."""
    if head.bits != 8:
        raise UnknownKind(f"JPEG of {head.bits} bits per sample (8 are read)")
    if len(head.components) != samples:
        raise UnknownKind(f"JPEG of {len(head.components)} components where {samples} were expected")
    if head.kind in _KINDS:
        raise UnknownKind(f"{_KINDS[head.kind]} (SOF{head.kind - 0xC0})")


def colours_of(head: JpegHead, said: str) -> str:
    """Return how the components hold the colours: "RGB", "YCBCR" or "GRAY".

    The JPEG's own word counts first (`own_colours`). Where it says nothing, what the file around it says decides.

    >>> from dataclasses import replace
    >>> plain = JpegHead(0xC0, 8, 16, 16, ((1, 0x11), (2, 0x11), (3, 0x11)), False, None, b"")
    >>> colours_of(plain, "RGB"), colours_of(replace(plain, jfif=True), "RGB")
    ('RGB', 'YCBCR')
    """
    return own_colours(head) or said


def own_colours(head: JpegHead) -> str:
    """Return "RGB", "YCBCR" or "GRAY" as a JPEG says itself; nothing where it does not say, or contradicts itself.

    Components named R, G and B are, whatever markers stand there: nobody names differences of colours so. Then JFIF
    (ITU-T T.871) is YCbCr, and Adobe's marker names its transform. Where both stand and differ, or neither does,
    subsampled components still are YCbCr: nobody subsamples green and blue.
    """
    if len(head.components) == 1:
        return "GRAY"
    if bytes(name for name, _ in head.components) == b"RGB":
        return "RGB"
    words = {"YCBCR"} if head.jfif else set()
    if head.adobe in (0, 1):
        words.add(("RGB", "YCBCR")[head.adobe])
    if len(words) == 1:
        return words.pop()
    return "YCBCR" if head.subsampled else ""


@lru_cache(maxsize=64)
def _segments_of_tables(tables: bytes | None) -> bytes:
    """The tables are the same for every tile of a level."""
    return b"" if tables is None else _walk(tables)[0]


def read_head(data: bytes) -> JpegHead:
    """Read a JPEG's markers up to its first scan.

    Raises:
        ValueError: it is none, or breaks off.
    """
    segments, frame, jfif, adobe = _walk(data)
    if frame is None:
        raise ValueError("no JPEG frame")
    marker, content = frame
    count = content[5] if len(content) > 5 else 0
    if not count or len(content) != 6 + 3 * count:
        raise ValueError("a damaged JPEG frame header")
    components = tuple((content[i], content[i + 1]) for i in range(6, len(content), 3))
    height, width = int.from_bytes(content[1:3], "big"), int.from_bytes(content[3:5], "big")
    return JpegHead(marker, content[0], width, height, components, jfif, adobe, segments)


def _walk(stream: bytes) -> tuple[bytes, tuple[int, bytes] | None, bool, int | None]:
    """Return what `JpegHead.segments` is, the frame's marker and content, and what the stream says of its colours."""
    if stream[:2] != _SOI:
        raise ValueError("no JPEG")
    kept: list[bytes] = []
    at, frame, jfif, adobe = 2, None, False, None
    while at + 4 <= len(stream):
        marker = stream[at + 1]
        if stream[at] != 0xFF or marker == 0x00:
            raise ValueError("no JPEG marker where one was expected")
        if marker == 0xFF:  # a fill byte (ITU-T T.81, B.1.1.2)
            at += 1
            continue
        if marker == _SOS:
            kept.append(stream[at:])
            break
        if marker == _EOI:
            break
        end = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        content = stream[at + 4 : end]
        if marker == _APP0:
            jfif = jfif or content[:5] == b"JFIF\0"
        elif marker == _APP14:
            adobe = content[11] if content[:5] == b"Adobe" and len(content) >= 12 else adobe
        elif not 0xE0 <= marker <= 0xEF and marker != _COM:  # notes of applications, which say nothing of the pixels
            kept.append(stream[at:end])
        if 0xC0 <= marker <= 0xCF and marker not in _NOT_A_FRAME:
            frame = (marker, content)
        at = end
    return b"".join(kept), frame, jfif, adobe
