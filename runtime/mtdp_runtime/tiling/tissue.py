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
from mtdp_runtime.slide.source import overview_source
from mtdp_runtime.tiling.cells import OD, absorbed
from mtdp_runtime.tiling.given_mask import GivenMask, coverage
from mtdp_runtime.tiling.glass import WHITE, Glass, find_glass, levelled
from mtdp_runtime.tiling.grid import Grid
from mtdp_runtime.tiling.pen import in_pixels, marks_of, odd

_LEAST_BLOCK_PX: Final = 32
_MOST_SPLITS: Final = 128  # a damaged place takes about four; a slide damaged all over is not searched for ever
_LINE_PX: Final = 5  # the finest line is this wide after blurring and closing
_ROWS_AT_ONCE: Final = 64
_BLOCK_PX: Final = 512  # the mask image is read in blocks, so that a slide without a pyramid costs bounded memory


@dataclass(frozen=True, slots=True)
class TissueMask:
    """Tissue of the scanned area.

    `mask` is bool[H, W]; a pixel covers scale x scale level-0 pixels, the first at (x0, y0). `image` is
    uint8[H, W, 3] RGB, what the mask was made from. `threshold` is the optical density over the glass (natural
    logarithm) from which on there is tissue; 0 where the mask is the user's. `areas` is float32[H, W], the part of each
    pixel that is tissue, where that is known finer. `glass` is its RGB colour, None where none could be told from
    tissue, or none was looked for.
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
    source: str = "found by what it absorbs"
    glass: tuple[int, int, int] | None = None

    @property
    def area_mm2(self) -> float:
        return float((self.mask if self.areas is None else self.areas).sum(dtype=np.float64)) * self.mpp**2 / 1e6


def find_tissue(slide: Slide, settings: TissueSettings, given: GivenMask | None = None) -> TissueMask:
    """Segment the tissue of a slide: density over its glass, morphology, small pieces and holes removed by area.

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
    # Labels take four bytes per pixel: of a huge slide more than all else here.
    unreadable_blocks = int(cv2.connectedComponents(unreadable.view(np.uint8))[0]) - 1 if unreadable.any() else 0
    if given is not None:
        areas = coverage(given, info, scale, image.shape[1], image.shape[0])
        source = f"given by {given.path.name}"
        return TissueMask(areas >= 0.5, image, scale, x0, y0, mpp, 0.0, unreadable_blocks, areas, source)
    mask, threshold, glass = _segment(image, mpp, settings)
    mask |= unreadable
    red, green, blue = (int(value) for value in glass.colour)
    colour, source = (red, green, blue), "found by what it absorbs over the slide's glass"
    if not glass.told:
        source = f"found by what it absorbs; no glass could be told from tissue, {colour} was assumed"
    return TissueMask(
        mask, image, scale, x0, y0, mpp, threshold, unreadable_blocks, None, source, colour if glass.told else None
    )


def tissue_of(image: NDArray[np.uint8], mpp: float, settings: TissueSettings) -> tuple[NDArray[np.bool_], float]:
    """Segment an image: what absorbs light where the slide's glass does not.

    Args:
        image: uint8[H, W, 3] RGB.
        mpp: micrometres per pixel of it.
        settings: see TissueSettings.

    Returns:
        bool[H, W] and the optical density over the glass that was used as threshold.
    """
    mask, threshold, _ = _segment(image, mpp, settings)
    return mask, threshold


def _segment(image: NDArray[np.uint8], mpp: float, settings: TissueSettings) -> tuple[NDArray[np.bool_], float, Glass]:
    glass = find_glass(image, mpp)
    level = _levelled(image, glass)
    marks = marks_of(level, mpp, settings, glass)
    dark = (cv2.max(cv2.max(level[..., 0], level[..., 1]), level[..., 2]) < settings.darkest).astype(np.uint8)
    out = (cv2.dilate(dark, np.ones((3, 3), np.uint8)) > 0) | marks
    if out.any():
        level[out] = WHITE
    threshold = _threshold(glass, settings, out)
    raw = _absorbing(level, glass, threshold, odd(settings.blur_um / mpp))
    del level
    raw[out] = 0
    if glass.dim.any():
        raw &= 1 - in_pixels(glass.dim, glass.cell_px, raw.shape)
    raw = cv2.erode(raw, cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3)))  # as far as blurring has spread it
    raw &= ~_lines(raw, mpp, settings)
    close_px = odd(settings.close_um / mpp)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (close_px, close_px))
    padded = cv2.copyMakeBorder(raw, close_px, close_px, close_px, close_px, cv2.BORDER_REPLICATE)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, kernel)[close_px:-close_px, close_px:-close_px]
    wide_px = max(odd(settings.min_width_um / mpp), _LINE_PX)
    pieces = _pieces(closed, settings.min_piece_um2 / mpp**2, wide_px)
    holes = _pieces(1 - pieces, settings.min_hole_um2 / mpp**2, 1)
    return (holes == 0) & ~marks, threshold, glass


