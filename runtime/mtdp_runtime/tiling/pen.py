"""What lies on a slide and is no tissue: a pen's ink, and the frame around what was scanned."""

from __future__ import annotations

import math
from typing import Final, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.tiling.cells import OD_OF, density, greatest, least
from mtdp_runtime.tiling.glass import WHITE, Glass

# Of the texture, see `_even_ones`. Ink has 0.04 to 0.065 with noise of 4.6 levels a pixel of the mask; tissue stained
# in the same colours 0.16 to 0.7 at 8 µm per pixel, 0.07 to 0.13 at 29 µm: averaging over n pixels leaves 1/sqrt(n).
_EVEN: Final = 0.12
_EVEN_MPP: Final = 8.0
_APART_UM: Final = 40.0
_LEAST_PAIRS: Final = 20
_FRAME_OD: Final = 400  # thousandths: a scanner's frame lets through less than two thirds of the light
_COLOURLESS_OD: Final = 100  # between two channels
_BLACK: Final = 85  # of 255
_BLACK_RANGE: Final = 30  # of 255, between two channels
_FRAME_CELLS: Final = 64  # 0.1 mm²
_LEAST_STEP: Final = 5  # a grid finer than this has more than a third of the pixels as neighbours


class MarkSettings(Protocol):
    """What is used of TissueSettings."""

    @property
    def mark_um(self) -> float: ...
    @property
    def mark_margin_um(self) -> float: ...


def marks_of(image: NDArray[np.uint8], mpp: float, settings: MarkSettings, glass: Glass) -> NDArray[np.bool_]:
    """Find what is neither glass nor tissue.

    Args:
        image: uint8[H, W, 3] RGB, its glass brought to `WHITE`.
        mpp: micrometres per pixel of it.
        settings: see TissueSettings.
        glass: of the slide.

    Returns:
        bool[H, W].
    """
    width_px, margin_px = odd(settings.mark_um / mpp), odd(2 * settings.mark_margin_um / mpp)
    line = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width_px, width_px))
    marks = np.zeros(image.shape[:2], np.uint8)
    if _may_be_drawn_on(image, line):
        # The border counts as more of the same: a line that leaves the image keeps its width.
        padded = cv2.copyMakeBorder(_ink(image), width_px, width_px, width_px, width_px, cv2.BORDER_REPLICATE)
        marks = cv2.morphologyEx(padded, cv2.MORPH_OPEN, line)[width_px:-width_px, width_px:-width_px]
    if marks.any():
        marks = _even_ones(image, np.ascontiguousarray(marks), mpp)
    out = in_pixels(_frame(glass), glass.cell_px, marks.shape)
    marks = marks & ~out  # a frame has no margin of ink
    if marks.any():
        around = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (margin_px, margin_px))
        out |= cv2.dilate(marks, around)
    return np.asarray(out > 0)


def _may_be_drawn_on(image: NDArray[np.uint8], line: NDArray[np.uint8]) -> bool:
    """Say whether ink is on one of a grid of pixels so dense that a line of a pen's width, uint8[n, n], covers one.

    On most slides none is, and a ninth of the pixels, with their neighbours, tells so.
    """
    middle, half = len(line) // 2, 0
    while line[middle - half - 1 : middle + half + 2, middle - half - 1 : middle + half + 2].all() and half < middle:
        half += 1
    step = 2 * half + 1  # side of the largest square in the line's width
    if step < _LEAST_STEP:
        return True
    rows, columns = (_with_neighbours(side, step, len(line)) for side in image.shape[:2])
    return bool(_ink(image[np.ix_(rows, columns)])[1::3, 1::3].any())


def _with_neighbours(side: int, step: int, beyond: int) -> NDArray[np.int64]:
    """Return each step's place and the two beside it, mirrored at the image's ends as blurring does it."""
    places = np.clip(np.arange(-beyond, side + beyond, step), 0, side - 1)
    near = np.abs(places[:, None] + np.array([-1, 0, 1])).ravel()
    return np.asarray(np.maximum(np.where(near >= side, 2 * (side - 1) - near, near), 0), np.int64)


