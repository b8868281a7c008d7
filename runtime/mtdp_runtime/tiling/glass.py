"""The glass of a slide: its colour, how it varies over the slide, and how far from it a pixel has to be.

Glass is what is flat, hardly coloured, and the brightest of its kind on the slide: a stain only absorbs. All is told
on cells of about 40 µm, in whole numbers, so that every CPU finds the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

CELL_UM: Final = 40.0  # side of a cell: larger than a nucleus, smaller than a gland
WHITE: Final = 243  # of 255: what glass is taken to be on a slide that shows none, and what all glass is brought to
DARKEST_GLASS: Final = 30  # of 255: darker is a hole in the data or a frame, not glass
OD: Final = 1000.0  # optical densities (natural logarithm) are whole thousandths below

# A cell is flat if its neighbours' means differ by this little (grey levels, root of the mean square). Noise of 4
# levels a mask pixel gives 1.0, JPEG of quality 30 gives 1.4; H&E has 3 to 40.
_FLAT_LEVELS: Final = 1.6
_GLASS_LEVELS: Final = 0.9  # the same of glass without JPEG: a noise of 4 levels a pixel has it
_TINT_OD: Final = 300  # between two channels: more than warm lamps, coverslip glue and old mounting medium do
_ALMOST_ALL: Final = 2 / 3  # what is flat and alike over this part of a slide is glass however it is tinted
_LEAST_CELLS: Final = 16  # glass shows itself in 0.03 mm² of flat cells at least
_PEAK_PART: Final = 0.02  # of the tallest peak of flat cells: a smaller one is a bubble or a scratch, not the glass
_BIN: Final = 6  # of 765, the sum of the channels: two grey levels
_SAME_HUE_OD: Final = 20  # the lamp changes all channels alike; a stain does not
_SAME_OD: Final = 40  # stitched stripes differ by a few percent
_SLOPE_OD: Final = 350  # a lamp's light may fall this far, where it falls without a step
_BRIGHTER_OD: Final = 100  # glass is not darker than this below...
_BRIGHTER_PART: Final = 0.05  # ...more than this part of the slide
_STRAIGHT_CELLS: Final = 8  # an edge this long without a bend (0.3 mm) is a machine's
_STRAIGHT_PART: Final = 0.7  # of the edges of what was not scanned
_UNSCANNED_PART: Final = 0.05  # of the image's border; less is not searched for
_WINDOWS: Final = (25, 101, 401)  # cells: 1, 4 and 16 mm; glass is averaged in the smallest that shows enough of it
_FLOOR_OD: Final = 20  # 2 % of the light: less is dust, haze and the rounding of 8 bits
_NOISIEST_OD: Final = 100
_QUIET: Final = 99.0  # percent of the glass: blocks of JPEG, stripes, smears
_GRAINS: Final = 3.0  # standard deviations of its grain beyond, as there are many more pixels than cells
_ROUNDS: Final = 3
_STANDS_OUT_OD: Final = (
    40  # thousandths, as all below that end in _OD: what is dimmer than the glass around is not glass
)
_STEPS: Final = 32  # to either side: a slide is this long in the polynomial of the light, so that whole numbers do


@dataclass(frozen=True, slots=True, eq=False)
class Glass:
    """What is known of a slide's glass.

    `colour` is uint8[3] RGB. `field` is uint8[h, w, 3]: the glass at each cell of `cell_px` pixels, by the light there.
    `noise_od` is the optical density that its own noise and dirt stay below. `unscanned` is bool[h, w]: no picture
    at all. `told` is false where no glass could be told from tissue, and a white one is assumed.
    """

    colour: NDArray[np.uint8]
    field: NDArray[np.uint8]
    flat: NDArray[np.bool_]
    unscanned: NDArray[np.bool_]
    cells: NDArray[np.uint8]
    cell_px: int
    noise_od: float
    told: bool


def find_glass(image: NDArray[np.uint8], mpp: float) -> Glass:
    """Tell the glass of a slide.

    Args:
        image: uint8[H, W, 3] RGB.
        mpp: micrometres a pixel of it.
    """
    cell_px = min(max(3, round(CELL_UM / mpp)), *image.shape[:2])
    cells = cells_of(image, cell_px)
    flat = flat_cells(cells)
    unscanned = _unscanned(cells, _one_value(image, cells, cell_px))
    scanned = ~_grown(unscanned)
    glass, colour = _glass_cells(cells, flat & scanned, scanned)
    if unscanned.any() and (colour is None or not _grainy(cells, glass)):
        # The one value is the glass, clipped or drawn, and what is beside it is tissue or drawn as well.
        unscanned, scanned = np.zeros_like(unscanned), np.ones_like(scanned)
        glass, colour = _glass_cells(cells, flat, scanned)
    if colour is None:
        colour = _assumed(cells[scanned] if scanned.any() else cells.reshape(-1, 3))
        field = np.broadcast_to(colour, cells.shape).copy()
        return Glass(colour, field, flat, unscanned, cells, cell_px, _FLOOR_OD / OD, False)
    even, light = cells, np.zeros(flat.shape, np.int32)
    for _ in range(_ROUNDS):  # the light that is known here shows more of the glass there
        found = _light(_OD_OF[cells].sum(axis=2) // 3, glass)
        lit = _lit(cells, -found)
        again, colour_again = _glass_cells(lit, flat & scanned, scanned)
        if colour_again is None:
            break
        even, light, glass, colour = lit, found, again, colour_again
    field, noise_od = _even_field(even, glass, colour)
    return Glass(colour, _lit(field, light), flat, unscanned, cells, cell_px, noise_od, True)


def _even_field(
    cells: NDArray[np.uint8], glass: NDArray[np.bool_], colour: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], float]:
    """Return uint8[h, w, 3], the glass at each cell, and the optical density that its own noise stays below."""
    field = _field(cells, glass, colour)
    most = max(_STANDS_OUT_OD, _tolerance(colour))
    for _ in range(_ROUNDS):  # pale tissue that was taken for glass stands out where there is brighter glass around
        kept = glass & (absorbed(cells, field) <= most)
        if kept.sum() < _LEAST_CELLS:
            break
        glass, field = kept, _field(cells, kept, colour)
    structure = int(np.percentile(absorbed(cells, field)[glass], _QUIET, method="lower"))
    grain = math.sqrt(float(np.median(roughness(cells)[glass]))) / (float(colour.mean()) + 1)
    return field, min(max(structure + _GRAINS * grain * OD, _FLOOR_OD), _NOISIEST_OD) / OD


def cells_of(image: NDArray[np.uint8], cell_px: int) -> NDArray[np.uint8]:
    """Return uint8[h, w, 3]: the mean of each whole cell."""
    high, wide = (side // cell_px for side in image.shape[:2])
    whole = image[: high * cell_px, : wide * cell_px]
    return np.asarray(cv2.resize(whole, (wide, high), interpolation=cv2.INTER_AREA), np.uint8)


def flat_cells(cells: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return bool[h, w]: cells whose neighbours, and they themselves, have one colour but for noise."""
    return roughness(cells) <= _FLAT_LEVELS**2


