"""Which images are levels of one pyramid, and how much coarser each is: by the number that explains both sides."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtdp_runtime.slide.pyramid import Candidate, judge

SIDES = st.integers(300, 200_000)
ROUNDINGS: dict[str, Callable[[float], int]] = {
    "down": math.floor,
    "up": math.ceil,
    "nearest": lambda exact: math.floor(exact + 0.5),
}


def downsamples(images: list[Candidate]) -> list[float | None]:
    return [verdict.downsample for verdict in judge(images)]


@given(SIDES, SIDES, st.sampled_from(sorted(ROUNDINGS)), st.booleans(), st.sampled_from([2, 4]))
def test_repeated_division_gives_exact_powers(width: int, height: int, name: str, at_once: bool, step: int) -> None:
    images, sides, factor = [Candidate(width, height)], (width, height), 1
    expected: list[float | None] = [1.0]
    while min(sides) >= 4 * step and len(images) < 10:
        factor *= step
        source, divisor = ((width, height), factor) if at_once else (sides, step)
        sides = (ROUNDINGS[name](source[0] / divisor), ROUNDINGS[name](source[1] / divisor))
        images.append(Candidate(*sides))
        expected.append(float(factor))
    assert downsamples(images) == expected
    assert downsamples([images[0], *reversed(images[1:])]) == [1.0, *reversed(expected[1:])]  # in any order


@given(SIDES, SIDES, st.integers(2, 64), st.sampled_from(sorted(ROUNDINGS)))
def test_any_whole_factor_is_found_while_it_is_the_only_one(width: int, height: int, factor: int, name: str) -> None:
    level = Candidate(ROUNDINGS[name](width / factor), ROUNDINGS[name](height / factor))
    if max(level.width, level.height) > 2 * factor + 2:
        assert downsamples([Candidate(width, height), level]) == [1.0, float(factor)]


@given(SIDES, SIDES, st.sampled_from([1.5, 2.5, 6.25, 10.5]))
def test_a_factor_that_is_not_whole_stays_as_it_is(width: int, height: int, factor: float) -> None:
    level = Candidate(round(width / factor), round(height / factor))
    found = downsamples([Candidate(width, height), level])[1]
    assert found is not None
    longer = max(width, height)
    assert abs(longer / found - longer / factor) <= 1  # at the far end less than a pixel of the level away


@given(SIDES, SIDES, st.floats(1.5, 40), st.floats(1.08, 5))
def test_another_aspect_is_another_picture(width: int, height: int, factor: float, stretch: float) -> None:
    macro = Candidate(round(width / factor), round(height / factor / stretch))
    least = min(macro.width, macro.height)
    if least * (stretch - 1) > 4 * stretch:  # not a matter of rounding
        (_, verdict) = judge([Candidate(width, height), macro])
        assert verdict.downsample is None
        assert "another picture" in verdict.why


@given(st.integers(2, 60), st.integers(2, 60), st.sampled_from([128, 256, 512]), st.booleans())
def test_levels_padded_to_whole_tiles_are_what_their_spacing_says(
    across: int, down: int, tile: int, first_is_padded: bool
) -> None:
    cut = 0 if first_is_padded else tile // 3
    width, height = across * tile - cut, down * tile - cut
    images, factor = [Candidate(width, height, None, (tile, tile))], 1
    while factor < 16:
        factor *= 2
        sides = (-(-math.ceil(width / factor) // tile) * tile, -(-math.ceil(height / factor) // tile) * tile)
        images.append(Candidate(*sides, (factor * 1.0, factor * 1.0), (tile, tile)))
    found = downsamples(images)
    assert found == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_levels_padded_to_whole_tiles_without_a_spacing() -> None:
    tile = (128, 128)
    sizes = ((1920, 1664), (1024, 896), (512, 512), (256, 256))
    assert downsamples([Candidate(*size, None, tile) for size in sizes]) == [1.0, 2.0, 4.0, 8.0]
    assert downsamples([Candidate(1920, 1920, None, tile), Candidate(1024, 1024, None, tile)]) == [1.0, 2.0]


@pytest.mark.parametrize(("width", "height"), [(35840, 28672), (107520, 99840), (76800, 69120)])
def test_a_padded_level_whose_sides_would_fit_another_factor_follows_the_level_before(width: int, height: int) -> None:
    """1/16 of 35840 x 28672 px is padded to 2560 x 2048: exactly 1/14 of it, which no pyramid after 1/8 has."""
    tile = 512
    factors = [1, 2, 4, 8, 16]
    sizes = [[-(-side // (factor * tile)) * tile for side in (width, height)] for factor in factors]
    assert downsamples([Candidate(*size, None, (tile, tile)) for size in sizes])[-1] == 16
    alone = downsamples([Candidate(*sizes[0], None, (tile, tile)), Candidate(*sizes[-1], None, (tile, tile))])
    assert alone[-1] == width / sizes[-1][0]  # without a level before it nothing speaks against what is exact


def test_a_spacing_that_contradicts_the_size_is_no_level() -> None:
    first, tile = (4000, 3000), (256, 256)
    images = [Candidate(*first, None, tile), Candidate(2000, 1500, (4.0, 4.0), tile)]
    assert downsamples(images) == [1.0, None]
    assert "the file says 1/4" in judge(images)[1].why


@pytest.mark.parametrize(
    "spacing", [(1.0, 1.0), (2.0, 2.0), (1023 / 511, 30001 / 15000), (float("nan"), 2.0), (0.0, 0.0)]
)
def test_a_spacing_that_is_copied_or_computed_from_the_size_says_nothing(spacing: tuple[float, float]) -> None:
    assert downsamples([Candidate(1023, 30001), Candidate(511, 15000, spacing)]) == [1.0, 2.0]


def test_an_image_larger_than_level_0_is_no_level() -> None:
    assert downsamples([Candidate(1000, 1000), Candidate(1500, 1500)]) == [1.0, None]


def test_of_two_levels_padded_to_one_size_the_second_tells_no_factor() -> None:
    """1/8 and 1/16 of 6174 x 6900 px both are a single tile; both were taken for 1/8."""
    tile = (1024, 1024)
    sides = [[-(-side // (factor * 1024)) * 1024 for side in (6174, 6900)] for factor in (1, 2, 4, 8, 16)]
    images = [Candidate(*size, None, tile) for size in sides]
    assert downsamples(images) == [1.0, 2.0, 4.0, 8.0, None]
    assert "as large as another level" in judge(images)[-1].why
    stated = [Candidate(*size, (2.0**i, 2.0**i) if i else None, tile) for i, size in enumerate(sides)]
    assert downsamples(stated) == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_a_plane_as_large_as_level_0_is_no_level() -> None:
    assert downsamples([Candidate(1000, 800), Candidate(1000, 800), Candidate(500, 400)]) == [1.0, None, 2.0]
