"""A PNG or a JPEG, decoded whole and strictly: what breaks off, or was changed, is an error and never a picture."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from mtdp_runtime.slide import tile_jpeg
from mtdp_runtime.slide.channels import GREY, check_bright
from mtdp_runtime.slide.probe import UnknownKind
from mtdp_runtime.slide.scale import Scale, scale_of_tags
from mtdp_runtime.slide.tiff_pieces import Pieces, on_white

PNG_MAGIC: Final = b"\x89PNG\r\n\x1a\n"
JPEG_MAGIC: Final = b"\xff\xd8\xff"


def levels_of_picture(path: Path) -> tuple[tuple[Pieces, ...], Scale, str]:
    """Return a picture as its only level, its scale, and "PNG" or "JPEG".

    Raises:
        UnknownKind: neither of them, or not 8-bit RGB.
        SlideUnreadable: its pixels are not square.
        Exception: what its decoder says of damage.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            opened = Image.open(path, formats=("PNG", "JPEG"))
        except Image.DecompressionBombError as error:
            raise UnknownKind(f"too large a picture to be decoded in one piece ({error}): tile it") from error
        with opened as image:
            if image.format == "PNG":
                image.load()  # which is strict once: a second try gives what the first one left
            _check(image)
            if image.format == "PNG" and _depth(path) == 16:  # of which Pillow would drop the lower byte
                raise UnknownKind(f"its pixels are {image.mode} of 16 bits, not 8-bit RGB")
            # A JPEG behind which others lie, as phones write it, is "MPO" to Pillow: the first is the picture.
            kind, dpi = "PNG" if image.format == "PNG" else "JPEG", image.info.get("dpi", ("", ""))
            pixels = _jpeg(path) if kind == "JPEG" else _png(image)
            if image.mode == "L":
                check_bright([pixels], GREY)
    height, width, _ = pixels.shape
    scale = scale_of_tags(str(dpi[0]), str(dpi[1]), "inch")
    return (Pieces(width, height, width, height, lambda _: pixels),), scale, kind


def _check(image: Image.Image) -> None:
    if image.mode not in ("RGB", "RGBA", "L", "P"):
        raise UnknownKind(f"its pixels are {image.mode}, not 8-bit RGB")
    turned = 1
    with contextlib.suppress(Exception):  # what cannot be read as EXIF says nothing of the picture
        turned = image.getexif().get(ExifTags.Base.Orientation, 1)
    if turned not in (0, 1):
        raise UnknownKind(f"the picture is to be turned or mirrored before it is seen (Orientation {turned})")


def _depth(path: Path) -> int:
    """Return how many bits a PNG's samples have: IHDR is its first chunk."""
    with path.open("rb") as stream:
        return stream.read(25)[24]


def _png(image: Image.Image) -> NDArray[np.uint8]:
    """Return uint8[H, W, 3]; zlib compares the checksum of the pixels."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.asarray(image)
    return on_white(np.asarray(image.convert("RGBA")))  # a colour may be said to be transparent


def _jpeg(path: Path) -> NDArray[np.uint8]:
    """Return uint8[H, W, 3]."""
    data = path.read_bytes()
    head = tile_jpeg.read_head(data)
    if len(head.components) not in (1, 3):
        raise UnknownKind(f"a JPEG of {len(head.components)} components, not RGB")
    pixels = np.empty((head.height, head.width, len(head.components)), np.uint8)
    tile_jpeg.decode_tile(data, None, "YCBCR", 1, pixels)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
