"""The geometry of patches."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtdp.converters.windows import SHIFT_SHARE, around, cover, grid, holds, shares, without

SIDES = st.integers(1, 40)
LENGTHS = st.integers(1, 120)


@pytest.mark.parametrize(
    ("images", "size", "side", "stride", "paper"),
    [
        (141, (2000, 2000), 250, 125, 31_725),  # Janowczyk 1
        (42, (1000, 1000), 200, 100, 3_402),  # Janowczyk 2
        (374, (1388, 1040), 384, 384, 2_244),  # Janowczyk 7
        (400, (2048, 1536), 512, 512, 4_800),  # BACH18
        (100, (500, 500), 100, 100, 2_500),  # Warwick CRC
    ],
)
def test_grids_give_the_papers_counts(images: int, size: tuple[int, int], side: int, stride: int, paper: int) -> None:
    assert images * len(grid(*size, side, stride)) == paper


@given(LENGTHS, LENGTHS, SIDES, st.integers(1, 40))
def test_no_window_of_a_grid_leaves_the_image_and_none_comes_twice(
    width: int, height: int, side: int, stride: int
) -> None:
    corners = grid(width, height, side, stride)
    assert len(set(corners)) == len(corners)
    assert all(0 <= x <= width - side and 0 <= y <= height - side for x, y in corners)
    assert bool(corners) == (side <= min(width, height))


@given(LENGTHS, LENGTHS, SIDES)
def test_a_cover_holds_every_pixel_with_the_fewest_windows(width: int, height: int, side: int) -> None:
    corners = cover(width, height, side)
    if side > min(width, height):
        assert corners == []
        return
    seen = np.zeros((height, width), bool)
    for x, y in corners:
        assert 0 <= x <= width - side
        assert 0 <= y <= height - side
        seen[y : y + side, x : x + side] = True
    assert seen.all()
    assert len(corners) == -(-width // side) * -(-height // side)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 30), st.integers(1, 30))
def test_shares_are_the_means_of_the_windows(seed: int, side: int, width: int, height: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < 0.3
    corners = grid(width, height, side, 3)
    expected = [mask[y : y + side, x : x + side].mean() for x, y in corners]
    assert shares(mask, corners, side) == pytest.approx(expected)


@given(st.data(), st.integers(20, 60), st.integers(0, 1000))
def test_windows_around_an_object_hold_it_and_none_to_avoid(data: st.DataObject, side: int, seed: int) -> None:
    width, height = data.draw(st.integers(side, 200)), data.draw(st.integers(side, 200))
    points = st.tuples(st.integers(0, width - 1), st.integers(0, height - 1))
    point, others = data.draw(points), data.draw(st.lists(points, max_size=3))
    corners = around(point, width, height, side, random.Random(seed), others)
    assert len(corners) <= 10
    assert len(set(corners)) == len(corners)
    for corner in corners:
        assert holds(corner, side, point)
        assert not any(holds(corner, side, other) for other in others)
        assert 0 <= corner[0] <= width - side
        assert 0 <= corner[1] <= height - side
    assert corners == around(point, width, height, side, random.Random(seed), others)


def test_with_room_there_are_ten_and_the_shift_is_at_most_a_quarter() -> None:
    corners = around((500, 400), 1000, 1000, 250, random.Random(0))
    assert len(corners) == 10
    shifts = [(x + 125 - 500, y + 125 - 400) for x, y in corners]
    assert max(abs(shift) for pair in shifts for shift in pair) <= SHIFT_SHARE * 250 + 1
    assert len({x for x, _ in shifts}) > 5  # and it is a shift, in both directions
    assert len({y for _, y in shifts}) > 5


@pytest.mark.parametrize("point", [(20, 20), (980, 30), (500, 995)])
def test_near_a_border_there_are_still_ten(point: tuple[int, int]) -> None:
    assert len(around(point, 1000, 1000, 250, random.Random(0))) == 10


def test_in_the_very_corner_there_is_one_window_and_it_holds_the_object() -> None:
    assert around((3, 990), 1000, 1000, 250, random.Random(0)) == [(0, 750)]


def test_negatives_are_the_windows_without_a_point() -> None:
    assert without(grid(4, 4, 2, 2), 2, [(1.5, 0.0), (2.0, 3.9)]) == [(2, 0), (0, 2)]
