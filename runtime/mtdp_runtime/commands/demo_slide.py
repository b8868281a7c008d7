"""A synthetic tissue slide, so that every machine can try the whole way without data."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray

DEMO_MPP: Final = 0.5
_SEED: Final = 2020
_EOSIN: Final = (232, 160, 192)
_HAEMATOXYLIN: Final = (96, 64, 144)
_GLASS: Final = (243, 241, 243)
_COARSE: Final = 8  # the smooth parts are made at this downsample


def write_demo_slide(
    path: Path, width: int = 6144, height: int = 4608, mpp: float = DEMO_MPP, most_levels: int = 99
) -> None:
    """Write a pyramidal, tiled JPEG TIFF with two pieces of something like H&E tissue.

    It is made of smooth noise and dots: good for trying the machinery, worth nothing for pathology. The same
    arguments give the same pixels.
    """
    image = demo_image(width, height)
    options = {"tile": (256, 256), "photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": 85}}
    um_to_cm = 1e4
    with tifffile.TiffWriter(path, bigtiff=False) as tiff:
        downsample = 1
        while True:
            resolution = (um_to_cm / (mpp * downsample), um_to_cm / (mpp * downsample))
            tiff.write(
                image,
                resolution=resolution,
                resolutionunit="CENTIMETER",
                subfiletype=0 if downsample == 1 else 1,
                metadata=None,
                **options,
            )
            if max(image.shape[:2]) <= 1024 or downsample == 2 ** (most_levels - 1):
                break
            image = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
            downsample *= 2


def demo_image(width: int, height: int) -> NDArray[np.uint8]:
    """Return uint8[height, width, 3]: glass, two pieces of tissue, nuclei in them."""
    rng = np.random.default_rng(_SEED)
    inside = _tissue(rng, width // _COARSE, height // _COARSE)
    texture = _smooth_noise(rng, width // _COARSE, height // _COARSE, cell_px=6)[..., None]
    stroma = np.asarray(_EOSIN, np.float32) + texture * np.asarray((14, 26, 18), np.float32)
    edge = np.clip(inside * 20, 0, 1)[..., None]
    smooth = np.asarray(_GLASS, np.float32) * (1 - edge) + stroma * edge
    image: NDArray[np.uint8] = cv2.resize(smooth.astype(np.uint8), (width, height), interpolation=cv2.INTER_LINEAR)
    _draw_nuclei(rng, image, inside > 0.1)
    cv2.GaussianBlur(image, (3, 3), 0, dst=image)
    grain = rng.integers(0, 7, size=(512, 512, 3), dtype=np.uint8)
    for top in range(0, height, 512):
        for left in range(0, width, 512):
            block = image[top : top + 512, left : left + 512]
            cv2.subtract(block, grain[: block.shape[0], : block.shape[1]], dst=block)
    return image


def _tissue(rng: np.random.Generator, width: int, height: int) -> NDArray[np.float32]:
    """Return float32[height, width]: above 0 in two ragged pieces."""
    outline = _smooth_noise(rng, width, height, cell_px=width // 12)
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    inside = np.full((height, width), -1.0, np.float32)
    for centre_x, centre_y, radius in ((0.3, 0.5, 0.34), (0.76, 0.45, 0.26)):
        distance = np.hypot(xs - centre_x * width, (ys - centre_y * height)) / (radius * height)
        inside = np.maximum(inside, 1 - distance + 0.3 * outline)
    return inside


def _smooth_noise(rng: np.random.Generator, width: int, height: int, cell_px: int) -> NDArray[np.float32]:
    """Return float32[height, width] in about -1..1 that changes over cell_px."""
    coarse = rng.uniform(-1, 1, size=(height // cell_px + 3, width // cell_px + 3)).astype(np.float32)
    noise: NDArray[np.float32] = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return noise


def _draw_nuclei(rng: np.random.Generator, image: NDArray[np.uint8], where: NDArray[np.bool_]) -> None:
    """Draw ellipses of 5 to 12 µm, where the coarse bool[H, W] is set."""
    height, width = image.shape[:2]
    count = width * height // 900
    centres = rng.integers(0, (width, height), size=(count, 2))
    radii = rng.integers(5, 12, size=(count, 2))
    angles = rng.uniform(0, 180, count)
    rows = np.minimum(centres[:, 1] // _COARSE, where.shape[0] - 1)
    columns = np.minimum(centres[:, 0] // _COARSE, where.shape[1] - 1)
    drawn = where[rows, columns]
    for (x, y), (a, b), angle in zip(centres[drawn].tolist(), radii[drawn].tolist(), angles[drawn], strict=True):
        cv2.ellipse(image, (x, y), (a, b), float(angle), 0, 360, _HAEMATOXYLIN, -1)
