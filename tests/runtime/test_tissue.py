"""The tissue mask, and how much of a tile it covers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mtdp_runtime.errors import TileUnreadable
from mtdp_runtime.grid import Grid
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.tissue import TissueMask, TissueSettings, find_tissue, tissue_fractions, tissue_of

GLASS, PINK, FAINT, BLACK = (243, 241, 243), (215, 130, 175), (236, 222, 230), (4, 2, 6)
SETTINGS = TissueSettings()


def canvas(side: int = 200, seed: int = 0) -> NDArray[np.uint8]:
    noise = np.random.default_rng(seed).integers(-3, 4, (side, side, 3))
    return np.clip(np.array(GLASS) + noise, 0, 255).astype(np.uint8)


def test_a_stained_piece_is_found_to_within_a_pixel_or_two() -> None:
    image = canvas()
    image[60:140, 50:150] = PINK
    mask, _ = tissue_of(image, 8.0, SETTINGS)
    assert mask[64:136, 54:146].all()
    assert not mask[:52].any()
    assert not mask[:, :42].any()


def test_a_blank_slide_has_no_tissue() -> None:
    mask, threshold = tissue_of(canvas(), 8.0, SETTINGS)
    assert not mask.any()
    assert threshold == SETTINGS.saturation_floor


def test_a_slide_full_of_tissue_is_not_split_in_two() -> None:
    image = canvas()
    image[:, :100], image[:, 100:] = PINK, (150, 60, 140)
    mask, _ = tissue_of(image, 8.0, SETTINGS)
    assert mask.all()


def test_faint_tissue_on_clean_glass_is_found() -> None:
    image = canvas()
    image[60:140, 50:150] = FAINT
    mask, _ = tissue_of(image, 8.0, SETTINGS)
    assert mask[70:130, 60:140].all()


def test_black_borders_are_no_tissue() -> None:
    image = canvas()
    image[:30] = BLACK
    image[60:140, 50:150] = PINK
    mask, _ = tissue_of(image, 8.0, SETTINGS)
    assert not mask[:30].any()
    assert mask[64:136, 54:146].all()


@pytest.mark.parametrize("mpp", [4.0, 8.0, 16.0])
def test_small_pieces_and_holes_go_by_their_area_and_not_by_their_pixels(mpp: float) -> None:
    def side(um: float) -> int:
        return round(um / mpp)

    image = canvas(side(3200))
    image[side(800) : side(2400), side(800) : side(2400)] = PINK
    image[side(1500) : side(1560), side(1500) : side(1560)] = GLASS  # 60 µm: closed
    image[side(1800) : side(2200), side(1800) : side(2200)] = GLASS  # 400 µm: a hole
    image[side(200) : side(280), side(200) : side(280)] = PINK  # 80 µm: dust
    mask, _ = tissue_of(image, mpp, SETTINGS)
    assert not mask[: side(600)].any()
    assert mask[side(1530), side(1530)]
    assert not mask[side(2000), side(2000)]


def brute_force(mask: NDArray[np.bool_], scale: float, x0: int, y0: int, tile0: float) -> float:
    """The covered area by counting a fine raster of points."""
    points = (np.arange(400) + 0.5) / 400 * tile0
    ys = ((y0 + points) / scale).astype(int)
    xs = ((x0 + points) / scale).astype(int)
    inside = np.zeros((400, 400), bool)
    rows, columns = ys < mask.shape[0], xs < mask.shape[1]
    inside[np.ix_(rows, columns)] = mask[np.ix_(ys[rows], xs[columns])]
    return float(inside.mean())


@given(scale=st.floats(3, 40), tile0=st.floats(20, 300), step0=st.floats(10, 400), seed=st.integers(0, 99))
def test_fractions_are_areas(scale: float, tile0: float, step0: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random((40, 50)) < 0.5
    columns = max(1, int((50 * scale - tile0) / step0))
    rows = max(1, int((40 * scale - tile0) / step0))
    if tile0 > 40 * scale:
        return
    grid = Grid(tile_px=100, scale=tile0 / 100, step0=step0, columns=min(columns, 3), rows=min(rows, 3))
    tissue = TissueMask(mask, np.zeros((40, 50, 3), np.uint8), scale, 0, 0, 8.0, 0.0, 0)
    fractions = tissue_fractions(tissue, grid)
    assert fractions.shape == (len(grid),)
    for index in range(len(grid)):
        assert fractions[index] == pytest.approx(brute_force(mask, scale, *grid.origin(index), grid.tile0), abs=0.02)


def test_a_real_slide(slides_dir: Path) -> None:
    with open_slide(slides_dir / "CMU-1-Small-Region.svs") as slide:
        tissue = find_tissue(slide, SETTINGS)
    assert tissue.mask.shape == (186, 139)
    assert 0.3 < tissue.mask.mean() < 0.5
    assert tissue.mask[120, 75], "the epithelium"
    assert not tissue.mask[20, 20], "glass"
    assert tissue.area_mm2 == pytest.approx(tissue.mask.mean() * 2220 * 2967 * 0.499**2 / 1e6, rel=0.03)


def test_a_slide_of_which_nothing_can_be_decoded(slides_dir: Path) -> None:
    with open_slide(slides_dir / "odd" / "unreadable.svs") as slide, pytest.raises(TileUnreadable):
        find_tissue(slide, SETTINGS)
