"""Area-averaged resampling by a float scale."""

from __future__ import annotations

import math

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
    # OpenCV keeps the factors exact only when they, and not the size, are given; it then rounds the size, so one
    # row and column of source are repeated to be sure that it never rounds to less than what is wanted.
    method = cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR
    resized = cv2.resize(source, None, fx=1 / scale, fy=1 / scale, interpolation=method)
    if resized.shape[0] < height or resized.shape[1] < width:
        pad = math.ceil(scale)
        padded = cv2.copyMakeBorder(source, 0, pad, 0, pad, cv2.BORDER_REPLICATE)
        resized = cv2.resize(padded, None, fx=1 / scale, fy=1 / scale, interpolation=method)
    out[...] = resized[:height, :width]
