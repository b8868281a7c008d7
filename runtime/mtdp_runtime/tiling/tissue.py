"""Where the tissue is: a mask at a coarse scale, and how much of a tile it covers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import TileUnreadable
from mtdp_runtime.settings import TissueSettings
from mtdp_runtime.slide import Slide
from mtdp_runtime.tiling.given_mask import GivenMask, coverage
from mtdp_runtime.tiling.grid import Grid

_LEAST_BLOCK_PX: Final = 32
_MOST_SPLITS: Final = 128  # a damaged place takes about four; a slide damaged all over is not searched for ever
_BLOCK_PX: Final = 512  # the mask image is read in blocks, so that a slide without a pyramid costs bounded memory


@dataclass(frozen=True, slots=True)
class TissueMask:
    """Tissue of the scanned area.

    `mask` is bool[H, W]; a pixel covers scale x scale level-0 pixels, the first at (x0, y0). `image` is
    uint8[H, W, 3] RGB, what the mask was made from. `threshold` is the saturation used, of 255; 0 where the mask
    is the user's. `areas` is float32[H, W], the part of each pixel that is tissue, where that is known finer.
    """

    mask: NDArray[np.bool_]
    image: NDArray[np.uint8]
    scale: float
    x0: int
    y0: int
    mpp: float
    threshold: float
    unreadable_blocks: int
    areas: NDArray[np.float32] | None = None
    source: str = "found by saturation"

    @property
    def area_mm2(self) -> float:
        return float((self.mask if self.areas is None else self.areas).sum(dtype=np.float64)) * self.mpp**2 / 1e6


def find_tissue(slide: Slide, settings: TissueSettings, given: GivenMask | None = None) -> TissueMask:
    """Segment the tissue of a slide: saturation, Otsu, morphology, small pieces and holes removed by area.

    A mask that is given replaces all of it, and the image is only read to be shown.

    A block that cannot be decoded counts as tissue, so that its tiles are tried and reported one by one.

    Raises:
        TileUnreadable: not one block could be decoded.
    """
    info = slide.info
    assert info.mpp is not None
    x0, y0, width, height = info.bounds
    mpp = max(settings.mpp, info.mpp, info.mpp * max(width, height) / settings.max_side_px)
    scale = mpp / info.mpp
    image, unreadable = _read_blocks(slide, scale)
    # Labels take four bytes a pixel: of a huge slide more than all else here.
    unreadable_blocks = int(cv2.connectedComponents(unreadable.view(np.uint8))[0]) - 1 if unreadable.any() else 0
    if given is not None:
        areas = coverage(given, info, scale, image.shape[1], image.shape[0])
        source = f"given by {given.path.name}"
        return TissueMask(areas >= 0.5, image, scale, x0, y0, mpp, 0.0, unreadable_blocks, areas, source)
    mask, threshold = tissue_of(image, mpp, settings)
    mask |= unreadable
    return TissueMask(mask, image, scale, x0, y0, mpp, threshold, unreadable_blocks)


def tissue_of(image: NDArray[np.uint8], mpp: float, settings: TissueSettings) -> tuple[NDArray[np.bool_], float]:
    """Segment an image.

    Args:
        image: uint8[H, W, 3] RGB.
        mpp: micrometres a pixel of it.
        settings: see TissueSettings.

    Returns:
        bool[H, W] and the saturation threshold that was used.
    """
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    blur_px = _odd(settings.blur_um / mpp)
    saturation = cv2.GaussianBlur(hsv[..., 1], (blur_px, blur_px), 0)
    marks = pen_marks(image, mpp, settings)
    dark = (hsv[..., 2] < settings.darkest) | marks
    del hsv  # of a huge slide it is 200 MB, and more follows
    saturation[dark] = 0
    otsu, _ = (
        cv2.threshold(saturation[~dark].reshape(-1, 1), 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
        if not dark.all()
        else (0.0, None)
    )
    threshold = min(max(float(otsu), settings.saturation_floor), settings.saturation_ceiling)
    raw = ((saturation > threshold) & ~dark).astype(np.uint8)
    close_px = _odd(settings.close_um / mpp)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (close_px, close_px))
    padded = cv2.copyMakeBorder(raw, close_px, close_px, close_px, close_px, cv2.BORDER_REPLICATE)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, kernel)[close_px:-close_px, close_px:-close_px]
    pieces = _without_small(closed, settings.min_piece_um2 / mpp**2)
    holes = _without_small(1 - pieces, settings.min_hole_um2 / mpp**2)
    return (holes == 0) & ~marks, threshold


def pen_marks(image: NDArray[np.uint8], mpp: float, settings: TissueSettings) -> NDArray[np.bool_]:
    """Find what a pen has drawn on the glass, in green, blue, red or black, and black borders that are not all black.

    Stains are purple, pink, brown or a dull blue. Ink is green, which none of them is, or a blue or a red that is purer
    than haematoxylin and blood are at this scale, or dark without a colour. It also comes in lines and areas of a
    pen's width, which single nuclei and grains of pigment do not.

    Args:
        image: uint8[H, W, 3] RGB.
        mpp: micrometres a pixel of it.
        settings: see TissueSettings.

    Returns:
        bool[H, W].
    """
    hsv = cv2.cvtColor(cv2.GaussianBlur(image, (3, 3), 0), cv2.COLOR_RGB2HSV)  # hue in 0..179
    hue, saturation, value = (hsv[..., i].astype(np.int16) for i in range(3))
    green = (hue >= 40) & (hue <= 92) & (saturation > 60)
    blue = (hue > 92) & (hue <= 124) & (saturation > 135)
    red = ((hue <= 5) | (hue >= 176)) & (saturation > 185) & (value > 90)
    black = (value < 85) & (saturation * value < 30 * 255)  # max - min below 30 of 255
    ink = (green | blue | red | black).astype(np.uint8)
    width_px, margin_px = _odd(settings.mark_um / mpp), _odd(2 * settings.mark_margin_um / mpp)
    line = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width_px, width_px))
    # The border counts as more of the same: a line that leaves the image keeps its width.
    padded = cv2.copyMakeBorder(ink, width_px, width_px, width_px, width_px, cv2.BORDER_REPLICATE)
    marks = cv2.morphologyEx(padded, cv2.MORPH_OPEN, line)[width_px:-width_px, width_px:-width_px]
    around = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (margin_px, margin_px))
    return np.asarray(cv2.dilate(marks, around) > 0)


def tissue_fractions(tissue: TissueMask, grid: Grid) -> NDArray[np.float32]:
    """Return float32[len(grid)]: the part of each tile's area that is tissue, fractions of mask pixels included."""
    if not len(grid):
        return np.zeros(0, np.float32)
    # Summed areas, interpolated linearly between mask pixels: exact for a mask that is constant within its pixels.
    sums: NDArray[np.float64] | NDArray[np.int32]
    if tissue.areas is None:
        sums = cv2.integral(tissue.mask.view(np.uint8), sdepth=cv2.CV_32S)
    else:
        sums = cv2.integral(tissue.areas.astype(np.float64), sdepth=cv2.CV_64F)
    origins = grid.origins()
    xs = origins[: grid.columns, 0].astype(np.float64)
    ys = origins[:: grid.columns, 1].astype(np.float64)
    left, right = (xs - tissue.x0) / tissue.scale, (xs - tissue.x0 + grid.tile0) / tissue.scale
    top, bottom = (ys - tissue.y0) / tissue.scale, (ys - tissue.y0 + grid.tile0) / tissue.scale
    by_row = _interpolate(sums, bottom) - _interpolate(sums, top)
    area = _interpolate(by_row.T, right) - _interpolate(by_row.T, left)
    fractions = area.T / (grid.tile0 / tissue.scale) ** 2
    return np.clip(fractions, 0, 1).astype(np.float32).ravel()


