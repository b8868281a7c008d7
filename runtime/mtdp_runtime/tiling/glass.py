"""The glass of a slide: its colour, how it varies over the slide, and how far from it a pixel has to be.

Glass is what is flat, hardly coloured, and the brightest of its kind on the slide: a stain only absorbs. All is told
on cells of about 40 µm, in whole numbers, so that every CPU finds the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.tiling.cells import (
    CELL_UM,
    OD,
    OD_OF,
    absorbed,
    box,
    calm,
    cells_of,
    flat_cells,
    grain,
    grain_variance,
    greatest,
    least,
    mean,
    percentile,
    roughness,
)
from mtdp_runtime.tiling.light import light_of, lit, local_glass
from mtdp_runtime.tiling.unscanned import grown, one_value_cells, unscanned_cells

WHITE: Final = 243  # of 255: what glass is taken to be on a slide that shows none, and what all glass is brought to
DARKEST_GLASS: Final = 30  # of 255: darker is a hole in the data or a frame, not glass
_GLASS_LEVELS: Final = 1.0  # roughness of glass without JPEG: a noise of 4 levels a pixel has it
_TINT_OD: Final = 300  # thousandths, as all that end in _OD; between two channels: more than lamps do
_WARM_OD: Final = 600  # the same from red over green to blue, as warm lamps, glue and old mounting medium absorb
_ALMOST_ALL: Final = 2 / 3  # what is flat and alike over this part of a slide is glass however it is tinted
_LEAST_CELLS: Final = 16  # glass shows itself in 0.03 mm² of flat cells at least
_PEAK_PART: Final = 0.02  # of the tallest peak of flat cells: a smaller one is a bubble or a scratch, not the glass
_CLIPPED: Final = 250  # of 255
_PEAK_WALK: Final = 0.95  # a peak's top is not darker than this part of its brighter foot
_BIN: Final = 6  # of 765, the sum of the channels: two grey levels
_SAME_HUE_OD: Final = 20  # the lamp changes all channels alike; a stain does not
_SAME_OD: Final = 40  # stitched stripes differ by a few percent
_SLOPE_OD: Final = 350  # a lamp's light may fall this far, where it falls without a step
_BRIGHTER_OD: Final = 100  # glass is not darker than this below...
_BRIGHTER_PART: Final = 0.05  # ...more than this part of the slide
_FLOOR_OD: Final = 20  # 2 % of the light: less is dust, haze and the rounding of 8 bits
_NOISIEST_OD: Final = 100
_QUIET: Final = 99.0  # percent of the glass: blocks of JPEG, stripes, smears
_GRAINS: Final = 3.0  # standard deviations of its grain beyond, as there are many more pixels than cells
_ROUNDS: Final = 3
_LIGHT_ROUNDS: Final = 8
_EVEN_OD: Final = 10  # light that falls by less over the slide is even: half of what is dust and haze
_OTHER_LIGHT_OD: Final = 60  # what is as smooth and as colourless as the glass and dimmer by less is glass
_SMOOTH: Final = 2.0  # of the glass's own variance between pixels...
_BLOCKY: Final = 95.0  # percent of the glass: of coarse JPEG all but the edges of blocks is smooth
_SMOOTH_LEVELS: Final = 1.5  # ...and this much for blocks of JPEG, in grey levels
_EXPLAINED: Final = 0.9  # of the glass, and of islands of it, within the noise of the light that both are to be in
_SMOOTH_PART: Final = 0.72  # of the 5 x 5 cells around: a stripe's edge crosses one of five
_JPEG_COLOUR: Final = 3  # times two grey levels: so far does JPEG of quality 30 move a colour
_STANDS_OUT_OD: Final = 40  # what is dimmer than the glass around is not glass


@dataclass(frozen=True, slots=True, eq=False)
class Glass:
    """What is known of a slide's glass.

    `colour` is uint8[3] RGB. `field` is uint8[h, w, 3]: the glass at each cell of `cell_px` pixels, by the light there.
    `noise_od` is the optical density that its own noise and dirt stay below. `unscanned` is bool[h, w]: no picture
    at all. `dim` is bool[h, w]: as smooth and as colourless as the glass, in other light. `told` is false where no
    glass could be told from tissue, and a white one is assumed.
    """

    colour: NDArray[np.uint8]
    field: NDArray[np.uint8]
    flat: NDArray[np.bool_]
    unscanned: NDArray[np.bool_]
    dim: NDArray[np.bool_]
    cells: NDArray[np.uint8]
    cell_px: int
    noise_od: float
    told: bool


def find_glass(image: NDArray[np.uint8], mpp: float) -> Glass:
    """Tell the glass of a slide.

    Args:
        image: uint8[H, W, 3] RGB.
        mpp: micrometres per pixel of it.
    """
    cell_px = min(max(3, round(CELL_UM / mpp)), *image.shape[:2])
    cells = cells_of(image, cell_px)
    grains = grain(image, cell_px)
    flat = flat_cells(cells, grains)
    unscanned = unscanned_cells(cells, one_value_cells(image, cells, cell_px))
    scanned = ~grown(unscanned)
    glass, colour = _glass_cells(cells, flat & scanned, scanned)
    if unscanned.any() and (
        colour is None or not _may_be_glass(OD_OF[colour]) or not _grainy(cells, glass, cells[unscanned])
    ):
        # The one value is the glass, clipped or drawn, and what is beside it is tissue or drawn as well.
        unscanned, scanned = np.zeros_like(unscanned), np.ones_like(scanned)
        glass, colour = _glass_cells(cells, flat, scanned)
    if colour is None:
        colour = _assumed(cells[scanned] if scanned.any() else cells.reshape(-1, 3))
        field = np.broadcast_to(colour, cells.shape).copy()
        return Glass(colour, field, flat, unscanned, np.zeros_like(flat), cells, cell_px, _FLOOR_OD / OD, False)
    glass = _with_islands(cells, flat & scanned, grains, glass, colour)
    even, light = cells, np.zeros(flat.shape, np.int32)
    for _ in range(_LIGHT_ROUNDS):  # the light that is known here shows more of the glass there
        found = light_of(mean(OD_OF[cells]), glass)
        if int(np.ptp(found)) <= _EVEN_OD:
            break
        evened = lit(cells, -found)
        if int(np.ptp(found)) > _FLOOR_OD:  # a slope of light is no texture
            flat = flat_cells(evened, grains)
        again, colour_again = _glass_cells(evened, flat & scanned, scanned)
        if colour_again is None:
            break
        same = bool((again == glass).all() and (found == light).all())
        even, light, glass, colour = evened, found, again, colour_again
        if same:
            break
    field, noise_od = _even_field(even, glass, colour)
    dim = _in_other_light(even, field, grains, glass, _tolerance(colour))
    return Glass(colour, lit(field, light), flat, unscanned, dim, cells, cell_px, noise_od, True)


def _with_islands(
    cells: NDArray[np.uint8],
    flat: NDArray[np.bool_],
    grains: NDArray[np.int32],
    glass: NDArray[np.bool_],
    colour: NDArray[np.uint8],
) -> NDArray[np.bool_]:
    """Return bool[h, w]: the glass, and what of it lies beyond tissue where the light has fallen.

    No slope of light leads there. It has the glass's hue and no more grain; so may pale grey tissue, which has an edge:
    only where one light explains nearly all of both, they are one glass.
    """
    away = OD_OF[cells] - OD_OF[colour]
    level = mean(away)
    hue = greatest(np.abs(away - level[..., None])) <= max(_SAME_HUE_OD, _tolerance(colour))
    most = max(round(_SMOOTH * percentile(grains[glass], 50)), percentile(grains[glass], _BLOCKY))
    smooth = flat & hue & (level > 0) & (level <= _SLOPE_OD) & (grains <= most)
    islands = smooth & (box(smooth.astype(np.int32), 5) >= round(_SMOOTH_PART * 25)) & ~glass
    if islands.sum() < _LEAST_CELLS:
        return glass
    both = glass | islands
    left = level - light_of(level, both)
    explained = np.abs(left - int(np.median(left[both]))) <= max(_FLOOR_OD, _tolerance(colour))
    one_light = min(explained[glass].mean(), explained[islands].mean()) >= _EXPLAINED
    return both if one_light else glass


def _in_other_light(
    cells: NDArray[np.uint8],
    field: NDArray[np.uint8],
    grains: NDArray[np.int32],
    glass: NDArray[np.bool_],
    tolerance_od: int,
) -> NDArray[np.bool_]:
    """Return bool[h, w]: glass in a stripe of stitching, or in a corner where the light falls as no polynomial does.

    It is a little dimmer in all channels alike, and has no more texture than the glass: grey or pale tissue has.
    """
    away = OD_OF[cells] - OD_OF[field]
    level = mean(away)
    hue = greatest(np.abs(away - level[..., None])) <= max(_SAME_HUE_OD, _JPEG_COLOUR * tolerance_od)
    usual, most = (percentile(grains[glass], part) for part in (50, _BLOCKY))
    smooth = grains <= max(round(_SMOOTH * usual), most) + grain_variance(_SMOOTH_LEVELS)
    alike = hue & (level <= max(_OTHER_LIGHT_OD + tolerance_od, 2 * tolerance_od))
    share = box((alike & smooth).astype(np.int32), 5)
    # The step between two stripes is not smooth itself, but calmer than the edge of tissue.
    return alike & grown(share >= round(_SMOOTH_PART * 25)) & calm(grains)


def _even_field(
    cells: NDArray[np.uint8], glass: NDArray[np.bool_], colour: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], float]:
    """Return uint8[h, w, 3], the glass at each cell, and the optical density that its own noise stays below."""
    field = local_glass(cells, glass, colour)
    most = max(_STANDS_OUT_OD, _tolerance(colour))
    for _ in range(_ROUNDS):  # pale tissue that was taken for glass stands out where there is brighter glass around
        kept = glass & (absorbed(cells, field) <= most)
        if kept.sum() < _LEAST_CELLS or (kept == glass).all():
            break
        glass, field = kept, local_glass(cells, kept, colour)
    structure = percentile(absorbed(cells, field)[glass], _QUIET)
    grain = math.sqrt(float(np.median(roughness(cells)[glass]))) / (float(colour.mean()) + 1)
    return field, min(max(structure + _GRAINS * grain * OD, _FLOOR_OD), _NOISIEST_OD) / OD


def levelled(glass: Glass) -> NDArray[np.uint8]:
    """Return uint8[3, 256]: for each channel, the table that brings the glass to `WHITE`."""
    values = np.arange(256) + 1.0
    ratios = (WHITE + 1.0) / (glass.colour.astype(np.float64) + 1)
    return np.asarray(np.clip(np.rint(values[None] * ratios[:, None] - 1), 0, 255).astype(np.uint8))


def _glass_cells(
    cells: NDArray[np.uint8], flat: NDArray[np.bool_], scanned: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.uint8] | None]:
    """Return bool[h, w], the cells that are glass, and its colour; None where there is none."""
    none = np.zeros(flat.shape, np.bool_)
    od = OD_OF[cells]
    bright = least(od) < OD_OF[DARKEST_GLASS]
    candidates = flat & bright & _may_be_glass(od)
    if candidates.sum() >= _LEAST_CELLS:
        colour = _brightest_peak(cells[candidates])
    elif (flat & bright).any():
        colour = _brightest_peak(cells[flat & bright])
        alike = greatest(np.abs(od - OD_OF[colour])) <= _SAME_OD
        if (flat & alike).sum() < max(_LEAST_CELLS, _ALMOST_ALL * flat.size):
            return none, None
    else:
        return none, None
    away = od - OD_OF[colour]
    level = mean(away)
    if (scanned & (level < -_BRIGHTER_OD)).sum() > _BRIGHTER_PART * scanned.sum():
        return none, None
    same_hue = greatest(np.abs(away - level[..., None])) <= max(_SAME_HUE_OD, _tolerance(colour))
    alike = flat & same_hue & (level <= _SLOPE_OD)
    _, labels = cv2.connectedComponents(alike.view(np.uint8), connectivity=8)
    of_peak = np.zeros(int(labels.max()) + 1, np.bool_)
    of_peak[labels[alike & (np.abs(level) <= _FLOOR_OD)]] = True
    of_peak[0] = False
    glass = of_peak[labels] | (alike & (np.abs(level) <= max(_SAME_OD, _tolerance(colour))))
    return (glass, colour) if glass.sum() >= _LEAST_CELLS else (none, None)


def _may_be_glass(od: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Return bool[...]: a colour, int32[..., 3] in thousandths of optical density, that glass and lamp may have."""
    tint = greatest(od) - least(od)
    warm = (od[..., 0] <= od[..., 1]) & (od[..., 1] <= od[..., 2]) & (tint <= _WARM_OD)
    return np.asarray(warm | (tint <= _TINT_OD))


