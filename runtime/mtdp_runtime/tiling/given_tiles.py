"""Tiles that the user gives: level-0 places in an order of their own, in place of a grid.

Each row stays where it is: none is left out, added or moved. A tile has the size that the model sees, `tile_px` pixels
at the scale of the run. What a file says of its own tiles (TRIDENT's and CLAM's attributes) must agree with that.

A tile may reach over the edge of the slide, where the background stands; one that lies wholly outside is another
slide's, and an error.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import UsageError
from mtdp_runtime.slide import SlideInfo
from mtdp_runtime.slide.source import whole_scale
from mtdp_runtime.tiling.grid import tile_scale

# TRIDENT rounds a slide's scale to a magnification: 0.2527 µm/px counts as 0.25, and its tiles are 1.1 % larger.
_SAME_SIDE: Final = 0.02


@dataclass(frozen=True, slots=True)
class Stated:
    """What a file says of its tiles, where it does."""

    side0: float | None = None  # level-0 pixels
    side_px: float | None = None  # pixels of `level`, which has `downsample` if that is said, too
    level: int | None = None
    downsample: float | None = None
    slide_px: tuple[int, int] | None = None  # width and height of level 0
    overlap_px: int = 0  # pixels of the target scale


@dataclass(frozen=True, slots=True, eq=False)
class GivenTiles:
    """Places of a file: int64[N, 2], level-0 x, y of each tile's top left."""

    path: Path
    places: NDArray[np.int64]
    stated: Stated = Stated()

    @property
    def digest(self) -> str:
        """Sha256 of the places in their order: the same list in another kind of file is the same."""
        return hashlib.sha256(self.places.astype("<i8").tobytes()).hexdigest()

    def aligned(self, scale: float, tile_px: int) -> bool:
        """Say whether all tiles lie on the pixels of a level that is coarser by just the scale."""
        return not (self.places % whole_scale(scale, tile_px)).any()


@dataclass(frozen=True, slots=True, eq=False)
class TileList:
    """Given tiles at the scale of a run: what a `Grid` is to those that are laid."""

    given: GivenTiles
    tile_px: int
    scale: float  # level-0 pixels an output pixel covers

    @property
    def tile0(self) -> float:
        """Side of a tile in level-0 pixels."""
        return self.tile_px * self.scale

    @property
    def aligned(self) -> bool:
        """Whether a coarser level of just this scale may be their source."""
        return self.given.aligned(self.scale, self.tile_px)

    def __len__(self) -> int:
        return len(self.given.places)

    def origins(self) -> NDArray[np.int64]:
        """Return int64[len(self), 2]: level-0 x, y of every tile."""
        return self.given.places

    def facts(self) -> dict[str, Any]:
        """Return what a feature file says of them; `step0` is a tile's side, since they have no common distance."""
        by = {"given_by": self.given.path.name, "digest": self.given.digest}
        return {"tile_px": self.tile_px, "scale": self.scale, "step0": self.tile0, "tiles": len(self)} | by


def list_tiles(given: GivenTiles, info: SlideInfo, tile_px: int, mpp: float) -> TileList:
    """Return the tiles of a list at a scale, after making sure that they can be this slide's and this model's.

    Raises:
        UsageError: the file speaks of another slide or of tiles of another size, or a tile lies outside the slide.
        SlideScaleUnknown, SlideTooCoarse, SlideTooLarge: as `tile_scale`.
    """
    tiles = TileList(given, tile_px, tile_scale(info, mpp))
    stated = given.stated
    if stated.slide_px is not None and stated.slide_px != (info.width, info.height):
        wide, high = stated.slide_px
        raise UsageError(
            f"{given.path}: made for a slide of {wide} x {high} px; {info.path} has {info.width} x {info.height} px",
            hint="Are these the tiles of another slide?",
        )
    side0 = _stated_side(given, info)
    if side0 is not None and abs(side0 / tiles.tile0 - 1) > _SAME_SIDE:
        raise UsageError(
            f"{given.path}: its tiles have {side0:.6g} level-0 px; the model's have {tiles.tile0:.6g} on {info.path} "
            f"({tile_px} px at {mpp:g} µm/px)",
            hint=f"To compute its tiles as they are: mtdp-extract --mpp {side0 / tile_px * (info.mpp or 0):.6g}. "
            "Else make the list anew for the model's tile.",
        )
    _inside(tiles, info)
    return tiles


def remarks(tiles: TileList, info: SlideInfo) -> str:
    """Say what should be looked at, though every tile is computed; empty where there is nothing."""
    first, last = tiles.origins(), tiles.origins() + tiles.tile0
    over = int(((first < 0) | (last > np.array([info.width, info.height]) + 1e-6)).any(axis=1).sum())
    again = len(tiles) - len(np.unique(tiles.origins(), axis=0))
    said = []
    if over:
        said.append(f"{over} of {len(tiles)} tiles reach over the slide's edge, where background stands")
    if again:
        said.append(f"{again} of {len(tiles)} tiles stand there already; they are computed again")
    return f"{tiles.given.path}: {'; '.join(said)}" if said else ""


def _stated_side(given: GivenTiles, info: SlideInfo) -> float | None:
    """Return the side of a tile in level-0 pixels, as the file has it."""
    stated = given.stated
    if stated.side0 is not None or stated.side_px is None or stated.level is None:
        return stated.side0
    if stated.downsample is not None:
        return stated.side_px * stated.downsample
    if not 0 <= stated.level < len(info.levels):
        raise UsageError(
            f"{given.path}: its tiles are of level {stated.level}; {info.path} has {len(info.levels)} levels",
            hint="Are these the tiles of another slide?",
        )
    return stated.side_px * info.levels[stated.level].downsample


def _inside(tiles: TileList, info: SlideInfo) -> None:
    first, last = tiles.origins(), tiles.origins() + tiles.tile0
    outside = ((first >= np.array([info.width, info.height])) | (last <= 0)).any(axis=1)
    if not outside.any():
        return
    row = int(np.flatnonzero(outside)[0])
    x, y = first[row].tolist()
    raise UsageError(
        f"{tiles.given.path}: {int(outside.sum())} of {len(tiles)} tiles lie outside of {info.path} "
        f"({info.width} x {info.height} px): tile {row + 1} at ({x}, {y}), of {tiles.tile0:.0f} px",
        hint="Are these the tiles of another slide, or places in pixels of another level? They must be level-0 pixels.",
    )
