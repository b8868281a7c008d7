"""The gate through which every image comes: from files to uint8 RGB, decoded once and kept in memory while they fit.

The rules, the same in training and in extraction: 8 bits for each channel, nothing deeper is squeezed; what is
transparent is white; an image that cannot be decoded to its end is refused.
"""

from __future__ import annotations

import hashlib
import re
import threading
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mtdp.errors import ImageUnreadable

_HINT: Final = "replace the file, or remove it from the task"
# What is opened, by content: Pillow would start Ghostscript for PostScript, whatever the file's name.
FORMATS: Final = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")
_RESAMPLING: Final = {  # of Pillow: area-weighted where they shrink
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_WHITE: Final = (255, 255, 255, 255)
_DEEP_RAW_MODE: Final = re.compile(r"^(?!BGR;1[56]$).*;(12|16|24|32|64)")  # of Pillow's decoders: more than 8 bits
_BLANK_SHARE: Final = 0.9
_SEEN_PX: Final = 64  # of a side, to tell whether an image is blank


def allow_huge_images() -> None:
    """Also takes images of more than 179 million pixels, which Pillow refuses because they may be an attack."""
    Image.MAX_IMAGE_PIXELS = None


def read_rgb(path: Path, hint: str = _HINT) -> Image.Image:
    """The whole image in RGB, what is transparent in white.

    Raises:
        ImageUnreadable: no such file, not an image, a truncated or a huge one, or one of more than 8 bits per channel.
    """
    try:
        image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageUnreadable(f"{path} is huge: {error}", "if it is meant, give --huge-images") from error
    except (OSError, ValueError, SyntaxError) as error:
        said = getattr(error, "strerror", None) or error
        raise ImageUnreadable(f"{path} is not a readable image: {said}", hint) from error
    with image:
        _check_depth(path, image)
        if min(image.size) < 1:
            raise ImageUnreadable(f"{path} has no pixels ({image.width} x {image.height})", hint)
        try:
            return _on_white(image)
        except (OSError, ValueError, SyntaxError) as error:
            raise ImageUnreadable(f"{path} cannot be decoded: {error}", hint) from error


def check_image(path: Path) -> int:
    """Decode the image, so that a truncated file is found before training and not hours into it.

    Returns:
        64 bits that two files share if their pixels are equal; 0 of an image that is blank (nine tenths of it in one
        colour), since blank images are equal by nature.

    Raises:
        ImageUnreadable: as `read_rgb`.
    """
    pixels = np.asarray(read_rgb(path))
    step = max(1, min(pixels.shape[:2]) // _SEEN_PX)
    seen = pixels[::step, ::step]
    for colour in (seen[0, 0], np.median(seen, axis=(0, 1)).astype(np.uint8)):
        if float((seen == colour).all(axis=2).mean()) >= _BLANK_SHARE:
            return 0
    digest = hashlib.blake2b(f"{pixels.shape}".encode(), digest_size=8)
    digest.update(pixels.tobytes())
    return int.from_bytes(digest.digest(), "little") or 1


def load_image(path: Path, image_px: int, interpolation: str = "bilinear") -> NDArray[np.uint8]:
    """Decode to RGB and resize the shorter side to image_px: uint8[H, W, 3], min(H, W) == image_px.

    A square crop of the result, anywhere along its longer side, is the largest square crop of the original, resized
    (the paper's training transform); its centre crop is the evaluation transform of the authors' code.

    Raises:
        ImageUnreadable: as `read_rgb`.
    """
    rgb = read_rgb(path)
    factor = image_px / min(rgb.size)
    size = (max(image_px, round(rgb.width * factor)), max(image_px, round(rgb.height * factor)))
    if rgb.size != size:
        rgb = rgb.resize(size, _RESAMPLING[interpolation])
    return np.asarray(rgb)


def _on_white(image: Image.Image) -> Image.Image:
    transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if not transparent:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, _WHITE), rgba).convert("RGB")


def _check_depth(path: Path, image: Image.Image) -> None:
    """Pillow would clip such values to 255, or drop their low bits: a white image or a black one, and no word of it."""
    raw = _raw_mode(image)
    if image.mode.startswith(("I", "F")) or _DEEP_RAW_MODE.match(raw) or _deep_jpeg_2000(path, image):
        named = raw or image.mode
        raise ImageUnreadable(f"{path} has more than 8 bits per channel ({named})", "convert it to 8 bits first")


def _raw_mode(image: Image.Image) -> str:
    """What Pillow's decoder says that a pixel is in the file; empty where it does not say."""
    tiles = getattr(image, "tile", None)
    if not tiles:
        return ""
    arguments: Any = tiles[0][3]
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    if tiles[0][0] in ("ppm", "ppm_plain") and isinstance(arguments, tuple) and arguments[-1] not in (first, 255):
        return f"{first};16" if isinstance(arguments[-1], int) and arguments[-1] > 255 else str(first)
    return first if isinstance(first, str) else ""


def _deep_jpeg_2000(path: Path, image: Image.Image) -> bool:
    """Whether a component has more than 8 bits: the codestream's SIZ marker says so (ISO 15444-1, A.5.1)."""
    if image.format != "JPEG2000":
        return False
    with path.open("rb") as file:
        head = file.read(1 << 16)
    place = head.find(b"\xff\x4f\xff\x51")
    components = int.from_bytes(head[place + 40 : place + 42], "big")
    depths = head[place + 42 : place + 42 + 3 * components : 3]
    return place >= 0 and any((depth & 0x7F) + 1 > 8 for depth in depths)


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
