"""A slide in cells of about 40 µm: means, texture and optical density, in whole numbers, the same on every CPU."""

from __future__ import annotations

import math
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

CELL_UM: Final = 40.0  # side of a cell: larger than a nucleus, smaller than a gland
OD: Final = 1000.0  # optical densities (natural logarithm) are whole thousandths
OD_OF: Final = np.rint(-OD * np.log((np.arange(256) + 1) / 256)).astype(np.int32)  # of each grey level over 255

# A cell is flat if its neighbours' means differ by this little (grey levels, root of the mean square). Noise of 4
# levels a mask pixel gives 1.0, JPEG of quality 30 gives 1.4; H&E has 3 to 40.
_FLAT_LEVELS: Final = 1.6
_GRAIN_LEVELS: Final = 5.0  # nor do its pixels by more: of pale tissue the nuclei are averaged out in cells


def greatest(planes: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return int32[h, w]: the greatest of the three channels of int32[h, w, 3]. Much faster than max(axis=2)."""
    return np.maximum(np.maximum(planes[..., 0], planes[..., 1]), planes[..., 2])


def least(planes: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return int32[h, w]: the least of the three channels of int32[h, w, 3]."""
    return np.minimum(np.minimum(planes[..., 0], planes[..., 1]), planes[..., 2])


def mean(planes: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return int32[h, w]: the mean of the three channels of int32[h, w, 3], rounded down."""
    return np.asarray((planes[..., 0] + planes[..., 1] + planes[..., 2]) // 3, np.int32)


def all_channels(which: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return bool[h, w]: true where all three channels of bool[h, w, 3] are."""
    return np.asarray(which[..., 0] & which[..., 1] & which[..., 2])


def cells_of(image: NDArray[np.uint8], cell_px: int) -> NDArray[np.uint8]:
    """Return uint8[h, w, 3]: the mean of each whole cell."""
    high, wide = (side // cell_px for side in image.shape[:2])
    whole = image[: high * cell_px, : wide * cell_px]
    return np.asarray(cv2.resize(whole, (wide, high), interpolation=cv2.INTER_AREA), np.uint8)


def flat_cells(cells: NDArray[np.uint8], grains: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Return bool[h, w]: cells whose neighbours, and they themselves, have one colour but for noise; see `grain`."""
    return np.asarray((roughness(cells) <= _FLAT_LEVELS**2) & calm(grains))


def calm(grains: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Return bool[h, w]: cells which, with their neighbours, have no more texture than noisy glass; see `grain`."""
    return np.asarray(box(grains, 3) <= 9 * grain_variance(_GRAIN_LEVELS))


def grain(image: NDArray[np.uint8], cell_px: int) -> NDArray[np.int32]:
    """Return int32[h, w]: how much pixels within a cell differ; `grain_variance` has the unit.

    Twelve squared differences across each cell: through its centre, and from corner to corner, in each channel.
    """
    high, wide = (side // cell_px for side in image.shape[:2])
    whole = image[: high * cell_px, : wide * cell_px]
    middle, end = cell_px // 2, cell_px - 1
    total = np.zeros((high, wide), np.int32)
    for one, other in (
        ((0, 0), (end, end)),
        ((0, end), (end, 0)),
        ((0, middle), (end, middle)),
        ((middle, 0), (middle, end)),
    ):
        first, second = (whole[y::cell_px, x::cell_px].astype(np.int32) for y, x in (one, other))
        squares = (first - second) ** 2
        total += squares[..., 0] + squares[..., 1] + squares[..., 2]
    return total


def grain_variance(levels: float) -> int:
    """Return what `grain` is, on average, for noise of this standard deviation."""
    return round(2 * levels**2 * 12)


def roughness(cells: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return float32[h, w]: the variance of 3 x 3 cells, the mean of the channels, in grey levels squared."""
    total = np.zeros(cells.shape[:2], np.int32)
    for channel in cv2.split(cells):
        sums = box(channel.astype(np.int32), 3)
        squares = box(channel.astype(np.int32) ** 2, 3)
        total += 9 * squares - sums * sums
    return total.astype(np.float32) / np.float32(243)


def percentile(values: NDArray[np.int32], percent: float) -> int:
    """Return the value below which so many percent of int32[n] lie, as NumPy's method "lower"; faster, by counting."""
    lowest = int(values.min())
    counts = np.cumsum(np.bincount(values - lowest))
    return lowest + int(np.searchsorted(counts, math.floor((len(values) - 1) * (percent / 100)), side="right"))


def absorbed(cells: NDArray[np.uint8], field: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Return int32[h, w]: the optical density over the glass in thousandths, of the channel that has most of it."""
    return greatest(OD_OF[cells] - OD_OF[field])


def density(glass: NDArray[np.uint8] | np.uint8, cells: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Return int32 of the cells' shape: thousandths of optical density, negative where brighter than the glass."""
    return np.asarray(OD_OF[cells] - OD_OF[glass], np.int32)


def box(values: NDArray[np.int32], window: int) -> NDArray[np.int32]:
    """Return int32[h, w]: exact sums over a window, which sees a mirror beyond the border."""
    summed = cv2.boxFilter(
        values.astype(np.float64), cv2.CV_64F, (window, window), normalize=False, borderType=cv2.BORDER_REFLECT
    )
    return np.asarray(np.rint(summed), np.int32)
