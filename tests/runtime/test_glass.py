"""Tissue of any stain on glass of any tint: drawn slides, of which it is known what is tissue."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mtdp_runtime.settings import TissueSettings
from mtdp_runtime.tiling.glass import find_glass
from mtdp_runtime.tiling.tissue import tissue_of

SETTINGS = TissueSettings()
HIGH, WIDE = 240, 300
TINTS = [(243, 243, 242), (240, 236, 224), (236, 230, 210), (223, 215, 213), (230, 220, 190), (200, 190, 160)]
TINTS += [(200, 225, 200), (190, 200, 230), (255, 255, 255), (240, 220, 150), (120, 118, 115)]
STAINS = {
    "haematoxylin and eosin": (0.5, 0.9, 0.45),
    "silver": (0.6, 0.6, 0.6),
    "methyl green": (0.95, 0.2, 0.45),
    "light green": (0.8, 0.25, 0.55),
    "Alcian blue": (0.87, 0.46, 0.16),
    "DAB": (0.27, 0.57, 0.78),
    "yellow": (0.1, 0.3, 0.95),
}
Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]


def shape_of(part: float, seed: int) -> Mask:
    """Return the tissue: a smooth random shape that covers so much of the slide."""
    field = cv2.GaussianBlur(np.random.default_rng(seed).normal(0, 1, (HIGH, WIDE)), (0, 0), 25)
    return np.asarray(field >= np.quantile(field, 1 - part))


def drawn(
    tissue: Mask,
    glass: tuple[int, int, int],
    stain: tuple[float, float, float],
    contrast: float,
    noise: float,
    seed: int,
) -> Image:
    """Draw light: glass, and in the tissue a stain whose density varies as nuclei, fibres and gaps make it vary."""
    rng = np.random.default_rng(seed)
    texture = np.exp(0.45 * rng.normal(0, 1, (HIGH, WIDE)))
    density = np.where(tissue, texture, 0)[..., None] * np.array(stain) * contrast
    light = np.exp(-density) * np.array(glass) + rng.normal(0, noise, (HIGH, WIDE, 3))
    return np.asarray(np.clip(np.rint(light), 0, 255).astype(np.uint8), np.uint8)


def recall_and_false(image: Image, tissue: Mask) -> tuple[float, float]:
    """Return the part of the tissue that is found, and the part of the glass, three pixels off, taken for it."""
    found, _ = tissue_of(image, 8.0, SETTINGS)
    glass = cv2.dilate(tissue.astype(np.uint8), np.ones((7, 7), np.uint8)) == 0
    return float(found[tissue].mean()), float(found[glass].mean())


def jpeg(image: Image, quality: int) -> Image:
    """Pass an image through JPEG."""
    data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)


def blank(tint: tuple[int, int, int], noise: float, seed: int, fall: float = 0.0) -> Image:
    """Draw glass; to the right its light falls by so much."""
    light = np.array(tint) * (1 - fall * np.arange(WIDE) / WIDE)[None, :, None]
    seen = light + np.random.default_rng(seed).normal(0, noise, (HIGH, WIDE, 3))
    return np.clip(np.rint(seen), 0, 255).astype(np.uint8)


@settings(max_examples=25, deadline=None)
@given(
    contrast=st.floats(0.2, 1.2),
    stain=st.sampled_from(sorted(STAINS)),
    tint=st.sampled_from(TINTS),
    noise=st.floats(0, 3),
    part=st.floats(0.15, 0.8),
    seed=st.integers(0, 999),
)
def test_any_stain_is_found_on_any_glass(
    contrast: float, stain: str, tint: tuple[int, int, int], noise: float, part: float, seed: int
) -> None:
    tissue = shape_of(part, seed)
    recall, false = recall_and_false(drawn(tissue, tint, STAINS[stain], contrast, noise, seed), tissue)
    assert recall >= 0.9
    assert false <= 0.02


@settings(max_examples=25, deadline=None)
@given(
    tint=st.sampled_from(TINTS),
    noise=st.floats(0, 4),
    quality=st.sampled_from([None, 30, 50, 70, 90]),
    seed=st.integers(0, 99),
)
def test_blank_glass_is_no_tissue(tint: tuple[int, int, int], noise: float, quality: int | None, seed: int) -> None:
    """Of any tint, with noise and blocks of JPEG."""
    image = blank(tint, noise, seed)
    if quality is not None:
        image = jpeg(image, quality)
    mask, _ = tissue_of(image, 8.0, SETTINGS)
    assert not mask.any()


@settings(max_examples=15, deadline=None)
@given(
    tint=st.sampled_from(TINTS[:-1]),
    noise=st.floats(0.5, 4),
    fall=st.floats(0, 0.3),
    quality=st.sampled_from([None, 70, 90]),
    seed=st.integers(0, 99),
)
def test_light_that_falls_off_to_one_side_makes_no_tissue(
    tint: tuple[int, int, int], noise: float, fall: float, quality: int | None, seed: int
) -> None:
    image = blank(tint, noise, seed, fall)
    mask, _ = tissue_of(image if quality is None else jpeg(image, quality), 8.0, SETTINGS)
    assert not mask.any()


@settings(max_examples=15, deadline=None)
@given(tint=st.sampled_from(TINTS[:-1]), noise=st.floats(0.5, 4), step=st.integers(40, 120), part=st.floats(0.01, 0.03))
def test_the_stripes_of_stitching_are_no_tissue(
    tint: tuple[int, int, int], noise: float, step: int, part: float
) -> None:
    """Every other stripe is dimmer by up to 3 %."""
    dimmer = (1 - part * (np.arange(WIDE) // step % 2))[None, :, None]
    seen = np.array(tint) * dimmer + np.random.default_rng(step).normal(0, noise, (HIGH, WIDE, 3))
    mask, _ = tissue_of(np.clip(np.rint(seen), 0, 255).astype(np.uint8), 8.0, SETTINGS)
    assert not mask.any()


@pytest.mark.parametrize("tint", TINTS)
@pytest.mark.parametrize(("fall", "steepness"), [(0.2, 1), (0.4, 1), (0.3, 2), (0.4, 2)])
def test_dark_corners_of_blank_glass_are_no_tissue(tint: tuple[int, int, int], fall: float, steepness: int) -> None:
    y, x = np.mgrid[:HIGH, :WIDE]
    light = 1 - fall * (2 * ((y / HIGH - 0.5) ** 2 + (x / WIDE - 0.5) ** 2)) ** steepness
    seen = np.array(tint) * light[..., None] + np.random.default_rng(1).normal(0, 1.5, (HIGH, WIDE, 3))
    assert not tissue_of(np.clip(np.rint(seen), 0, 255).astype(np.uint8), 8.0, SETTINGS)[0].any()


@pytest.mark.parametrize("tint", [(200, 190, 160), (80, 78, 75)])
def test_a_slope_of_light_that_has_no_peak_of_brightness_is_no_tissue(tint: tuple[int, int, int]) -> None:
    """Over 23 mm it falls by a third: more of the slide is at the dark end, and the bright one is glass, too."""
    y, x = np.mgrid[:560, :690]
    light = 1 - 0.34 * (0.3 * y / 560 + 0.7 * (x / 690) ** 0.7)
    seen = np.array(tint) * light[..., None] + np.random.default_rng(1).normal(0, 2.5, (560, 690, 3))
    assert not tissue_of(np.clip(np.rint(seen), 0, 255).astype(np.uint8), 8.0, SETTINGS)[0].any()


@pytest.mark.parametrize("quality", [None, 70])
@pytest.mark.parametrize("step", [45, 90])
@pytest.mark.parametrize("tint", TINTS[::3])
def test_stripes_of_five_percent_are_no_tissue(tint: tuple[int, int, int], step: int, quality: int | None) -> None:
    dimmer = (1 - 0.05 * (np.arange(WIDE) // step % 2))[None, :, None]
    seen = np.array(tint) * dimmer + np.random.default_rng(step).normal(0, 1.5, (HIGH, WIDE, 3))
    image = np.clip(np.rint(seen), 0, 255).astype(np.uint8)
    assert not tissue_of(image if quality is None else jpeg(image, quality), 8.0, SETTINGS)[0].any()


@settings(max_examples=10, deadline=None)
@given(
    part=st.floats(0.05, 0.1),
    stain=st.sampled_from(sorted(STAINS)),
    tint=st.sampled_from(TINTS[:-1]),
    seed=st.integers(0, 99),
)
def test_little_and_pale_tissue_is_found(part: float, stain: str, tint: tuple[int, int, int], seed: int) -> None:
    """Pieces that `TissueSettings` calls dust, or narrower than a hair, are not counted."""
    tissue = shape_of(part, seed)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(tissue.view(np.uint8))
    wide = np.zeros(count, np.bool_)
    wide[labels[cv2.erode(tissue.view(np.uint8), np.ones((13, 13), np.uint8)) > 0]] = True
    counted = (wide & (stats[:, cv2.CC_STAT_AREA] >= 300))[labels] & tissue
    found, _ = tissue_of(drawn(tissue, tint, STAINS[stain], 0.2, 1.5, seed), 8.0, SETTINGS)
    assert not counted.any() or found[counted].mean() >= 0.9


@pytest.mark.parametrize("stain", STAINS)
@pytest.mark.parametrize("contrast", [0.25, 0.5])
def test_a_pale_field_of_nothing_but_tissue_is_tissue(stain: str, contrast: float) -> None:
    everywhere = np.ones((HIGH, WIDE), np.bool_)
    image = drawn(everywhere, TINTS[0], STAINS[stain], contrast, 1.0, 6)
    assert tissue_of(image, 8.0, SETTINGS)[0].mean() > 0.9


@pytest.mark.parametrize("width_px", [2, 3, 4])
def test_the_edge_of_a_coverslip_that_touches_tissue_stays_off_it(width_px: int) -> None:
    tissue = shape_of(0.3, 7)
    image = drawn(tissue, TINTS[0], STAINS["haematoxylin and eosin"], 1.0, 1.5, 7)
    image[:, 140 : 140 + width_px] //= 2
    image[100 : 100 + width_px] //= 2
    recall, false = recall_and_false(image, tissue)
    assert recall >= 0.95
    assert false <= 0.01  # it would be 0.02 to 0.04 with the lines


@pytest.mark.parametrize("tint", TINTS[:5])
def test_the_colour_of_the_glass_is_told(tint: tuple[int, int, int]) -> None:
    glass = find_glass(drawn(shape_of(0.3, 1), tint, STAINS["silver"], 0.5, 1.5, 1), 8.0)
    assert glass.told
    assert np.abs(glass.colour.astype(int) - tint).max() <= 2


def test_where_all_is_tissue_no_glass_is_told_and_all_is_found() -> None:
    everywhere = np.ones((HIGH, WIDE), np.bool_)
    image = drawn(everywhere, TINTS[0], STAINS["haematoxylin and eosin"], 1.0, 1.5, 1)
    assert not find_glass(image, 8.0).told
    assert tissue_of(image, 8.0, SETTINGS)[0].mean() > 0.99


@pytest.mark.parametrize("value", [0, 128, 200, 218, 240, 255])
@pytest.mark.parametrize("contrast", [0.2, 1.0])
def test_what_was_not_scanned_is_neither_glass_nor_tissue(value: int, contrast: float) -> None:
    """A fill may also be darker than the glass in one colour, and brighter in another: 218."""
    tissue = shape_of(0.3, 2)
    image = drawn(tissue, (223, 215, 213), STAINS["haematoxylin and eosin"], contrast, 1.5, 2)
    image[:80], image[80:160, :90] = value, value
    tissue[:80], tissue[80:160, :90] = False, False
    recall, false = recall_and_false(image, tissue)
    assert recall >= 0.9
    assert false <= 0.02
    assert np.abs(find_glass(image, 8.0).colour.astype(int) - (223, 215, 213)).max() <= 2


def test_light_that_falls_off_in_the_corners_is_no_tissue() -> None:
    y, x = np.mgrid[:HIGH, :WIDE]
    light = 1 - 0.2 * 2 * ((y / HIGH - 0.5) ** 2 + (x / WIDE - 0.5) ** 2)
    tissue = shape_of(0.3, 3)
    image = drawn(tissue, TINTS[0], STAINS["haematoxylin and eosin"], 0.3, 1.5, 3)
    recall, false = recall_and_false((image * light[..., None]).astype(np.uint8), tissue)
    assert recall >= 0.9
    assert false <= 0.02


def test_dust_and_the_edge_of_a_coverslip_are_no_tissue() -> None:
    image = drawn(np.zeros((HIGH, WIDE), np.bool_), TINTS[0], STAINS["silver"], 1, 1.5, 4)
    image[50:52] = image[50:52] // 2
    image[:, 200:203] = image[:, 200:203] // 2
    for y, x in np.random.default_rng(4).integers(0, 230, (60, 2)).tolist():
        image[y : y + 3, x : x + 3] = 90
    assert tissue_of(image, 8.0, SETTINGS)[0].mean() < 0.002


def test_a_smear_paler_than_a_tenth_of_the_tissue_is_no_tissue() -> None:
    tissue = np.zeros((HIGH, WIDE), np.bool_)
    tissue[100:140, 100:150] = True
    image = drawn(tissue, TINTS[0], STAINS["silver"], 1, 1.0, 5)
    image[20:80, 150:280] = image[20:80, 150:280] * 0.96
    found, _ = tissue_of(image, 8.0, SETTINGS)
    assert found[tissue].mean() >= 0.9
    assert not found[20:80].any()


@pytest.mark.parametrize(
    ("tint", "step"), [((243, 243, 242), 60), ((223, 215, 213), 30), ((200, 190, 160), 45), ((200, 190, 160), 60)]
)
def test_narrow_stripes_of_four_percent_are_no_tissue(tint: tuple[int, int, int], step: int) -> None:
    """By their optical density alone, 5 to 40 % of these slides would be tissue: they are as smooth as the glass."""
    dimmer = (1 - 0.04 * (np.arange(WIDE) // step % 2))[None, :, None]
    seen = np.array(tint) * dimmer + np.random.default_rng(step).normal(0, 1.5, (HIGH, WIDE, 3))
    assert not tissue_of(np.clip(np.rint(seen), 0, 255).astype(np.uint8), 8.0, SETTINGS)[0].any()


def test_what_lies_beside_a_fill_of_one_value_is_no_glass_where_no_lamp_gives_its_colour() -> None:
    """A writer's white around evenly stained tissue: the tissue is most of the picture, flat, and alike."""
    image = np.full((128, 128, 3), 243, np.uint8)
    pink = np.random.default_rng(0).normal((200, 120, 170), 1.5, (128, 96, 3))
    image[:, 32:] = np.clip(np.rint(pink), 0, 255).astype(np.uint8)
    mask, _ = tissue_of(image, 8.0, TissueSettings())
    assert mask[:, 34:].all()
    assert not mask[:, :30].any()


