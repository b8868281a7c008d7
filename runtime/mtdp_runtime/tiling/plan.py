"""What will be computed for a slide, and by which rule: known before any inference."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.settings import ExtractSettings
from mtdp_runtime.slide import Slide, SlideInfo, Source
from mtdp_runtime.slide.source import tiles_source
from mtdp_runtime.tiling.given import NOTHING, Given
from mtdp_runtime.tiling.given_classes import classes_of
from mtdp_runtime.tiling.given_tiles import TileList, list_tiles, remarks
from mtdp_runtime.tiling.grid import Grid, make_grid
from mtdp_runtime.tiling.tissue import TissueMask, find_tissue, tissue_fractions, tissue_fractions_at


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be computed for a slide: known before any inference."""

    info: SlideInfo
    grid: Grid | TileList
    tissue: TissueMask
    kept: NDArray[np.int64]  # indices into the grid
    fractions: NDArray[np.float32]  # of the kept tiles
    seconds: float  # what the planning took
    classes: NDArray[np.int16] | None = None  # of the kept tiles, numbers of `class_names`: `classes_of`
    class_names: tuple[str, ...] = ()

    @property
    def coords(self) -> NDArray[np.int64]:
        """int64[N, 2]: level-0 x, y of the kept tiles."""
        return self.grid.origins()[self.kept]

    @property
    def source(self) -> Source:
        """What every tile is resampled from."""
        return tiles_source(self.info, self.grid.scale, self.grid.tile_px, self.grid.aligned)

    @property
    def level(self) -> int:
        return self.source.level

    @property
    def remarks(self) -> str:
        """What the user should look at, of the tiles that he gave."""
        return remarks(self.grid, self.info) if isinstance(self.grid, TileList) else ""


def make_plan(
    slide: Slide,
    tile_px: int,
    settings: ExtractSettings,
    given: Given = NOTHING,
    tissue: TissueMask | None = None,
) -> Plan:
    """Find the tissue of a slide and the tiles to compute: all that are given, or those of a grid that are tissue.

    `tissue` is that of the slide where it was found already, by the same settings.

    Raises:
        UsageError: the tiles that are given cannot be this slide's.
        SlideError: the slide has no usable scale, or cannot be decoded.
    """
    start = time.perf_counter()
    grid = (
        make_grid(slide.info, tile_px, settings.mpp, settings.stride_px)
        if given.tiles is None
        else list_tiles(given.tiles, slide.info, tile_px, settings.mpp)
    )
    tissue = tissue or find_tissue(slide, settings.tissue, given.mask)
    if isinstance(grid, TileList):
        fractions, kept = tissue_fractions_at(tissue, grid.origins(), grid.tile0), np.arange(len(grid))
    else:
        fractions = tissue_fractions(tissue, grid)
        kept = np.flatnonzero(fractions >= settings.min_tissue)
    classes: NDArray[np.int16] | None = None
    names: tuple[str, ...] = ()
    if given.classes is not None:
        classes, names = classes_of(given.classes, slide.info, grid.origins()[kept], grid.tile0), given.classes.names
    return Plan(slide.info, grid, tissue, kept, fractions[kept], time.perf_counter() - start, classes, names)


def why_empty(plan: Plan) -> str:
    """Say why a slide has no tile to compute."""
    if isinstance(plan.grid, TileList):
        return f"{plan.grid.given.path} lists no tile"
    if not len(plan.grid):
        info = plan.info
        return f"the slide ({info.width} x {info.height} px) is smaller than one tile ({plan.grid.tile0:.0f} px)"
    tissue = plan.tissue
    if tissue.areas is not None:
        marks = "marks nothing" if not tissue.areas.any() else f"marks {tissue.area_mm2:.3g} mm² in all"
        return f"no tile has enough of what the mask marks: it was {tissue.source}, which {marks}"
    return f"no tile has enough tissue ({plan.tissue.area_mm2:.3g} mm² found in the whole slide)"