def roughness(cells: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return float32[h, w]: the variance of 3 x 3 cells, the mean of the channels, in grey levels squared."""
    total = np.zeros(cells.shape[:2], np.int32)
    for channel in cv2.split(cells):
        sums = _box(channel.astype(np.int32), 3)
        squares = _box(channel.astype(np.int32) ** 2, 3)
        total += 9 * squares - sums * sums
    return total.astype(np.float32) / np.float32(243)


def absorbed(cells: NDArray[np.uint8], field: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Return int32[h, w]: the optical density over the glass in thousandths, of the channel that has most of it."""
    result = density(field[..., 0], cells[..., 0])
    for channel in (1, 2):
        np.maximum(result, density(field[..., channel], cells[..., channel]), out=result)
    return result


def density(glass: NDArray[np.uint8] | np.uint8, cells: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Return int32 of the cells' shape: thousandths of optical density, negative where brighter than the glass."""
    return np.asarray(_OD_OF[cells] - _OD_OF[glass], np.int32)


def levelled(glass: Glass) -> NDArray[np.uint8]:
    """Return uint8[3, 256]: for each channel, the table that brings the glass to `WHITE`."""
    values = np.arange(256) + 1.0
    ratios = (WHITE + 1.0) / (glass.colour.astype(np.float64) + 1)
    return np.asarray(np.clip(np.rint(values[None] * ratios[:, None] - 1), 0, 255).astype(np.uint8))


_OD_OF: Final = np.rint(-OD * np.log((np.arange(256) + 1) / 256)).astype(np.int32)


def _glass_cells(
    cells: NDArray[np.uint8], flat: NDArray[np.bool_], scanned: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.uint8] | None]:
    """Return bool[h, w], the cells that are glass, and its colour; None where there is none."""
    none = np.zeros(flat.shape, np.bool_)
    od = _OD_OF[cells]
    tint = od.max(axis=2) - od.min(axis=2)
    bright = cells.max(axis=2) > DARKEST_GLASS
    candidates = flat & bright & (tint <= _TINT_OD)
    if candidates.sum() >= _LEAST_CELLS:
        colour = _brightest_peak(cells[candidates])
    elif (flat & bright).any():
        colour = _brightest_peak(cells[flat & bright])
        alike = np.abs(od - _OD_OF[colour]).max(axis=2) <= _SAME_OD
        if (flat & alike).sum() < max(_LEAST_CELLS, _ALMOST_ALL * flat.size):
            return none, None
    else:
        return none, None
    away = od - _OD_OF[colour]
    level = away.sum(axis=2) // 3
    if (scanned & (level < -_BRIGHTER_OD)).sum() > _BRIGHTER_PART * scanned.sum():
        return none, None
    same_hue = np.abs(away - level[..., None]).max(axis=2) <= max(_SAME_HUE_OD, _tolerance(colour))
    alike = flat & same_hue & (level <= _SLOPE_OD)
    _, labels = cv2.connectedComponents(alike.view(np.uint8), connectivity=4)
    of_peak = np.zeros(int(labels.max()) + 1, np.bool_)
    of_peak[labels[alike & (np.abs(level) <= _FLOOR_OD)]] = True
    of_peak[0] = False
    glass = of_peak[labels] | (alike & (np.abs(level) <= max(_SAME_OD, _tolerance(colour))))
    return (glass, colour) if glass.sum() >= _LEAST_CELLS else (none, None)


def _brightest_peak(colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return uint8[3]: the colour at the brightest peak of the histogram of brightness that is worth the name."""
    brightness = colours.astype(np.int32).sum(axis=1)
    counts = np.bincount(brightness // _BIN, minlength=765 // _BIN + 1)
    smooth = np.convolve(counts, (1, 2, 1), "same")
    peak = int(np.flatnonzero(smooth >= max(_PEAK_PART * int(smooth.max()), _LEAST_CELLS))[-1:].sum())
    if not peak:
        peak = int(smooth.argmax())
    while peak and smooth[peak - 1] > smooth[peak]:
        peak -= 1
    near = np.abs(brightness - (peak * _BIN + _BIN // 2)) <= _BIN
    return np.asarray(np.rint(np.median(colours[near] if near.any() else colours, axis=0)).astype(np.uint8))


def _assumed(colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return uint8[3]: a colourless glass as bright as the brightest hundredth of the slide, or `WHITE`."""
    brightest = int(np.percentile(colours, 99, axis=0, method="lower").max())
    return np.full(3, max(brightest, DARKEST_GLASS + 1), np.uint8)


def _grainy(cells: NDArray[np.uint8], glass: NDArray[np.bool_]) -> bool:
    """Tell whether there is noise, as in every picture, and no more of it than in a picture of glass."""
    return 0 < float(roughness(cells)[glass].mean()) <= _GLASS_LEVELS**2


def _tolerance(colour: NDArray[np.uint8]) -> int:
    """Return two grey levels of this colour, in thousandths of optical density: it is much where the slide is dark."""
    return round(2 * OD / (int(colour.min()) + 1))


def _light(level: NDArray[np.int32], glass: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Return int32[h, w]: how much dimmer than on average the light is, in thousandths of optical density.

    A polynomial of the second degree through the glass: a lamp off centre, a dark corner. It is solved in fractions,
    so that it is the same on every CPU, and kept to what was seen on glass where it has to guess.
    """
    rows, columns = np.nonzero(glass)
    high, wide = level.shape

    def powers(y: NDArray[np.int64], x: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        y, x = (2 * y * _STEPS) // max(1, high - 1) - _STEPS, (2 * x * _STEPS) // max(1, wide - 1) - _STEPS
        return [np.ones_like(x + y), x + 0 * y, y + 0 * x, x * x + 0 * y, x * y, y * y + 0 * x]

    terms = powers(rows.astype(np.int64), columns.astype(np.int64))
    seen = level[rows, columns].astype(np.int64)
    matrix = [[Fraction(int((a * b).sum())) for b in terms] + [Fraction(int((a * seen).sum()))] for a in terms]
    factors = _solved(matrix)
    if factors is None:
        return np.zeros_like(level)
    y, x = np.arange(high, dtype=np.int64)[:, None], np.arange(wide, dtype=np.int64)[None]
    fine = [round(factor * 2**20) for factor in factors]
    fitted = sum(
        (factor * term for factor, term in zip(fine, powers(y, x), strict=True)), np.zeros(level.shape, np.int64)
    )
    fitted = np.clip(fitted >> 20, int(seen.min()), int(seen.max()))
    return np.asarray(fitted - int(np.median(fitted[glass])), np.int32)


def _solved(matrix: list[list[Fraction]]) -> list[Fraction] | None:
    """Solve linear equations (Gauss and Jordan); None where they have no one solution."""
    count = len(matrix)
    for i in range(count):
        pivot = next((row for row in range(i, count) if matrix[row][i]), None)
        if pivot is None:
            return None
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        matrix[i] = [value / matrix[i][i] for value in matrix[i]]
        for row in range(count):
            if row != i and matrix[row][i]:
                part = matrix[row][i]
                matrix[row] = [a - part * b for a, b in zip(matrix[row], matrix[i], strict=True)]
    return [row[-1] for row in matrix]


def _lit(cells: NDArray[np.uint8], dimmer: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Return uint8[h, w, 3]: the cells in light that is dimmer by so many thousandths of optical density."""
    factor = np.exp(-dimmer / OD)[..., None]
    return np.asarray(np.clip(np.rint((cells + 1.0) * factor - 1), 0, 255).astype(np.uint8))


def _field(cells: NDArray[np.uint8], glass: NDArray[np.bool_], colour: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return uint8[h, w, 3]: the glass at each cell, from the glass around it."""
    field = np.broadcast_to(colour, cells.shape).copy()
    weights = glass.astype(np.int32)
    open_yet = np.ones(glass.shape, np.bool_)
    for window in _WINDOWS:
        count = _box(weights, window)
        # A tenth of the smallest window, and no less in a larger one.
        here = open_yet & (count >= max(_LEAST_CELLS, _WINDOWS[0] ** 2 // 10))
        if here.any():
            for channel in range(3):
                sums = _box(weights * cells[..., channel], window)[here]
                field[here, channel] = (2 * sums + count[here]) // (2 * count[here])
        open_yet &= ~here
        if not open_yet.any():
            break
    return field


def _unscanned(cells: NDArray[np.uint8], one_value: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return bool[h, w]: where a writer has filled in one colourless value, from the border on, in straight edges.

    Glass has noise, and ends where tissue begins, which is no straight line along the axes.
    """
    found = np.zeros(cells.shape[:2], np.bool_)
    border = np.concatenate([cells[0], cells[-1], cells[:, 0], cells[:, -1]])
    values, counts = np.unique(border, axis=0, return_counts=True)
    for value in values[counts >= _UNSCANNED_PART * len(border)]:
        if int(value.max()) - int(value.min()) > 2:
            continue
        filled = cv2.medianBlur((one_value & (cells == value).all(axis=2)).astype(np.uint8), 5)
        _, labels = cv2.connectedComponents(filled, connectivity=4)
        edge = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
        filled = (np.isin(labels, edge[edge > 0])).astype(np.uint8)
        if _straightness(filled) >= _STRAIGHT_PART:
            found |= filled > 0
    return found


def _one_value(image: NDArray[np.uint8], cells: NDArray[np.uint8], cell_px: int) -> NDArray[np.bool_]:
    """Return bool[h, w]: cells whose corners and centre are exactly as their mean."""
    high, wide = cells.shape[:2]
    whole = image[: high * cell_px, : wide * cell_px]
    ends = (0, cell_px - 1)
    same = np.ones((high, wide), np.bool_)
    for y, x in ((cell_px // 2, cell_px // 2), *((y, x) for y in ends for x in ends)):
        same &= (whole[y::cell_px, x::cell_px] == cells).all(axis=2)
    return same


def _straightness(mask: NDArray[np.uint8]) -> float:
    """Return the part of a mask's edges that lie in straight runs along the axes; 0 where there is no edge."""
    long = total = 0
    for along in (mask, np.ascontiguousarray(mask.T)):
        steps = np.abs(np.diff(along.astype(np.int8), axis=0)).astype(np.uint8)
        if not steps.size:
            continue
        padded = cv2.copyMakeBorder(steps, 0, 0, _STRAIGHT_CELLS, _STRAIGHT_CELLS, cv2.BORDER_REPLICATE)
        runs = cv2.morphologyEx(padded, cv2.MORPH_OPEN, np.ones((1, _STRAIGHT_CELLS), np.uint8))
        long += int(runs[:, _STRAIGHT_CELLS:-_STRAIGHT_CELLS].sum())
        total += int(steps.sum())
    return long / total if total else 0.0


def _grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return np.asarray(cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0)


def _box(values: NDArray[np.int32], window: int) -> NDArray[np.int32]:
    """Return int32[h, w]: exact sums over a window, which sees a mirror beyond the border."""
    summed = cv2.boxFilter(
        values.astype(np.float64), cv2.CV_64F, (window, window), normalize=False, borderType=cv2.BORDER_REFLECT
    )
    return np.asarray(np.rint(summed), np.int32)
