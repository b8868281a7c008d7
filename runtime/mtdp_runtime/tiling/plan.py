"""What will be computed for a slide, and by which rule: known before any inference."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.settings import ExtractSettings
from mtdp_runtime.slide import Slide, SlideInfo, level_for
from mtdp_runtime.tiling.given_mask import GivenMask
from mtdp_runtime.tiling.grid import Grid, make_grid
from mtdp_runtime.tiling.tissue import TissueMask, find_tissue, tissue_fractions


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be computed for a slide: known before any inference."""

    info: SlideInfo
    grid: Grid
    tissue: TissueMask
    kept: NDArray[np.int64]  # indices into the grid
    fractions: NDArray[np.float32]  # of the kept tiles
    seconds: float  # what the planning took

    @property
    def coords(self) -> NDArray[np.int64]:
        """int64[N, 2]: level-0 x, y of the kept tiles."""
        return self.grid.origins()[self.kept]

    @property
    def level(self) -> int:
        return level_for(self.info.levels, self.grid.scale)


def make_plan(slide: Slide, tile_px: int, settings: ExtractSettings, mask: GivenMask | None = None) -> Plan:
    """Find the tissue of a slide and the tiles to compute.

    Raises:
        SlideError: the slide has no usable scale, or cannot be decoded.
    """
    start = time.perf_counter()
    grid = make_grid(slide.info, tile_px, settings.mpp, settings.stride_px)
    tissue = find_tissue(slide, settings.tissue, mask)
    fractions = tissue_fractions(tissue, grid)
    kept = np.flatnonzero(fractions >= settings.min_tissue)
    return Plan(slide.info, grid, tissue, kept, fractions[kept], time.perf_counter() - start)


def why_empty(plan: Plan) -> str:
    if not len(plan.grid):
        info = plan.info
        return f"the slide ({info.width} x {info.height} px) is smaller than one tile ({plan.grid.tile0:.0f} px)"
    return f"no tile has enough tissue ({plan.tissue.area_mm2:.3g} mm² found in the whole slide)"
