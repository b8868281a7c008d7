"""From a rectangle of level 0 to whole pixels of a source and back: the same for every reader, in bounded memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import TileUnreadable
from mtdp_runtime.slide import SlideInfo, Source
from mtdp_runtime.slide.resample import is_still, resample_into, span_of
from mtdp_runtime.slide.source import factor_of

# A rectangle is read in pieces whose source has no more pixels on a side, where its scale allows it. OpenSlide reads
# the same 4096 px in one go and rounds where it begins the next; half of that leaves room for where it has to begin.
PIECE_PX: Final = 2048
_MOST_OUT_PX: Final = 1024  # on a side of a piece: what a thread keeps for its sums stays below 100 MB
_MOST_PX: Final = 1 << 25  # of a source at once, where one output pixel alone covers more than a piece: 100 MB
_MOST_REPEATED: Final = 2

_own = threading.local()


@dataclass(frozen=True, slots=True)
class Window:
    """Whole pixels of a source, and how they are averaged."""

    source: Source
    lx: int  # top left, in pixels of the source; may lie outside it
    ly: int
    width: int  # pixels of the source
    height: int
    phase_x: float  # where in them the first output pixel begins
    phase_y: float
    scale: float  # source pixels per output pixel


Fill = Callable[[NDArray[np.uint8], Window], None]  # fills uint8[height, width, 3]; the background lies outside


def window_of(info: SlideInfo, source: Source, x0: float, y0: float, width: int, height: int, scale: float) -> Window:
    """Return the window for width x height output pixels from the level-0 point (x0, y0), which is never rounded.

    Where pixels are interpolated (scale below 1), the neighbours of the outermost are part of it if the slide has them.
    """
    factor = factor_of(info, source)
    left = scale / factor
    across, down = (span_of(start / factor, size, left) for start, size in ((x0, width), (y0, height)))
    if left < 1:
        across = _inside(across, x0 / factor, width * left, info.width / factor)
        down = _inside(down, y0 / factor, height * left, info.height / factor)
    return Window(source, across[0], down[0], across[1] - across[0], down[1] - down[0], across[2], down[2], left)


def _inside(span: tuple[int, int, float], start: float, wanted: float, side: float) -> tuple[int, int, float]:
    """Cut off the neighbours that interpolation would like, where the slide ends before them."""
    first, end, phase = span
    if first < 0 <= start:
        first, phase = 0, phase + first
    if end > side >= start + wanted - 1e-6:
        end = math.ceil(side - 1e-6)
    return first, max(end, first + 1), phase


def read_averaged(
    out: NDArray[np.uint8], info: SlideInfo, source: Source, x0: int, y0: int, scale: float, fill: Fill
) -> None:
    """Fill out, uint8[H, W, 3], from the level-0 point (x0, y0): whole source pixels are read, and resampled once.

    Raises:
        TileUnreadable: a single output pixel covers more pixels of the source than are held at once; what fill raises.
    """
    left = scale / factor_of(info, source)
    for top, bottom in _parts(out.shape[0], left):
        for start, end in _parts(out.shape[1], left):
            x, y = x0 + start * scale, y0 + top * scale
            window = window_of(info, source, x, y, end - start, bottom - top, scale)
            if window.width * window.height > _MOST_PX:
                raise TileUnreadable(
                    f"{info.path}: {window.width} x {window.height} px of level {source.level} at once: too many",
                    hint="The slide has no coarser level for this scale, or states a wrong size: check the file.",
                )
            _read_piece(out[top:bottom, start:end], info, window, fill)


def _parts(out_px: int, scale: float) -> Iterator[tuple[int, int]]:
    """Yield the first and last output of each piece: as few pieces as may be, and all of about one size."""
    at_once = min(_MOST_OUT_PX, max(1, int((PIECE_PX - 2) / scale)))
    count = -(-out_px // at_once)
    edges = [round(part * out_px / count) for part in range(count + 1)]
    yield from pairwise(edges)


def _read_piece(out: NDArray[np.uint8], info: SlideInfo, window: Window, fill: Fill) -> None:
    beyond_x, beyond_y = _beyond(info, window)
    still = is_still(window.scale, max(out.shape[:2])) and not window.phase_x and not window.phase_y
    pixels = out if still else _scratch(window.height, window.width)
    fill(pixels, window)
    if beyond_x is not None:
        pixels[:, beyond_x[0] : beyond_x[1]] = pixels[:, beyond_x[0] - 1 : beyond_x[0]]
    if beyond_y is not None:
        pixels[beyond_y[0] : beyond_y[1]] = pixels[beyond_y[0] - 1 : beyond_y[0]]
    if not still:
        resample_into(out, pixels, window.scale, window.phase_x, window.phase_y)


def _beyond(info: SlideInfo, window: Window) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Return the window's columns and rows that lie inside level 0 and beyond the source's last whole pixel, if any.

    A coarser level's size is rounded, and the decoder reduces what stands beyond the level with its last pixels: the
    last whole pixel stands for what is missing then.
    """
    level, reduction = info.levels[window.source.level], window.source.reduction
    factor = factor_of(info, window.source)

    def part(first: int, size: int, level_px: int, side0: int) -> tuple[int, int] | None:
        whole = level_px // reduction
        covered = min(math.ceil(side0 / factor - 1e-6), whole + _MOST_REPEATED)
        start, end = whole - first, min(covered - first, size)
        return (start, end) if 1 <= start < end else None

    return (
        part(window.lx, window.width, level.width, info.width),
        part(window.ly, window.height, level.height, info.height),
    )


def _scratch(height: int, width: int) -> NDArray[np.uint8]:
    """Return uint8[height, width, 3], this thread's own until its next call."""
    needed = height * width * 3
    memory: NDArray[np.uint8] | None = getattr(_own, "memory", None)
    if memory is None or memory.size < needed:
        memory = _own.memory = np.empty(needed, np.uint8)
    return memory[:needed].reshape(height, width, 3)