def _brightest_peak(colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return uint8[3]: the colour at the brightest peak of the histogram of brightness that is worth the name."""
    brightness = colours[:, 0].astype(np.int32) + colours[:, 1] + colours[:, 2]
    counts = np.bincount(brightness // _BIN, minlength=765 // _BIN + 1)
    smooth = np.convolve(counts, (1, 2, 1), "same")
    peak = int(np.flatnonzero(smooth >= max(_PEAK_PART * int(smooth.max()), _LEAST_CELLS))[-1:].sum())
    if not peak:
        peak = int(smooth.argmax())
    # Light that falls off over the slide has no peak, only a slope: its top is glass as well as its foot.
    least = math.ceil(_PEAK_WALK * peak)
    while peak > least and smooth[peak - 1] > smooth[peak]:
        peak -= 1
    near = np.abs(brightness - (peak * _BIN + _BIN // 2)) <= _BIN
    return np.asarray(np.rint(np.median(colours[near] if near.any() else colours, axis=0)).astype(np.uint8))


def _assumed(colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return uint8[3]: a colourless glass as bright as the brightest hundredth of the slide, or `WHITE`."""
    brightest = int(np.percentile(colours, 99, axis=0, method="lower").max())
    return np.full(3, max(brightest, DARKEST_GLASS + 1), np.uint8)


def _grainy(cells: NDArray[np.uint8], glass: NDArray[np.bool_], fill: NDArray[np.uint8]) -> bool:
    """Tell whether glass beside a fill has noise, as in every picture, and, beside white, no more than glass has.

    White may be glass that was clipped, with pale tissue beside it; another value only a writer fills in.
    """
    rough = roughness(cells)[glass]
    # A slope of light, or a step of stitching, is rough somewhere; a quarter of the glass is not.
    quiet = float(np.percentile(rough, 25, method="lower")) <= _GLASS_LEVELS**2
    return float(rough.mean()) > 0 and (quiet or int(fill.max()) < _CLIPPED)


def _tolerance(colour: NDArray[np.uint8]) -> int:
    """Return two grey levels of this colour, in thousandths of optical density: it is much where the slide is dark."""
    return round(2 * OD / (int(colour.min()) + 1))
