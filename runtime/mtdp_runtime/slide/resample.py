"""Area-averaged resampling by a float scale."""

from __future__ import annotations

import math
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

# A scale this close to 1 moves no pixel of a tile by a hundredth of a pixel: the pixels are taken as they are.
IDENTITY_TOLERANCE = 1e-5


def source_px(out_px: int, scale: float) -> int:
    """Return how many source pixels cover `out_px` output pixels of `scale` source pixels each.

    >>> source_px(224, 2.0), source_px(224, 1.979), source_px(224, 0.998)
    (448, 444, 224)
    """
    if abs(scale - 1) < IDENTITY_TOLERANCE:
        return out_px
    return max(1, math.ceil(out_px * scale - 1e-6))


def resample_into(out: NDArray[np.uint8], source: NDArray[np.uint8], scale: float) -> None:
    """Fill out, uint8[H, W, 3], with averages over cells of scale x scale source pixels, the first at the corner.

    Cells are fractions of pixels where scale is no integer; the scale is never rounded to fit the sizes. Below 1 the
    result is interpolated linearly.

    Args:
        source: uint8[source_px(H, scale), source_px(W, scale), 3], or larger.
    """
    height, width = out.shape[:2]
    if abs(scale - 1) < IDENTITY_TOLERANCE:
        out[...] = source[:height, :width]
        return
    if _opencv_would_copy(source.shape[0], scale) and _opencv_would_copy(source.shape[1], scale):
        _blend_neighbours(out, source, scale)
        return
    # OpenCV keeps the factors exactly only when they, and not the size, are given; it then rounds the size, so where
    # that would be too small, the last row and column of the source are repeated.
    method = cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR
    resized = cv2.resize(source, None, dst=out, fx=1 / scale, fy=1 / scale, interpolation=method)
    if resized is out:
        return  # it had the size that OpenCV wanted, so it was written in place
    if resized.shape[0] < height or resized.shape[1] < width:
        pad = math.ceil(scale)
        padded = cv2.copyMakeBorder(source, 0, pad, 0, pad, cv2.BORDER_REPLICATE)
        resized = cv2.resize(padded, None, fx=1 / scale, fy=1 / scale, interpolation=method)
    out[...] = resized[:height, :width]


def _opencv_would_copy(source_side: int, scale: float) -> bool:
    """Tell whether cv2.resize would round the output to the input's size and then not resample at all."""
    return abs(source_side / scale - source_side) < 0.51


def _blend_neighbours(out: NDArray[np.uint8], source: NDArray[np.uint8], scale: float) -> None:
    """Resample where no pixel moves by more than about half a pixel: each is a blend of two neighbours, per axis."""
    height, width = out.shape[:2]
    padded = cv2.copyMakeBorder(source, 1, 1, 1, 1, cv2.BORDER_REPLICATE)
    first, second, shift = _weights_across(width, padded.shape[0], scale)
    across = cv2.blendLinear(padded[:, shift : shift + width], padded[:, shift + 1 : shift + 1 + width], first, second)
    first, second, shift = _weights_down(height, width, scale)
    cv2.blendLinear(across[shift : shift + height], across[shift + 1 : shift + 1 + height], first, second, dst=out)


Weights = tuple[NDArray[np.float32], NDArray[np.float32], int]  # float32[H, W] twice, and where the first one begins


@lru_cache(maxsize=4)
def _weights_across(out_px: int, lines: int, scale: float) -> Weights:
    first, second, shift = _neighbour_weights(out_px, scale)
    return np.tile(first, (lines, 1)), np.tile(second, (lines, 1)), shift


@lru_cache(maxsize=4)
def _weights_down(out_px: int, columns: int, scale: float) -> Weights:
    first, second, shift = _neighbour_weights(out_px, scale)
    return np.tile(first[:, None], (1, columns)), np.tile(second[:, None], (1, columns)), shift


def _neighbour_weights(out_px: int, scale: float) -> Weights:
    """Return float32[out_px] twice, the weights of two neighbours, and where the first one begins in a source
    that was padded by one pixel."""
    i = np.arange(out_px, dtype=np.float64)
    if scale > 1:  # the area of a cell: pixel i from i * scale to i + 1, pixel i + 1 from there to (i + 1) * scale
        first, second, shift = (i + 1 - i * scale) / scale, (i + 1) * (scale - 1) / scale, 1
    else:  # linear between centres, which lie at (i + 1/2) * scale - 1/2, at or before pixel i
        first = (i + 0.5) * (1 - scale)
        second, shift = 1 - first, 0
    return first.astype(np.float32), second.astype(np.float32), shift
