"""Pictures of a whole slide, made of its thumbnail and its feature file: tissue, tiles, colours and maps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.store.reader import FeatureFile

_SIDE_PX: Final = 1100
_MOST_ZOOM: Final = 4.0
_LINES_FROM_PX: Final = 9  # tiles below this size are tinted: lines would hide what they surround
_TINT: Final = 0.28
_LEAST_BAD_PX: Final = 4  # so that one bad tile of 50,000 is seen
_OUTLINE: Final = (0, 140, 70)
_TILE: Final = (40, 90, 200)
_BAD: Final = (220, 30, 30)


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A slide, small: a pixel covers scale x scale level-0 pixels, the first at (x0, y0)."""

    image: NDArray[np.uint8]  # [H, W, 3] RGB
    scale: float
    x0: int
    y0: int


@dataclass(frozen=True, slots=True)
class Overview:
    """The thumbnail at the size of the report, and where the tiles lie in it."""

    image: NDArray[np.uint8]  # [H, W, 3] RGB
    zoom: float  # pixels of the picture per level-0 pixel
    corners: NDArray[np.int64]  # [N, 4]: left, top, right, bottom of each tile, in pixels of the picture


def overview(file: FeatureFile, thumbnail: Thumbnail) -> Overview:
    """Return the picture on which tiles are drawn."""
    enlarge = min(_MOST_ZOOM, _SIDE_PX / max(thumbnail.image.shape[:2]))
    method = cv2.INTER_AREA if enlarge < 1 else cv2.INTER_LINEAR
    image: NDArray[np.uint8] = cv2.resize(thumbnail.image, None, fx=enlarge, fy=enlarge, interpolation=method)
    zoom = enlarge / thumbnail.scale
    tile_side = file.tile_attrs["patch_size"] * file.attrs["scale"]
    near = file.coords - np.array([thumbnail.x0, thumbnail.y0], np.float64)
    corners = np.rint(np.concatenate([near * zoom, (near + tile_side) * zoom], axis=1)).astype(np.int64)
    return Overview(image, zoom, corners)


def with_grid(file: FeatureFile, seen: Overview) -> NDArray[np.uint8]:
    """Return the slide with its tiles, the bad ones in red, and the outline of its tissue; the same at any number."""
    image = seen.image.copy()
    good = file.good
    side_px = int((seen.corners[:, 2] - seen.corners[:, 0]).max(initial=0))
    if side_px >= _LINES_FROM_PX:
        for left, top, right, bottom in seen.corners[good].tolist():
            cv2.rectangle(image, (left, top), (right, bottom), _TILE, 1)
    else:
        covered = np.zeros(image.shape[:2], np.uint8)
        for left, top, right, bottom in seen.corners[good].tolist():
            cv2.rectangle(covered, (left, top), (right - 1, bottom - 1), 1, -1)
        where = covered.astype(np.bool_)
        tinted = (1 - _TINT) * image[where] + _TINT * np.array(_TILE, np.float64)
        image[where] = np.rint(tinted).astype(np.uint8)
        _outline(image, covered, _TILE, 1)
    if file.tissue is not None:
        mask = cv2.resize(file.tissue.mask.astype(np.uint8), image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        _outline(image, mask, _OUTLINE, 2)
    for left, top, right, bottom in seen.corners[~good].tolist():
        thick = 1 if side_px >= _LINES_FROM_PX else -1
        cv2.rectangle(
            image, (left, top), (max(right, left + _LEAST_BAD_PX), max(bottom, top + _LEAST_BAD_PX)), _BAD, thick
        )
    return image


def with_colours(seen: Overview, colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the slide with each tile in its colour, uint8[N, 3]."""
    image = seen.image.copy()
    for (left, top, right, bottom), colour in zip(seen.corners.tolist(), colours.tolist(), strict=True):
        cv2.rectangle(image, (left, top), (right, bottom), colour, -1)
    return image


def _outline(image: NDArray[np.uint8], mask: NDArray[np.uint8], colour: tuple[int, int, int], thick: int) -> None:
    contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(image, contours, -1, colour, thick)


@dataclass(frozen=True, slots=True)
class ScaleBar:
    """A round length, and which part of a picture's width it is."""

    label: str
    part: float


def scale_bar(width_px: int, zoom: float, mpp_level0: float) -> ScaleBar | None:
    """Return a bar of 1, 2 or 5 times a power of ten, about a fifth of the picture's width.

    Args:
        width_px: of the picture.
        zoom: pixels of the picture per level-0 pixel.
        mpp_level0: micrometres a level-0 pixel covers.

    >>> scale_bar(1000, 0.01, 0.25)
    ScaleBar(label='5 mm', part=0.2)
    """
    width_um = width_px / zoom * mpp_level0
    if not (math.isfinite(width_um) and width_um > 0):
        return None
    power = 10.0 ** math.floor(math.log10(width_um / 5))
    length_um = next(step * power for step in (5, 2, 1) if step * power <= width_um / 5 * (1 + 1e-9))
    label = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"
    return ScaleBar(label, length_um / width_um)
