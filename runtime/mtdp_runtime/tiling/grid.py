"""The tile grid: numbers only, so that it can be hashed into the fingerprint of the output."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import SlideScaleUnknown, SlideTooCoarse, SlideTooLarge, UsageError
from mtdp_runtime.slide import SlideInfo
from mtdp_runtime.slide.scale import is_scale
from mtdp_runtime.slide.source import whole_scale

# Slides sold as "20x" scan at 0.46 to 0.55 µm per pixel. Inventing this much detail at most is what a lab expects when
# it asks for 0.5; more must be asked for by naming a coarser --mpp.
MAX_UPSAMPLING = 1.15
# Planning holds about 60 bytes per tile. A slide of 200,000 x 200,000 px has 0.8 million tiles of 224 px side by side.
MOST_TILES = 20_000_000
# The largest glass slides have 0.2 m.
MOST_M = 1.0


@dataclass(frozen=True, slots=True)
class Grid:
    """A regular grid of square tiles at a physical scale, in row-major order.

    >>> Grid(tile_px=224, scale=2.0, step0=448.0, columns=3, rows=2).origin(4)
    (448, 448)
    """

    tile_px: int  # side of a tile as the model sees it
    scale: float  # level-0 pixels an output pixel covers, exact
    step0: float  # level-0 pixels between neighbouring tiles, exact
    columns: int
    rows: int
    x0: int = 0  # level-0 pixel at which the first tile begins
    y0: int = 0
    multiple: int = 1  # the origins are multiples of it: the scale where that is a whole number

    def __post_init__(self) -> None:
        assert self.tile_px > 0, self.tile_px
        assert self.scale > 0, self.scale
        assert self.step0 > 0, self.step0
        assert self.columns >= 0, self.columns
        assert self.rows >= 0, self.rows
        assert self.x0 % self.multiple == 0 == self.y0 % self.multiple, (self.x0, self.y0, self.multiple)

    @property
    def tile0(self) -> float:
        """Side of a tile in level-0 pixels."""
        return self.tile_px * self.scale

    @property
    def aligned(self) -> bool:
        """Whether a coarser level of just this scale may be its source: so it was laid."""
        return True

    def facts(self) -> dict[str, Any]:
        """Return what a feature file says of it."""
        return asdict(self)

    def __len__(self) -> int:
        return self.columns * self.rows

    def origin(self, index: int) -> tuple[int, int]:
        """Return the level-0 x, y of a tile's top left pixel."""
        row, column = divmod(index, self.columns)
        return self.x0 + _offset(column, self.step0, self.multiple), self.y0 + _offset(row, self.step0, self.multiple)

    def origins(self) -> NDArray[np.int64]:
        """Return int64[len(self), 2]: `origin` of every tile."""
        xs, ys = (
            first + np.rint(np.arange(count) * (self.step0 / self.multiple)).astype(np.int64) * self.multiple
            for first, count in ((self.x0, self.columns), (self.y0, self.rows))
        )
        return np.stack([np.tile(xs, self.rows), np.repeat(ys, self.columns)], axis=1)


def known_mpp(info: SlideInfo) -> float:
    """Return the micrometres that a level-0 pixel covers.

    Raises:
        SlideScaleUnknown: the slide has no mpp; it is never guessed.
    """
    if info.mpp is None:
        raise SlideScaleUnknown(
            f"{info.path}: no micrometres per pixel: {info.mpp_source}",
            hint="Give the scale of level 0: --slide-mpp 0.25 (a 40x scan is often 0.25, a 20x scan 0.5: "
            "ask the scanner), or a CSV manifest with the columns slide,mpp.",
        )
    return info.mpp


def tile_scale(info: SlideInfo, mpp: float) -> float:
    """Return the level-0 pixels that a pixel of a tile covers at a scale.

    Raises:
        SlideScaleUnknown: the slide has no mpp; it is never guessed.
        SlideTooCoarse: more than MAX_UPSAMPLING would have to be invented.
        SlideTooLarge: more than MOST_M metres.
    """
    mpp0 = known_mpp(info)
    if not is_scale(mpp):
        raise UsageError(f"--mpp {mpp}: not a scale", hint="Micrometres per pixel, for example --mpp 0.5.")
    if mpp / mpp0 * MAX_UPSAMPLING < 1:
        raise SlideTooCoarse(
            f"{info.path}: level 0 has {mpp0:.6g} µm/px ({info.mpp_source}), coarser than the {mpp:g} µm/px asked for",
            hint="Correct the slide's own scale with --slide-mpp, or ask for one that it has: mtdp-extract --mpp.",
        )
    if max(info.width, info.height) * mpp0 / 1e6 > MOST_M:
        raise SlideTooLarge(
            f"{info.path}: {info.width} x {info.height} px at {mpp0:.6g} µm/px ({info.mpp_source}): "
            f"{max(info.width, info.height) * mpp0 / 1e6:.1f} m, more than a slide can have",
            hint="The file states a wrong size or scale: give the true scale with --slide-mpp, or copy the file again.",
        )
    return mpp / mpp0


def make_grid(info: SlideInfo, tile_px: int, mpp: float, stride_px: int | None = None) -> Grid:
    """Lay a grid over what was scanned; only tiles that lie wholly inside it are part of it.

    Where the scale is a whole number, all origins are multiples of it: so a tile lies on the pixels of a level that is
    coarser by that number, which need not be resampled then.

    Args:
        info: the slide.
        tile_px: side of a tile in pixels of the target scale.
        mpp: target scale, micrometres per pixel.
        stride_px: distance between tiles in pixels of the target scale; tile_px where None.

    Raises:
        SlideScaleUnknown: the slide has no mpp; it is never guessed.
        SlideTooCoarse: more than MAX_UPSAMPLING would have to be invented.
        SlideTooLarge: more than MOST_M metres, or MOST_TILES tiles.
    """
    stride = tile_px if stride_px is None else stride_px
    if stride < 1:
        raise UsageError(f"--stride-px {stride}: must be at least 1", hint=f"{tile_px} lays tiles side by side.")
    scale = tile_scale(info, mpp)
    x0, y0, width, height = info.bounds
    step0 = stride * scale
    if width / step0 * (height / step0) > MOST_TILES:  # before they are counted, which takes as long as they are many
        raise SlideTooLarge(
            f"{info.path}: {width} x {height} px at {info.mpp:.6g} µm/px with a tile each {step0:.6g} px: "
            f"more than {MOST_TILES:,} tiles",
            hint="Ask for fewer: mtdp-extract --stride-px or --mpp. If it cannot be that large, its file is damaged.",
        )
    multiple = whole_scale(scale, tile_px)
    left, top = -(-x0 // multiple) * multiple, -(-y0 // multiple) * multiple
    return Grid(
        tile_px=tile_px,
        scale=scale,
        step0=step0,
        columns=_count(x0 + width - left, tile_px * scale, step0, multiple),
        rows=_count(y0 + height - top, tile_px * scale, step0, multiple),
        x0=left,
        y0=top,
        multiple=multiple,
    )


def _offset(number: int, step0: float, multiple: int) -> int:
    """Return the level-0 pixels from the first tile to another in its row or column."""
    return round(number * (step0 / multiple)) * multiple


def _count(extent0: int, tile0: float, step0: float, multiple: int) -> int:
    """Return how many tiles fit, the rounding of their origins included."""
    count = max(0, math.floor((extent0 - tile0) / step0 + 1e-9) + 1) if tile0 <= extent0 + 1e-6 else 0
    while count and _offset(count - 1, step0, multiple) + tile0 > extent0 + 1e-6:
        count -= 1
    return count