def _interpolate(rows: NDArray[np.float64] | NDArray[np.int32], positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return float64[len(positions), columns]: rows, two or more, at fractional positions."""
    clipped = np.clip(positions, 0, len(rows) - 1)
    low = np.minimum(clipped.astype(np.int64), len(rows) - 2)
    part = (clipped - low)[:, None]
    between: NDArray[np.float64] = rows[low] * (1 - part) + rows[low + 1] * part
    return between


def _read_blocks(slide: Slide, scale: float) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return uint8[H, W, 3] of the scanned area at a scale, and bool[H, W]: what could not be decoded."""
    x0, y0, width0, height0 = slide.info.bounds
    width, height = max(1, math.ceil(width0 / scale)), max(1, math.ceil(height0 / scale))
    image = np.full((height, width, 3), 255, np.uint8)
    unreadable = np.zeros((height, width), np.bool_)
    failure: TileUnreadable | None = None
    side, splits = _BLOCK_PX, 0
    todo = [(top, left, side) for top in range(0, height, side) for left in range(0, width, side)][::-1]
    while todo:
        top, left, side = todo.pop()
        if top >= height or left >= width:
            continue
        block = np.s_[top : min(top + side, height), left : min(left + side, width)]
        try:
            slide.read_into(image[block], x0 + round(left * scale), y0 + round(top * scale), scale)
        except TileUnreadable as error:
            failure = error
            if side > _LEAST_BLOCK_PX and splits < _MOST_SPLITS:  # around a damaged place the rest is still seen
                side, splits = side // 2, splits + 1
                todo += [(y, x, side) for y in (top + side, top) for x in (left + side, left)]
            else:
                image[block] = 255
                unreadable[block] = True
    if failure is not None and unreadable.all():
        raise failure
    return image, unreadable


def _without_small(mask: NDArray[np.uint8], min_px: float) -> NDArray[np.uint8]:
    """Return uint8[H, W]: the mask without the connected pieces of fewer pixels."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= min_px
    keep[0] = False
    if count == 1:
        return np.zeros_like(mask)
    kept: NDArray[np.uint8] = keep.astype(np.uint8)[labels]
    return kept


def _odd(length_px: float) -> int:
    return max(3, round(length_px) | 1)