def _ink(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return uint8[H, W]: 1 where the colour is a pen's.

    Stains are purple, pink, brown or a dull blue. Ink is green, or a blue or a red that is purer than haematoxylin and
    blood are at this scale, or dark without a colour.
    """
    hsv = cv2.cvtColor(cv2.GaussianBlur(image, (3, 3), 0), cv2.COLOR_RGB2HSV)  # hue in 0..179
    ink = cv2.inRange(hsv, (40, 61, 0), (92, 255, 255))
    ink |= cv2.inRange(hsv, (93, 136, 0), (124, 255, 255))
    ink |= cv2.inRange(hsv, (0, 186, 91), (5, 255, 255)) | cv2.inRange(hsv, (176, 186, 91), (179, 255, 255))
    value = np.ascontiguousarray(hsv[..., 2])
    # max - min is below the range; the table turns a value into the greatest saturation that means so
    most = np.array(
        [0, *(min(255, (_BLACK_RANGE * 255 - 1) // v) for v in range(1, _BLACK)), *[0] * (256 - _BLACK)], np.uint8
    )
    black = (value < _BLACK) & ((hsv[..., 1] <= cv2.LUT(value, most)) | (value == 0))
    return np.asarray((ink & 1) | black.view(np.uint8), np.uint8)


def _even_ones(image: NDArray[np.uint8], marks: NDArray[np.uint8], mpp: float) -> NDArray[np.uint8]:
    """Return uint8[H, W]: the marks without those that have the texture of tissue.

    The texture is the mean difference of density between pixels `_APART_UM` apart, over the mean density. A piece too
    small to have one goes with the others.
    """
    count, labels = cv2.connectedComponents(marks, connectivity=8)
    inside = cv2.erode(marks, np.ones((3, 3), np.uint8)) > 0  # without the rim, where ink and glass mix
    thick = _thickness(image)
    apart = max(1, round(_APART_UM / mpp))
    differences, pairs, mass = np.zeros(count), np.zeros(count), np.zeros(count)
    for one, other in ((np.s_[apart:, :], np.s_[:-apart, :]), (np.s_[:, apart:], np.s_[:, :-apart])):
        both = inside[one] & inside[other]
        here, first, second = labels[one][both], thick[one][both], thick[other][both]
        pairs += np.bincount(here, minlength=count)
        differences += np.bincount(here, np.abs(first - second), count)
        mass += np.bincount(here, first, count)  # whole numbers all of them: the sums are exact
    most = _EVEN * min(1.0, math.sqrt(_EVEN_MPP / mpp))
    even_all = differences[1:].sum() <= most * mass[1:].sum()
    keep = np.where(pairs >= _LEAST_PAIRS, differences <= most * mass, even_all)
    keep[0] = False
    return np.asarray(keep.astype(np.uint8)[labels], np.uint8)


def _thickness(image: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Return int32[H, W]: the optical density of all channels together over `WHITE`, in thousandths, 0 or more."""
    white = np.uint8(WHITE)
    total = density(white, image[..., 0])
    for channel in (1, 2):
        total += density(white, image[..., channel])
    return np.maximum(total, 0)


def _frame(glass: Glass) -> NDArray[np.bool_]:
    """Return bool[h, w] of cells: even, colourless, dark areas at the image's border, and what was not scanned."""
    od = OD_OF[glass.cells] - OD_OF[glass.field]
    thin = least(od)
    colourless = greatest(od) - thin <= _COLOURLESS_OD
    channels = glass.cells.astype(np.int32)
    value = greatest(channels)
    black = (value < _BLACK) & (value - least(channels) < _BLACK_RANGE)
    grey = (glass.flat & (black | colourless) & (thin >= _FRAME_OD)).astype(np.uint8)
    if grey.any():
        count, labels, stats, _ = cv2.connectedComponentsWithStats(grey, connectivity=4)
        keep = np.zeros(count, np.bool_)
        keep[np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])] = True
        keep &= stats[:, cv2.CC_STAT_AREA] >= _FRAME_CELLS
        keep[0] = False
        grey = keep[labels].astype(np.uint8)
    filled = glass.unscanned.view(np.uint8)
    # Flat cells end one cell before the edge; those of one value end at it.
    return np.asarray((cv2.dilate(grey, np.ones((3, 3), np.uint8)) | filled) > 0)


def in_pixels(cells: NDArray[np.bool_], cell_px: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return uint8 of a shape (H, W): 1 in the pixels of these cells; the last ones reach to the image's edge."""
    fine = cells.astype(np.uint8).repeat(cell_px, axis=0).repeat(cell_px, axis=1)
    below, beside = shape[0] - fine.shape[0], shape[1] - fine.shape[1]
    return np.asarray(cv2.copyMakeBorder(fine, 0, below, 0, beside, cv2.BORDER_REPLICATE), np.uint8)


def odd(length_px: float) -> int:
    """Return an odd number of pixels for a length, at least 3: the side of a kernel."""
    return max(3, round(length_px) | 1)
