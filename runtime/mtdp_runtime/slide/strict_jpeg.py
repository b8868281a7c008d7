"""A JPEG out of a TIFF, decoded so that damage is an error.

libjpeg calls damaged entropy-coded data a warning and fills the rest of the picture with grey. A decoder that ignores
warnings gives a wrong tile then, and nobody is told; OpenSlide takes them as errors, and so does this one.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import simplejpeg
from numpy.typing import NDArray

_SOI: Final = b"\xff\xd8"
_EOI: Final = b"\xff\xd9"
_APP0, _SOS = 0xE0, 0xDA
# Adobe's marker (ITU-T T.872, 6.5.3) says how the three components hold their colours: 0 = RGB, 1 = YCbCr.
_ADOBE: Final = {
    "RGB": b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00",
    "YCBCR": b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x01",
}


def decode_strictly(data: bytes, tables: bytes | None, colour_space: str) -> NDArray[np.uint8]:
    """Return uint8[H, W, 3] RGB.

    Args:
        data: a TIFF tile, SOI to EOI, perhaps without its tables.
        tables: the TIFF's JPEGTables, SOI to EOI (TIFF Technical Note 2).
        colour_space: RGB or YCBCR, as the TIFF says; it counts more than what the JPEG says.

    Raises:
        ValueError: it is damaged, or no JPEG of three components that the TIFF's word can be put into.
    """
    scan = _start_of_scan(data, colour_space)
    if tables is not None and not (tables.startswith(_SOI) and tables.endswith(_EOI)):
        raise ValueError("the JPEG tables are not between SOI and EOI")
    common = b"" if tables is None else tables[2:-2]
    stream = b"".join((_SOI, common, data[2:scan], _ADOBE[colour_space], data[scan:]))
    picture: NDArray[np.uint8] = simplejpeg.decode_jpeg(stream, "RGB", strict=True)
    return picture


def _start_of_scan(data: bytes, colour_space: str) -> int:
    """Return where the SOS marker stands: Adobe's marker goes right before it, so that none comes after ours."""
    if not data.startswith(_SOI):
        raise ValueError("no JPEG: it does not begin with SOI")
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == _SOS:
            return place
        if marker == _APP0 and colour_space == "RGB":
            raise ValueError("JFIF, which is YCbCr, where the TIFF says RGB")
        place += 1 if marker == 0xFF else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    raise ValueError("no JPEG: no scan in it")
