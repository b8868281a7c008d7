"""From image files to uint8 arrays, decoded once and kept in memory while they fit."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mtdp.errors import ImageUnreadable

_HINT = "replace the file, or remove it from the task"
_RESAMPLING = {  # of Pillow: area-weighted where they shrink
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def check_image(path: Path) -> None:
    """Decodes the image and drops it, so that a truncated file is found before training and not hours into it.

    A JPEG is decoded at an eighth of its size: all of its data is read, and the check takes half the time.

    Raises:
        ImageUnreadable: no such file, not an image, a truncated one, or one of more than 8 bits a channel.
    """
    try:
        image = Image.open(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageUnreadable(f"{path} is not a readable image: {error}", _HINT) from error
    with image:
        (width, height), mode = image.size, image.mode
        _check_depth(path, mode)
        if min(width, height) < 1:
            raise ImageUnreadable(f"{path} has no pixels ({width} x {height})", _HINT)
        try:
            image.draft(None, (1, 1))
            image.load()
        except (OSError, ValueError, SyntaxError) as error:
            raise ImageUnreadable(f"{path} cannot be decoded: {error}", _HINT) from error


def _check_depth(path: Path, mode: str) -> None:
    if mode.startswith(("I", "F")):  # Pillow would clip such values to 255: a white image, and no word of it
        raise ImageUnreadable(f"{path} has more than 8 bits a channel ({mode})", "convert it to 8 bits first")


def load_image(path: Path, image_px: int, interpolation: str = "bilinear") -> NDArray[np.uint8]:
    """Decodes to RGB and resizes the shorter side to image_px: uint8[H, W, 3], min(H, W) == image_px.

    A square crop of the result, anywhere along its longer side, is the largest square crop of the original, resized
    (the paper's training transform); its centre crop is the evaluation transform of the authors' code.

    Raises:
        ImageUnreadable: no such file, not an image, or a truncated one.
    """
    try:
        with Image.open(path) as image:
            _check_depth(path, image.mode)
            rgb = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageUnreadable(f"{path} cannot be decoded: {error}", _HINT) from error
    factor = image_px / min(rgb.size)
    size = (max(image_px, round(rgb.width * factor)), max(image_px, round(rgb.height * factor)))
    if rgb.size != size:
        rgb = rgb.resize(size, _RESAMPLING[interpolation])
    return np.asarray(rgb)


class ImageCache:
    """`load_image` that remembers, up to a budget; any number of threads may ask at once.

    Nothing is ever dropped: images are drawn uniformly, so no rule of eviction would be better than none.
    """

    def __init__(self, image_px: int, budget_bytes: int, interpolation: str = "bilinear") -> None:
        self.image_px = image_px
        self._interpolation = interpolation
        self._room_bytes = budget_bytes
        self._images: dict[Path, NDArray[np.uint8]] = {}
        self._lock = threading.Lock()

    def get(self, path: Path) -> NDArray[np.uint8]:
        """uint8[H, W, 3] as `load_image` gives it; not yours to change."""
        known = self._images.get(path)
        if known is not None:
            return known
        image = load_image(path, self.image_px, self._interpolation)
        image.flags.writeable = False
        with self._lock:
            if path not in self._images and image.nbytes <= self._room_bytes:
                self._images[path] = image
                self._room_bytes -= image.nbytes
        return image
