"""Whether an image of a level's shape also shows what the level before it shows: a macro may have that shape, too.

A few small windows are compared. Only what is plainly another picture is called so: levels are made by averaging, by
interpolation or by leaving pixels out, and are compressed anew, and all of that is still the same picture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.slide import Level

_PLACES: Final = ((0.5, 0.5), (0.25, 0.3), (0.72, 0.28), (0.3, 0.75), (0.7, 0.68))  # of a level's width and height
_SIDE_PX: Final = 8  # of a window, in pixels of the coarser level
_MOST_PX: Final = 2048  # of its side in the finer one
_PLAINLY: Final = 30.0  # grey levels between the windows' means, in the middle of all windows

Read = Callable[[int, int, int, int, int], NDArray[np.uint8]]  # level, x, y, width, height in its own pixels


def other_pictures(levels: tuple[Level, ...], read: Read) -> tuple[int, ...]:
    """Return which levels show something else than the next finer one; `levels` have the finest first."""
    others: list[int] = []
    finer = 0
    for number in range(1, len(levels)):
        if _differs(levels, number, finer, read):
            others.append(number)
        else:
            finer = number
    return tuple(others)


def shows_something_else(levels: tuple[Level, ...], others: tuple[int, ...]) -> str:
    """Say which images are no levels, to be added to a reader's reason."""
    sizes = (f"{levels[i].width} x {levels[i].height} px" for i in others)
    return f"; no level of this picture: {', '.join(sizes)} shows something else"


def _differs(levels: tuple[Level, ...], number: int, finer: int, read: Read) -> bool:
    level, ratio = levels[number], levels[number].downsample / levels[finer].downsample
    side = min(_SIDE_PX, level.width, level.height, max(1, int(_MOST_PX / ratio)))
    off = []
    for across, down in _PLACES:
        x, y = int((level.width - side) * across), int((level.height - side) * down)
        left, top, wide = round(x * ratio), round(y * ratio), max(1, round(side * ratio))
        wide, high = min(wide, levels[finer].width - left), min(wide, levels[finer].height - top)
        if wide < 1 or high < 1:
            continue
        expected = cv2.resize(read(finer, left, top, wide, high), (side, side), interpolation=cv2.INTER_AREA)
        seen = read(number, x, y, side, side)
        # Means over a quarter of the window: half a pixel more or less to a side does not matter then.
        pairs = [cv2.resize(one, (2, 2), interpolation=cv2.INTER_AREA) if side > 1 else one for one in (seen, expected)]
        off.append(float(np.abs(pairs[0].astype(np.float32) - pairs[1]).mean()))
    return bool(off) and float(np.median(off)) > _PLAINLY