@pytest.mark.parametrize("tint", [(243, 243, 242), (200, 190, 160), (80, 78, 75)])
@pytest.mark.parametrize("fall", [0.15, 0.3])
def test_glass_beyond_tissue_in_fallen_light_is_no_tissue(tint: tuple[int, int, int], fall: float) -> None:
    """Two bands of tissue part the glass in three, so that no slope of light leads from one to the next."""
    columns = np.arange(WIDE)
    tissue = np.broadcast_to(((columns // 60) % 2 == 1)[None, :], (HIGH, WIDE)).copy()
    image = drawn(tissue, tint, STAINS["haematoxylin and eosin"], 0.6, 1.5, 8)
    light = (1 - fall * columns / WIDE)[None, :, None]
    recall, false = recall_and_false(np.clip(np.rint(image * light), 0, 255).astype(np.uint8), tissue)
    assert recall >= 0.9
    assert false <= 0.02


@pytest.mark.parametrize("tint", [(120, 118, 115), (223, 215, 213), (240, 236, 224)])
@pytest.mark.parametrize("contrast", [0.2, 0.4])
def test_grey_tissue_as_even_as_glass_is_no_glass_in_fallen_light(tint: tuple[int, int, int], contrast: float) -> None:
    """It has the glass's hue and grain. It has an edge as well, which no light has."""
    tissue = shape_of(0.4, 9)
    rng = np.random.default_rng(9)
    density = np.where(tissue, np.exp(0.1 * rng.normal(0, 1, tissue.shape)), 0)[..., None] * 0.6 * contrast
    seen = np.exp(-density) * np.array(tint) + rng.normal(0, 2.0, (HIGH, WIDE, 3))
    recall, false = recall_and_false(np.clip(np.rint(seen), 0, 255).astype(np.uint8), tissue)
    assert recall >= 0.9
    assert false <= 0.02
