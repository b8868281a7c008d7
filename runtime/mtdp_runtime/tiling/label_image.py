"""A label image: its non-zero pixels are tissue."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mtdp_runtime.errors import UsageError

# What Pillow decodes by itself: for an EPS, whatever its name, it would start Ghostscript.
_KINDS: Final = ("PNG", "TIFF", "JPEG", "BMP", "GIF", "WEBP")
_MOST_PX: Final = 2**30  # Pillow holds 1 to 4 bytes for each
_STRIP_PX: Final = 2**24  # turned into labels at once
_UNLIMITED: Final = threading.Lock()


def read_labels(path: Path) -> NDArray[np.bool_]:
    """Return bool[H, W]: where any colour is not 0, and nothing says that the pixel is transparent.

    Raises:
        UsageError: not an image of a kind that is read, damaged, or too large to be held in memory.
    """
    try:
        with _UNLIMITED, _no_limit(), Image.open(path, formats=_KINDS) as image:
            if image.width * image.height > _MOST_PX:
                raise UsageError(
                    f"{path}: {image.width} x {image.height} px is too large a mask",
                    hint=f"Scale it down, to {_MOST_PX // 10**6} million pixels or fewer: it need not be as fine as "
                    "the slide.",
                )
            image.load()
            return _labels(image)
    except (OSError, ValueError, SyntaxError, MemoryError) as error:
        raise UsageError(
            f"{path}: neither GeoJSON (*.geojson) nor an image that can be read: {error or type(error).__name__}",
            hint="A mask is QuPath's GeoJSON, or a PNG whose non-zero pixels are tissue.",
        ) from error


@contextlib.contextmanager
def _no_limit() -> Iterator[None]:
    """Lift Pillow's limit of pixels, which is not ours; it counts when a file is opened, and again in some pages."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _labels(image: Image.Image) -> NDArray[np.bool_]:
    labels = np.empty((image.height, image.width), np.bool_)
    bands = image.getbands()
    alpha = bands.index("A") if "A" in bands else None
    rows = max(1, _STRIP_PX // image.width)
    for top in range(0, image.height, rows):
        bottom = min(image.height, top + rows)
        pixels = np.asarray(image.crop((0, top, image.width, bottom)))  # a palette image gives its indices
        if pixels.ndim == 2:
            np.not_equal(pixels, 0, out=labels[top:bottom])
            continue
        colours = [i for i in range(pixels.shape[2]) if i != alpha]
        found = pixels[..., colours[0]] != 0
        for i in colours[1:]:
            found |= pixels[..., i] != 0
        labels[top:bottom] = found if alpha is None else found & (pixels[..., alpha] != 0)
    return labels
