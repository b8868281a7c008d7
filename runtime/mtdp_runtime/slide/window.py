"""Which pixels of which level a rectangle needs: the same for every reader."""

from __future__ import annotations

from dataclasses import dataclass

from mtdp_runtime.slide import Level, level_for
from mtdp_runtime.slide.resample import source_px


@dataclass(frozen=True, slots=True)
class Window:
    """Pixels of a level, and the scale at which they are averaged."""

    level: int
    lx: int  # top left, in pixels of the level
    ly: int
    width: int  # pixels of the level to read
    height: int
    repeat_x: int  # 1 where the last column stands in for one beyond the level
    repeat_y: int
    scale: float  # level pixels an output pixel


def window_of(levels: tuple[Level, ...], x0: int, y0: int, width: int, height: int, scale: float) -> Window:
    """Return the window for width x height output pixels from the level-0 point (x0, y0).

    It starts at a whole pixel of its level, so that nothing is interpolated before the averaging: at most half a pixel
    of that level from the exact place.

    >>> window_of((Level(4000, 4000, 1.0), Level(1000, 1000, 4.0)), 400, 800, 224, 224, 4.0)
    Window(level=1, lx=100, ly=200, width=224, height=224, repeat_x=0, repeat_y=0, scale=1.0)
    """
    index = level_for(levels, scale)
    level = levels[index]
    level_scale = scale / level.downsample
    lx, ly = round(x0 / level.downsample), round(y0 / level.downsample)
    wanted_x, wanted_y = source_px(width, level_scale), source_px(height, level_scale)
    # A coarser level's size is rounded: what lies inside level 0 may end a pixel beyond it.
    repeat_x = int(index > 0 and wanted_x > 1 and lx + wanted_x == level.width + 1)
    repeat_y = int(index > 0 and wanted_y > 1 and ly + wanted_y == level.height + 1)
    return Window(index, lx, ly, wanted_x - repeat_x, wanted_y - repeat_y, repeat_x, repeat_y, level_scale)


def reduced(window: Window, level: Level, factor: int, width: int, height: int) -> Window | None:
    """Return the window for width x height output pixels in a level that the decoder reduces by a factor.

    None where that is another place: it begins between the reduced pixels, or ends beyond the last whole one.

    >>> reduced(Window(0, 448, 896, 448, 448, 0, 0, 2.0), Level(4000, 4000, 1.0), 2, 224, 224)
    Window(level=0, lx=224, ly=448, width=224, height=224, repeat_x=0, repeat_y=0, scale=1.0)
    """
    lx, ly, scale = window.lx // factor, window.ly // factor, window.scale / factor
    wanted_x, wanted_y = source_px(width, scale), source_px(height, scale)
    inside = lx >= 0 and ly >= 0 and lx + wanted_x <= level.width // factor and ly + wanted_y <= level.height // factor
    if not inside or window.lx % factor or window.ly % factor or window.repeat_x or window.repeat_y:
        return None
    return Window(window.level, lx, ly, wanted_x, wanted_y, 0, 0, scale)
