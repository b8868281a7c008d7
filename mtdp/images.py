"""The gate through which every image comes: from files to uint8 RGB, decoded once and kept in memory while they fit.

The rules, the same in training and in extraction: 8 bits for each channel, nothing deeper is squeezed; what is
transparent is white; one picture a file, not turned; an image that cannot be decoded to its end is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import struct
import threading
import warnings
from pathlib import Path
from typing import Any, Final

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base as Tag

from mtdp.errors import ImageUnreadable

_HINT: Final = "replace the file, or remove it from the task"
# What is opened, by content: Pillow would start Ghostscript for PostScript, whatever the file's name.
FORMATS: Final = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")
_RESAMPLING: Final = {  # of Pillow: area-weighted where they shrink
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# What Pillow raises on damaged files: its formats share no class of errors.
_BROKEN: Final = (OSError, ValueError, SyntaxError, TypeError, LookupError, EOFError, ArithmeticError, struct.error)
_WHITE: Final = (255, 255, 255, 255)
_DEEP_RAW_MODE: Final = re.compile(r"^(?!BGR;1[56]$).*;(12|16|24|32|64)")  # of Pillow's decoders: more than 8 bits
_UNSIGNED: Final = (1, 4)  # values of TIFF's SampleFormat: 4 is "void", unstated
_REDUCED_OR_MASK: Final = 1 | 4  # bits of TIFF's NewSubfileType
_DAMAGE: Final = re.compile("corrupt|premature", re.IGNORECASE)  # in what libjpeg warns of
_BLANK_SHARE: Final = 0.9
_SEEN_PX: Final = 64  # of a side, to tell whether an image is blank

# Pillow warns of large images and odd ones: here an image is taken or refused, and by its name.
warnings.filterwarnings("ignore", module=r"PIL\.")


def allow_huge_images() -> None:
    """Also takes images of more than 179 million pixels, which Pillow refuses because they may be an attack."""
    Image.MAX_IMAGE_PIXELS = None


def read_rgb(path: Path, hint: str = _HINT) -> Image.Image:
    """The whole image in RGB, what is transparent in white.

    Raises:
        ImageUnreadable: no such file, not an image, a truncated or a huge one, one of more than 8 bits per channel, of
            several pictures, or to be turned before it is seen.
    """
    try:
        image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageUnreadable(f"{path} is huge: {error}", "if it is meant, give --huge-images") from error
    except _BROKEN as error:
        said = getattr(error, "strerror", None) or error
        raise ImageUnreadable(f"{path} is not a readable image: {said}", hint) from error
    with image:
        if min(image.size) < 1:
            raise ImageUnreadable(f"{path} has no pixels ({image.width} x {image.height})", hint)
        try:
            _check_depth(path, image)
            _check_pictures(path, image)
            turned = _tags(image).get(Tag.Orientation, 1)  # load() would turn a TIFF
            image.load()
            _check_turned(path, image, turned)
            return _on_white(image)
        except _BROKEN as error:
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
    check_jpeg(path)
    step = max(1, min(pixels.shape[:2]) // _SEEN_PX)
    seen = pixels[::step, ::step]
    for colour in (seen[0, 0], np.median(seen, axis=(0, 1)).astype(np.uint8)):
        if float((seen == colour).all(axis=2).mean()) >= _BLANK_SHARE:
            return 0
    digest = hashlib.blake2b(f"{pixels.shape}".encode(), digest_size=8)
    digest.update(pixels.tobytes())
    return int.from_bytes(digest.digest(), "little") or 1


def check_jpeg(path: Path, hint: str = _HINT) -> None:
    """Refuse a JPEG whose data are damaged: Pillow takes it, and fills what is lost with grey.

    Raises:
        ImageUnreadable: it is such a file.
    """
    data = path.read_bytes()
    if not data.startswith(b"\xff\xd8\xff"):
        return
    try:
        simplejpeg.decode_jpeg(data, "GRAY", strict=True)
    except ValueError as error:  # also of kinds that it does not decode: they are not damaged
        if _DAMAGE.search(str(error)):
            raise ImageUnreadable(f"{path} cannot be decoded: {error}", hint) from error


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


def _tags(image: Any) -> Any:
    """Tag -> value, of a TIFF; nothing of what is none."""
    return image.tag_v2 if image.format == "TIFF" else {}


def _check_pictures(path: Path, image: Any) -> None:
    """Of several pages or frames Pillow would take the first, and leave the others without a word."""
    count = getattr(image, "n_frames", 1)
    if count == 1 or image.format == "MPO":  # a JPEG behind which previews lie, as phones write it
        return
    whole = list(range(count))
    if image.format == "TIFF":
        whole = [page for page in whole if not _subfile_type(image, page) & _REDUCED_OR_MASK]
        image.seek(0)
    if whole != [0]:
        raise ImageUnreadable(f"{path} holds {count} pictures, and one is expected", "save each in a file of its own")


def _subfile_type(image: Any, page: int) -> int:
    image.seek(page)
    return int(image.tag_v2.get(Tag.NewSubfileType, 0))


def _check_turned(path: Path, image: Image.Image, turned: Any) -> None:
    """Refuse what viewers turn and most tools do not, so that nobody knows which way was meant."""
    with contextlib.suppress(Exception):  # what cannot be read as EXIF says nothing of the picture
        turned = image.getexif().get(Tag.Orientation, turned)
    if turned not in (0, 1):
        raise ImageUnreadable(
            f"{path} is to be turned or mirrored before it is seen (Orientation {turned})",
            "save it the right way up, without this tag",
        )


def _check_depth(path: Path, image: Image.Image) -> None:
    """Pillow would clip such values to 255, or drop their low bits: a white image or a black one, and no word of it."""
    raw = _raw_mode(image)
    tags = _tags(image)
    bits = tags.get(Tag.BitsPerSample, (8,))  # of planes that lie apart, Pillow's raw mode says nothing
    if max(bits if isinstance(bits, tuple) else (bits,)) > 8:
        raw = raw if raw.endswith("16") else f"{image.mode};{max(bits)}"
        raise ImageUnreadable(f"{path} has more than 8 bits per channel ({raw})", "convert it to 8 bits first")
    kinds = tags.get(Tag.SampleFormat, (1,))
    if not set(kinds if isinstance(kinds, tuple) else (kinds,)) <= set(_UNSIGNED):
        raise ImageUnreadable(f"{path} has signed numbers for pixels", "convert it to 8 bits, 0 to 255, first")
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
