"""Small pictures of slides: a file beside the reports, and smaller ones inside the page of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.store.reader import PlacedMask

_FILE_SIDE_PX: Final = 256
_FILE_QUALITY: Final = 82
_QUALITIES: Final = (75, 55, 35)
_PAGE_BYTES: Final = 2_600_000  # of pictures in a page, before base64 makes four bytes of three
_SIDES: Final = ((300, 120), (700, 96), (1500, 72))  # up to so many slides: pixels of the longer side
_LEAST_BYTES: Final = 900  # below it a JPEG shows nothing
_GLASS: Final = (238, 236, 240)
_TISSUE: Final = (176, 128, 168)


def write_thumbnail(path: Path, image: NDArray[np.uint8]) -> None:
    """Write the picture of a slide, uint8[H, W, 3] RGB, as a small JPEG.

    Raises:
        OSError: it cannot be written.
    """
    path.write_bytes(encoded(_within(image, _FILE_SIDE_PX), _FILE_QUALITY))


def page_picture(thumbnail: Path, tissue: Callable[[], PlacedMask | None], slides: int) -> bytes:
    """Return a JPEG for a page of so many slides; b"" where there is nothing to show, or no room.

    Args:
        thumbnail: as `write_thumbnail` wrote it; where it cannot be read, the tissue is drawn.
        tissue: gives the tissue of the slide.
        slides: on the page.
    """
    side_px = next((side for most, side in _SIDES if slides <= most), 0)
    most_bytes = _PAGE_BYTES // max(1, slides)
    if not side_px or most_bytes < _LEAST_BYTES:
        return b""
    image = _read(thumbnail)
    if image is None and (mask := tissue()) is not None and mask.mask.size:
        image = np.where(mask.mask[..., None], np.array(_TISSUE, np.uint8), np.array(_GLASS, np.uint8))
    if image is None:
        return b""
    small = _within(image, side_px)
    return next((data for data in (encoded(small, q) for q in _QUALITIES) if len(data) <= most_bytes), b"")


def encoded(image: NDArray[np.uint8], quality: int) -> bytes:
    """Return uint8[H, W, 3] RGB as a JPEG."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_OPTIMIZE, 1]
    _, data = cv2.imencode(".jpg", image[..., ::-1], options)
    return data.tobytes()


def _within(image: NDArray[np.uint8], side_px: int) -> NDArray[np.uint8]:
    zoom = min(1.0, side_px / max(image.shape[:2]))
    size = (max(1, round(image.shape[1] * zoom)), max(1, round(image.shape[0] * zoom)))
    resized: NDArray[np.uint8] = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return resized


def _read(path: Path) -> NDArray[np.uint8] | None:
    try:
        data = np.frombuffer(path.read_bytes(), np.uint8)
        image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    except (OSError, cv2.error):
        return None
    return None if image is None else np.ascontiguousarray(image[..., ::-1])
