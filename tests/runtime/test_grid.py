"""The grid: every tile inside what was scanned, none twice, always in the same order."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mtdp_runtime.slide
import mtdp_runtime.tiling.grid
from mtdp_runtime.errors import SlideScaleUnknown, SlideTooCoarse, SlideTooLarge, UsageError
from mtdp_runtime.slide import Level, level_for
from mtdp_runtime.tiling.grid import make_grid
from support import info_of

sizes = st.integers(1, 5000)
scales = st.floats(0.1, 2.0)


@given(width=sizes, height=sizes, mpp=scales, target=scales, tile_px=st.integers(1, 300), stride_px=st.integers(1, 400))
def test_every_tile_lies_inside_and_none_comes_twice(
    width: int, height: int, mpp: float, target: float, tile_px: int, stride_px: int
) -> None:
    if target / mpp * mtdp_runtime.tiling.grid.MAX_UPSAMPLING < 1:
        return
    if width * height / (stride_px * target / mpp) ** 2 > 0.9 * mtdp_runtime.tiling.grid.MOST_TILES:
        return
    grid = make_grid(info_of(width, height, mpp), tile_px, target, stride_px)
    origins = grid.origins()
    assert origins.shape == (len(grid), 2)
    if not len(grid):
        assert grid.tile0 > min(width, height) - 1
        return
    assert origins.min() >= 0
    assert (origins + grid.tile0 <= np.array([width, height]) + 1e-6).all()
    # row-major: y never falls, and x rises within a row
    keys = origins[:, 1] * (width + 1) + origins[:, 0]
    assert (np.diff(keys) > 0).all() or grid.step0 < 1
    assert [grid.origin(i) for i in (0, len(grid) - 1)] == [tuple(origins[0]), tuple(origins[-1])]


@given(extent=st.integers(100, 5000), mpp=st.floats(0.2, 1.0))
def test_no_further_tile_would_fit(extent: int, mpp: float) -> None:
    grid = make_grid(info_of(extent, extent, mpp), 50, 1.0)
    assert grid.columns * grid.step0 + grid.tile0 > extent - 1


def test_tiles_stay_within_the_bounds_that_were_scanned() -> None:
    grid = make_grid(info_of(10_000, 10_000, 0.5, bounds=(1000, 2000, 500, 300)), 100, 0.5)
    assert grid.origin(0) == (1000, 2000)
    assert (grid.columns, grid.rows) == (5, 3)


def test_the_scale_is_never_rounded() -> None:
    grid = make_grid(info_of(10_000, 10_000, 0.2527), 224, 0.5)
    assert grid.scale == 0.5 / 0.2527
    assert grid.step0 == 224 * 0.5 / 0.2527


def test_origins_do_not_drift() -> None:
    grid = make_grid(info_of(100_000, 300, 0.2527), 224, 0.25)
    last = grid.columns - 1
    assert abs(grid.origin(last)[0] - last * 224 * 0.25 / 0.2527) <= 0.5


def test_a_slide_without_mpp_is_refused_with_the_way_out() -> None:
    with pytest.raises(SlideScaleUnknown, match="no micrometres per pixel") as caught:
        make_grid(info_of(1000, 1000, None), 224, 0.5)
    assert "--slide-mpp" in caught.value.hint


def test_a_slide_that_is_too_coarse_is_refused() -> None:
    with pytest.raises(SlideTooCoarse, match=r"level 0 has 1 µm/px .*coarser than the 0\.5"):
        make_grid(info_of(1000, 1000, 1.0), 224, 0.5)


def test_a_grid_of_absurd_size_is_refused_before_it_is_laid() -> None:
    with pytest.raises(SlideTooLarge, match=r"slide\.tiff: 8388658 x 50 px .*: 4\.2 m, more than a slide can have"):
        make_grid(info_of(8388658, 50, 0.5), 224, 0.5)
    with pytest.raises(SlideTooLarge, match=r"20000 x 20000 px .*: more than 20,000,000 tiles") as refused:
        make_grid(info_of(20_000, 20_000, 0.5), 224, 0.5, stride_px=1)
    assert "--stride-px" in refused.value.hint
    assert len(make_grid(info_of(400_000, 400_000, 0.25), 224, 0.25)) == 1785**2


@pytest.mark.parametrize(("mpp", "stride"), [(0.0, 1), (-1.0, 1), (float("nan"), 1), (0.5, 0)])
def test_impossible_arguments_are_refused(mpp: float, stride: int) -> None:
    with pytest.raises(UsageError):
        make_grid(info_of(1000, 1000, 0.5), 224, mpp, stride)


@pytest.mark.parametrize(("scale", "level"), [(1.0, 0), (1.99, 1), (2.0, 1), (3.9, 1), (4.0, 2), (100.0, 2), (0.9, 0)])
def test_the_coarsest_level_that_is_fine_enough(scale: float, level: int) -> None:
    levels = (Level(4000, 4000, 1.0), Level(2000, 2000, 2.0), Level(1000, 1000, 4.016))
    assert level_for(levels, scale) == level


def test_doctests() -> None:
    for module in (mtdp_runtime.tiling.grid, mtdp_runtime.slide):
        assert doctest.testmod(module).failed == 0
