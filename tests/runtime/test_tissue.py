"""The tissue mask, and how much of a tile it covers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mtdp_runtime.errors import TileUnreadable
from mtdp_runtime.settings import TissueSettings
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.tiling.grid import Grid
from mtdp_runtime.tiling.tissue import TissueMask, find_tissue, pen_marks, tissue_fractions, tissue_of

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
    assert threshold == SETTINGS.density_floor


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


INKS = {
    "green": (30, 140, 70),
    "light green": (110, 200, 130),
    "blue": (30, 60, 170),
    "light blue": (70, 130, 220),
    "red": (210, 25, 35),
    "black": (40, 38, 42),
    "grey-black": (70, 68, 72),
}
STAINS = {
    "eosin": (215, 130, 175),
    "haematoxylin": (90, 60, 140),
    "dense haematoxylin": (70, 45, 105),
    "counterstain of IHC": (110, 130, 190),
    "DAB": (140, 90, 55),
    "dark DAB": (85, 50, 30),
    "blood": (185, 65, 80),
    "faint": FAINT,
}


@pytest.mark.parametrize("ink", INKS)
@pytest.mark.parametrize("mpp", [4.0, 8.0, 16.0])
def test_a_pens_line_is_no_tissue_and_takes_none_with_it(ink: str, mpp: float) -> None:
    def px(um: float) -> int:
        return round(um / mpp)

    noise = np.random.default_rng(1).integers(-8, 9, (px(3200), px(3200), 3))
    image = np.full(noise.shape, GLASS)
    image[px(1200) : px(2600), px(400) : px(2800)] = PINK
    image[px(300) : px(700), px(200) : px(3000)] = INKS[ink]  # a line on the glass
    image[px(300) : px(3000), px(1400) : px(1800)] = INKS[ink]  # and one across the tissue
    mask, _ = tissue_of(np.clip(image + noise, 0, 255).astype(np.uint8), mpp, SETTINGS)
    assert not mask[: px(1100)].any()
    assert not mask[:, px(1400) : px(1800)].any()
    assert mask[px(1300) : px(2500), px(500) : px(1250)].all()
    assert mask[px(1300) : px(2500), px(1950) : px(2700)].all()


@settings(max_examples=60, deadline=None)
@given(x=st.integers(0, 119), y=st.integers(0, 99), ink=st.sampled_from(sorted(INKS)), mpp=st.sampled_from([4.0, 8.0]))
def test_a_pens_dot_is_seen_wherever_it_lies(x: int, y: int, ink: str, mpp: float) -> None:
    """It is as wide as the narrowest line; at the border half of it, in a corner a quarter."""
    image = canvas()[:100, :120].copy()
    radius = SETTINGS.mark_um / mpp / 2 + 1.5
    rows, columns = np.ogrid[:100, :120]
    dot = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    image[dot] = INKS[ink]
    assert pen_marks(image, mpp, SETTINGS)[dot].mean() > 0.9


@pytest.mark.parametrize("stain", STAINS)
def test_a_stain_is_no_pen(stain: str) -> None:
    noise = np.random.default_rng(1).integers(-12, 13, (200, 200, 3))
    image = np.full(noise.shape, GLASS)
    image[50:150, 40:160] = STAINS[stain]
    mask, _ = tissue_of(np.clip(image + noise, 0, 255).astype(np.uint8), 8.0, SETTINGS)
    assert mask[60:140, 50:150].mean() > 0.98


def test_pigment_is_no_pen() -> None:
    """Black grains of 60 µm in tissue."""
    image = canvas()
    image[40:160, 40:160] = PINK
    for y, x in np.random.default_rng(0).integers(50, 140, (30, 2)).tolist():
        image[y : y + 7, x : x + 7] = (50, 48, 46)
    mask, _ = tissue_of(image, 8.0, SETTINGS)
    assert mask[60:140, 60:140].mean() > 0.9


@pytest.mark.parametrize("border", [BLACK, (45, 45, 48), (60, 58, 62)])
def test_a_border_all_around_is_no_tissue(border: tuple[int, int, int]) -> None:
    image = canvas()
    image[60:140, 50:150] = PINK
    image[:25], image[-25:], image[:, :25], image[:, -25:] = border, border, border, border
    mask, _ = tissue_of(image, 8.0, SETTINGS)
    inner = np.zeros_like(mask)
    inner[30:-30, 30:-30] = True
    assert not mask[~inner].any()
    assert mask[64:136, 54:146].all()


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "tcga-cr-7395-01a-01-ts1.svs"])
def test_real_slides_have_no_pen(slides_dir: Path, name: str) -> None:
    with open_slide(slides_dir / name, 0.5, "test") as slide:
        tissue = find_tissue(slide, SETTINGS)
    assert pen_marks(tissue.image, tissue.mpp, SETTINGS).mean() < 0.005


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


@pytest.mark.parametrize(
    ("name", "mpp", "part"),
    [
        ("CMU-1-Small-Region.svs", None, 0.39),
        ("tcga-cr-7395-01a-01-ts1.svs", 0.5, 0.65),
        ("multi_frame_jpeg_camelyon_challenge_image.dcm", 28.97, 0.25),
        ("multi_frame_jpeg2000_camelyon_challenge_image.dcm", 28.97, 0.33),
    ],
)
def test_real_slides_have_as_much_tissue_as_was_seen(
    slides_dir: Path, name: str, mpp: float | None, part: float
) -> None:
    """Parts of the slide, from masks that were looked at."""
    with open_slide(slides_dir / name, mpp, "test") as slide:
        tissue = find_tissue(slide, SETTINGS)
    assert tissue.mask.mean() == pytest.approx(part, abs=0.03)
    assert tissue.glass is not None
    assert tissue.source == "found by what it absorbs over the slide's glass"


def test_methyl_green_is_no_pen(slides_dir: Path) -> None:
    """The same tissue, stained as green as a pen."""
    with open_slide(slides_dir / "CMU-1-Small-Region.svs") as slide:
        tissue = find_tissue(slide, SETTINGS)
    density = np.clip(-np.log((tissue.image.mean(axis=2, keepdims=True) + 1) / 244), 0, None)
    green = (243 * np.exp(-density * np.array((0.95, 0.2, 0.45)) / 0.55)).astype(np.uint8)
    mask, _ = tissue_of(green, tissue.mpp, SETTINGS)
    assert mask[tissue.mask].mean() > 0.9
