"""What of a slide was not scanned, and was filled in with one value by the writer of the file."""

from __future__ import annotations

from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.tiling.cells import all_channels

_STRAIGHT_CELLS: Final = 8  # an edge this long without a bend (0.3 mm) is a machine's
_STRAIGHT_PART: Final = 0.7  # of the edges of what was not scanned
_UNSCANNED_PART: Final = 0.05  # of the image's border; less is not searched for


def unscanned_cells(cells: NDArray[np.uint8], one_value: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return bool[h, w]: where a writer has filled in one colourless value, from the border on, in straight edges.

    Glass has noise, and ends where tissue begins, which is no straight line along the axes.
    """
    found = np.zeros(cells.shape[:2], np.bool_)
    border = np.concatenate([cells[0], cells[-1], cells[:, 0], cells[:, -1]])
    values, counts = np.unique(border, axis=0, return_counts=True)
    for value in values[counts >= _UNSCANNED_PART * len(border)]:
        if int(value.max()) - int(value.min()) > 2:
            continue
        filled = cv2.medianBlur((one_value & all_channels(cells == value)).astype(np.uint8), 5)
        _, labels = cv2.connectedComponents(filled, connectivity=4)
        edge = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
        filled = (np.isin(labels, edge[edge > 0])).astype(np.uint8)
        if _straightness(filled) >= _STRAIGHT_PART:
            found |= filled > 0
    return found


def one_value_cells(image: NDArray[np.uint8], cells: NDArray[np.uint8], cell_px: int) -> NDArray[np.bool_]:
    """Return bool[h, w]: cells whose corners and centre are exactly as their mean."""
    high, wide = cells.shape[:2]
    whole = image[: high * cell_px, : wide * cell_px]
    ends = (0, cell_px - 1)
    same = np.ones((high, wide), np.bool_)
    for y, x in ((cell_px // 2, cell_px // 2), *((y, x) for y in ends for x in ends)):
        same &= all_channels(whole[y::cell_px, x::cell_px] == cells)
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


def grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return bool[h, w]: the mask and its neighbours."""
    return np.asarray(cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0)