def _threshold(glass: Glass, settings: TissueSettings, out: NDArray[np.bool_]) -> float:
    """Return the optical density over the glass from which on there is tissue: a part of what this slide's has."""
    high, wide = glass.flat.shape
    centres = out[glass.cell_px // 2 :: glass.cell_px, glass.cell_px // 2 :: glass.cell_px][:high, :wide]
    densities = absorbed(glass.cells, glass.field)[~centres]
    floor = max(settings.density_floor, glass.noise_od)
    found = np.sort(densities[densities > floor * OD])
    if not len(found):
        return floor
    # Half of all that absorbs is in denser cells: haze may be large, but it has little of it.
    mass = np.cumsum(found, dtype=np.int64)
    usual = float(found[np.searchsorted(2 * mass, mass[-1])]) / OD
    return max(floor, min(settings.density_part * usual, settings.density_ceiling))


def _absorbing(level: NDArray[np.uint8], glass: Glass, threshold: float, blur_px: int) -> NDArray[np.uint8]:
    """Return uint8[H, W]: 1 where in some channel less light comes through than through the glass."""
    high, wide = level.shape[:2]
    lut = levelled(glass)
    raw = np.zeros((high, wide), np.uint8)
    for channel in range(3):
        least = np.rint((lut[channel][glass.field[..., channel]] + 1.0) * math.exp(-threshold) - 1)
        fine = _at_pixels(least.astype(np.uint8), glass.cell_px, wide, high)
        light = cv2.GaussianBlur(cv2.extractChannel(level, channel), (blur_px, blur_px), 0)
        raw |= cv2.compare(light, fine, cv2.CMP_LT)
    return np.asarray(raw & 1, np.uint8)


def _at_pixels(cells: NDArray[np.uint8], cell_px: int, wide: int, high: int) -> NDArray[np.uint8]:
    """Return uint8[high, wide]: values of cells, interpolated between them by a rule that is exact on every CPU."""
    size = (cells.shape[1] * cell_px, cells.shape[0] * cell_px)
    if (cells == cells[0, 0]).all():
        return np.full((high, wide), cells[0, 0], np.uint8)
    fine = cv2.resize(cells, size, interpolation=cv2.INTER_LINEAR_EXACT)
    return np.asarray(
        cv2.copyMakeBorder(fine, 0, high - fine.shape[0], 0, wide - fine.shape[1], cv2.BORDER_REPLICATE), np.uint8
    )


def _lines(mask: NDArray[np.uint8], mpp: float, settings: TissueSettings) -> NDArray[np.uint8]:
    """Return uint8[H, W]: 1 on thin long lines along the axes: the edges of coverslips and of stitched images."""
    width_px = max(odd(settings.min_width_um / mpp), _LINE_PX)
    thick = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((width_px, width_px), np.uint8))
    thin = mask & ~thick
    lines = np.zeros_like(mask)
    if thin.any():
        long_px = max(odd(settings.line_um / mpp), 3 * width_px)
        for shape in ((1, long_px), (long_px, 1)):
            lines |= cv2.morphologyEx(thin, cv2.MORPH_OPEN, np.ones(shape, np.uint8))
    return lines


def pen_marks(image: NDArray[np.uint8], mpp: float, settings: TissueSettings) -> NDArray[np.bool_]:
    """Find what a pen has drawn on the glass, and frames; for uint8[H, W, 3] RGB at `mpp` it is bool[H, W]."""
    glass = find_glass(image, mpp)
    return marks_of(_levelled(image, glass), mpp, settings, glass)


def _levelled(image: NDArray[np.uint8], glass: Glass) -> NDArray[np.uint8]:
    table = np.ascontiguousarray(levelled(glass).T).reshape(256, 1, 3)
    return np.asarray(cv2.LUT(image, table), np.uint8)


