"""The views of an image: random for training, central for evaluation. Pure functions of the image and given numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def training_view(image: NDArray[np.uint8], offset: float, flip_h: bool, flip_v: bool) -> NDArray[np.uint8]:
    """The largest square at a random place, flipped at random (paper: data augmentation, and nothing else).

    Args:
        image: uint8[H, W, 3].
        offset: 0 <= offset < 1, the place of the crop along the longer side.

    Returns:
        uint8[P, P, 3] with P = min(H, W), a view into the image.
    """
    view = _square(image, offset)
    if flip_h:
        view = view[:, ::-1]
    if flip_v:
        view = view[::-1]
    return view


def evaluation_view(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The central square: uint8[H, W, 3] -> uint8[P, P, 3] with P = min(H, W), a view into the image."""
    return _square(image, 0.5)


def _square(image: NDArray[np.uint8], offset: float) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    side = min(height, width)
    # The number of places is the difference plus one; 0.5 is the centre, rounded down.
    top = int(offset * (height - side + 1)) if offset != 0.5 else (height - side) // 2
    left = int(offset * (width - side + 1)) if offset != 0.5 else (width - side) // 2
    return image[top : top + side, left : left + side]
