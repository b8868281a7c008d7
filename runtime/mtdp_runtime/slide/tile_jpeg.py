"""One JPEG tile out of a TIFF: whole, or at 1/2, 1/4 or 1/8 of its size; damage is an error.

libjpeg-turbo reduces within the inverse cosine transform, leaving out the frequencies that the target cannot show, for
a quarter to half of the time of a full decode followed by averaging. Its pixels are not the averages to the last grey
level, so the output states where it was used.

libjpeg calls damaged entropy-coded data a warning and fills the rest of the picture with grey. A decoder that ignores
warnings gives a wrong tile then, and nobody is told; OpenSlide takes them as errors, and so does this one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
import simplejpeg
from numpy.typing import NDArray

REDUCTIONS: Final = (2, 4, 8)
_SOI: Final = b"\xff\xd8"
_APP0, _APP14, _SOS, _EOI = 0xE0, 0xEE, 0xDA, 0xD9
# Adobe's marker (ITU-T T.872, 6.5.3) says how the colours are held: transform 0 is RGB, 1 is YCbCr.
_ADOBE: Final = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
_COLOUR_SPACE: Final = {"RGB": _ADOBE + b"\x00", "YCBCR": _ADOBE + b"\x01"}


def decode_tile(data: bytes, tables: bytes | None, colour_space: str, reduction: int, out: NDArray[np.uint8]) -> None:
    """Decode a TIFF's JPEG tile at 1/reduction of its size.

    Args:
        data: the tile; abbreviated where `tables` holds its quantisation and Huffman tables (TIFF Technical Note 2).
        colour_space: "RGB" or "YCBCR", as the TIFF says it; what the tile says of it is left out.
        reduction: 1, or one of `REDUCTIONS`.
        out: uint8[height / reduction, width / reduction, 3], filled with RGB; its content is undefined after an error.

    Raises:
        ValueError: not such a JPEG, of another size, or damaged.
    """
    parts = (_SOI, _COLOUR_SPACE[colour_space], _segments_of_tables(tables), _segments(data))
    height, width = out.shape[:2]
    least = {"min_height": height, "min_width": width} if reduction > 1 else {}
    decoded = simplejpeg.decode_jpeg(b"".join(parts), "RGB", buffer=out, strict=True, **least)
    if decoded.shape != out.shape:
        raise ValueError(f"a JPEG of {decoded.shape} at 1/{reduction}, {out.shape} was expected")


@lru_cache(maxsize=64)
def _segments_of_tables(tables: bytes | None) -> bytes:
    """The tables are the same for every tile of a level."""
    return b"" if tables is None else _segments(tables)


def _segments(stream: bytes) -> bytes:
    """Return what stands between a JPEG's first and last marker, without what it says of its colours."""
    if stream[:2] != _SOI:
        raise ValueError("no JPEG")
    kept, at = [], 2
    while at + 4 <= len(stream):
        marker = stream[at + 1]
        if stream[at] != 0xFF or marker in (0x00, 0xFF):
            raise ValueError("no JPEG marker where one was expected")
        if marker == _SOS:
            kept.append(stream[at:])
            break
        if marker == _EOI:
            break
        end = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        if marker not in (_APP0, _APP14):
            kept.append(stream[at:end])
        at = end
    return b"".join(kept)
