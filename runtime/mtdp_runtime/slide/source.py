"""The law of resampling: which pixels of a slide a tile is averaged from, the same for every reader.

A tile is the exact area average of whole pixels of one source. Level 0 always may be one. A coarser level of the
pyramid has been averaged once already, over cells that are not the tile's. To average it a second time blurs. So a
coarser level is one only where

- nothing is left to resample: the scale is its factor, and every tile lies on its pixels; or
- a factor of at least `LEAST_LEFT` is left.

Measured on stained tissue of two scanners (packaged model and ViT-S/14, drawn places, a level that is an exact half):
what is left, the smallest and the mean cosine to the features of the exact tiles, the smallest part of their sharpness
(variance of the Laplacian) that is kept.

====  =========  =======  =========
left  smallest   mean     sharpness
====  =========  =======  =========
2     0.9940     0.9983   0.62
3     0.9979     0.9993   0.79
4     0.9990     0.99964  0.86
5     0.9995     0.99982  0.91
6     0.9998     0.99989  0.93
8     0.9998     0.99994  0.96
====  =========  =======  =========

At least 0.999, 0.9999 and 0.93 are asked for. What the JPEG decoder reduces by itself is no source of a tile: a cosine
transform cut short is not quite an average (cosines down to 0.9993 with colours at full size, to 0.982 without), and no
other reader has it. The choice depends on the slide, the scale and the alignment of the grid
alone: no tile of a grid is read otherwise than its neighbours, and no reader otherwise than another. An overview, in
which nobody looks at single pixels, may come from any level and any reduction.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from mtdp_runtime.slide import Level, SlideInfo, Source
from mtdp_runtime.slide.cells import LAW
from mtdp_runtime.slide.resample import is_still

LEAST_LEFT: Final = 8.0
# A level counts as fine enough for an overview when it is coarser than that by less than this: a pyramid of 2220 pixels
# halved has a downsample of 2.0009, and nobody wants level 0 decoded for that.
LEVEL_TOLERANCE: Final = 0.01
_SAME: Final = 1e-6  # factors this close, relatively, are one: the rounding of floats


def tiles_source(info: SlideInfo, scale: float, tile_px: int, aligned: bool) -> Source:
    """Return the source of all tiles of a slide; `aligned` where each origin is a multiple of a whole scale.

    A grid is laid so; of a list of tiles that a user gives all must be, or none is read from such a level.
    """
    return _source(info, scale, tile_px, aligned)


def grid_source(info: SlideInfo, scale: float, tile_px: int) -> Source:
    """Return the source of all tiles of a grid as `make_grid` lays it: its origins are multiples of a whole scale."""
    return tiles_source(info, scale, tile_px, aligned=True)


def source_at(info: SlideInfo, x0: int, y0: int, scale: float, out_px: int) -> Source:
    """Return the source of a single rectangle, which lies anywhere."""
    multiple = whole_scale(scale, out_px)
    return _source(info, scale, out_px, aligned=x0 % multiple == 0 == y0 % multiple)


def overview_source(info: SlideInfo, scale: float) -> Source:
    """Return the coarsest source that is at least as fine as `scale`: for masks and thumbnails."""
    level = level_for(info.levels, scale)
    left = scale / info.levels[level].downsample
    reduction = max((factor for factor in info.reductions if factor <= left * (1 + _SAME)), default=1)
    return Source(level, reduction, rough=True)


def level_for(levels: tuple[Level, ...], scale: float) -> int:
    """Return the coarsest level that is at least as fine as `scale` (level-0 pixels per output pixel).

    >>> level_for((Level(4000, 4000, 1.0), Level(2000, 2000, 2.0), Level(500, 500, 8.0)), 4.0)
    1
    """
    fine = [i for i, level in enumerate(levels) if level.downsample <= scale * (1 + LEVEL_TOLERANCE)]
    return max(fine, key=lambda i: levels[i].downsample, default=0)


def whole_scale(scale: float, out_px: int) -> int:
    """Return the whole number that a scale is, if it moves no pixel of a tile from there; 1 where there is none.

    >>> whole_scale(2.0, 224), whole_scale(2.00001, 224), whole_scale(2.0005, 224), whole_scale(0.9, 224)
    (2, 2, 1, 1)
    """
    whole = max(1, round(scale))
    return whole if is_still(scale / whole, out_px) else 1


def factor_of(info: SlideInfo, source: Source) -> float:
    """Return the level-0 pixels that a pixel of the source covers."""
    return info.levels[source.level].downsample * source.reduction


def resampling_of(info: SlideInfo, scale: float, tile_px: int, aligned: bool = True) -> str:
    """Name the source of a slide's tiles, and what is done to it: a part of what makes the features."""
    source = tiles_source(info, scale, tile_px, aligned)
    left = scale / factor_of(info, source)
    if is_still(left, tile_px):
        return f"level {source.level}, as it is"
    return f"level {source.level}, {'exact area average' if left > 1 else 'linear'}, {LAW}"


def _source(info: SlideInfo, scale: float, tile_px: int, aligned: bool) -> Source:
    whole = whole_scale(scale, tile_px)
    best = Source(0)
    for source in _coarser(info):
        factor = factor_of(info, source)
        nothing_left = aligned and whole > 1 and abs(factor - whole) <= _SAME * whole
        enough_left = scale / factor >= LEAST_LEFT * (1 - _SAME)
        if (nothing_left or enough_left) and factor > factor_of(info, best) * (1 + _SAME):
            best = source
    return best


def _coarser(info: SlideInfo) -> Iterator[Source]:
    """Yield all sources but level 0, the coarsest first."""
    for index in reversed(range(len(info.levels))):
        if info.levels[index].whole and info.levels[index].downsample > 1:
            yield Source(index)