def tissue_fractions(tissue: TissueMask, grid: Grid) -> NDArray[np.float32]:
    """Return float32[len(grid)]: the part of each tile's area that is tissue, fractions of mask pixels included."""
    if not len(grid):
        return np.zeros(0, np.float32)
    sums = _summed_areas(tissue)
    origins = grid.origins()
    xs = origins[: grid.columns, 0].astype(np.float64)
    ys = origins[:: grid.columns, 1].astype(np.float64)
    left, right = (xs - tissue.x0) / tissue.scale, (xs - tissue.x0 + grid.tile0) / tissue.scale
    top, bottom = (ys - tissue.y0) / tissue.scale, (ys - tissue.y0 + grid.tile0) / tissue.scale
    by_row = _interpolate(sums, bottom) - _interpolate(sums, top)
    area = _interpolate(by_row.T, right) - _interpolate(by_row.T, left)
    fractions = area.T / (grid.tile0 / tissue.scale) ** 2
    return np.clip(fractions, 0, 1).astype(np.float32).ravel()


def tissue_fractions_at(tissue: TissueMask, origins: NDArray[np.int64], tile0: float) -> NDArray[np.float32]:
    """Return float32[N]: what `tissue_fractions` does, for tiles of `tile0` level-0 pixels that lie anywhere.

    What of a tile lies outside the scanned area is no tissue.
    """
    sums = _summed_areas(tissue)
    first = (origins - np.array([tissue.x0, tissue.y0], np.float64)) / tissue.scale
    last = first + tile0 / tissue.scale
    area = np.zeros(len(origins), np.float64)
    for x, right in ((first[:, 0], False), (last[:, 0], True)):
        for y, bottom in ((first[:, 1], False), (last[:, 1], True)):
            area += _interpolate_at(sums, x, y) * (1 if right == bottom else -1)
    return np.clip(area / (tile0 / tissue.scale) ** 2, 0, 1).astype(np.float32)


def _summed_areas(tissue: TissueMask) -> NDArray[np.float64] | NDArray[np.int32]:
    """Return the sums above and left of each corner of a mask pixel.

    Interpolated linearly between these they are exact for a mask that is constant within its pixels.
    """
    sums: NDArray[np.float64] | NDArray[np.int32]
    if tissue.areas is None:
        sums = cv2.integral(tissue.mask.view(np.uint8), sdepth=cv2.CV_32S)
    else:
        sums = cv2.integral(tissue.areas.astype(np.float64), sdepth=cv2.CV_64F)
    return sums


def _interpolate_at(
    sums: NDArray[np.float64] | NDArray[np.int32], x: NDArray[np.float64], y: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return float64[N]: sums, two or more on a side, at fractional places."""
    rows, columns = sums.shape
    x, y = np.clip(x, 0, columns - 1), np.clip(y, 0, rows - 1)
    left, top = np.minimum(x.astype(np.int64), columns - 2), np.minimum(y.astype(np.int64), rows - 2)
    right_part, lower_part = x - left, y - top
    upper = sums[top, left] * (1 - right_part) + sums[top, left + 1] * right_part
    lower = sums[top + 1, left] * (1 - right_part) + sums[top + 1, left + 1] * right_part
    between: NDArray[np.float64] = upper * (1 - lower_part) + lower * lower_part
    return between


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
    source = overview_source(slide.info, scale)
    todo = [(top, left, side) for top in range(0, height, side) for left in range(0, width, side)][::-1]
    while todo:
        top, left, side = todo.pop()
        if top >= height or left >= width:
            continue
        block = np.s_[top : min(top + side, height), left : min(left + side, width)]
        try:
            slide.read_into(image[block], x0 + round(left * scale), y0 + round(top * scale), scale, source)
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


def _pieces(mask: NDArray[np.uint8], min_px: float, wide_px: int) -> NDArray[np.uint8]:
    """Return uint8[H, W]: the mask without the connected pieces of fewer pixels.

    And without those that are nowhere this wide: a hair, the edge of a coverslip.
    """
    count, labels = cv2.connectedComponents(mask, connectivity=8)
    # OpenCV's own statistics take five times as long as the labels; NumPy makes 8 bytes of each label that it counts.
    areas, wide = np.zeros(count, np.int64), np.full(count, wide_px <= 1)
    blocks = [np.s_[top : top + _ROWS_AT_ONCE] for top in range(0, len(mask), _ROWS_AT_ONCE)]
    disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (wide_px, wide_px))
    inside = cv2.erode(mask, disk).view(np.bool_) if wide_px > 1 else None
    for rows in blocks:
        areas += np.bincount(labels[rows].ravel(), minlength=count)
        if inside is not None:
            wide[labels[rows][inside[rows]]] = True
    keep = ((areas >= min_px) & wide).astype(np.uint8)
    keep[0] = 0
    if keep[1:].all():
        return mask
    kept = np.empty_like(mask)
    for rows in blocks:
        keep.take(labels[rows], out=kept[rows], mode="clip")  # another mode would buffer it
    return kept
