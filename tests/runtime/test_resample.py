"""Resampling: the area under each output pixel, whatever the scale."""

from __future__ import annotations

import doctest
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import mtdp_runtime.slide.resample
from mtdp_runtime.slide.resample import STILL_PX, is_still, resample_into, span_of


def area_average(source: NDArray[np.uint8], out_px: int, scale: float, phase: float = 0) -> NDArray[np.float64]:
    """The definition, in the plainest form: integrate the piecewise constant image over each cell."""
    low = phase + np.arange(out_px)[:, None] * scale
    pixel = np.arange(source.shape[0])[None, :]
    weights = np.clip(np.minimum(low + scale, pixel + 1) - np.maximum(low, pixel), 0, None) / scale
    weights /= weights.sum(axis=1, keepdims=True)
    return np.einsum("ij,jkc,lk->ilc", weights, source.astype(np.float64), weights, optimize=True)


def noise(side: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def resampled(source: NDArray[np.uint8], out_px: int, scale: float, phase: float = 0) -> NDArray[np.uint8]:
    out = np.zeros((out_px, out_px, 3), np.uint8)
    resample_into(out, source, scale, phase, phase)
    return out


@settings(max_examples=60, deadline=None)
@given(out_px=st.integers(1, 40), scale=st.floats(1.0, 70.0), phase=st.floats(0, 0.999), seed=st.integers(0, 1000))
def test_equals_the_definition_for_any_scale_and_place(out_px: int, scale: float, phase: float, seed: int) -> None:
    _, side, phase = span_of(phase, out_px, scale)
    source = noise(side, seed)
    # Half a level of rounding, and what the law leaves; a scale next to 1 may move the last pixel by 0.02.
    near = 0.5 + 255 * 2 * STILL_PX if is_still(scale, out_px) and not phase else 0.52
    assert np.abs(resampled(source, out_px, scale, phase) - area_average(source, out_px, scale, phase)).max() <= near


@pytest.mark.parametrize("scale", [1.0001, 1.002, 1.0022, 1.0025, 1.01, 1.5, 1.979, 2.0, 2.035, 3.0, 4.008, 16.3])
def test_a_tile_of_the_usual_size_equals_the_definition(scale: float) -> None:
    # 0.499 µm/px read at 0.5: OpenCV alone would hand back the pixels as they are, half a pixel off at the far edge.
    source = noise(span_of(0, 224, scale)[1])
    assert np.abs(resampled(source, 224, scale) - area_average(source, 224, scale)).max() <= 0.52


@pytest.mark.parametrize(("first", "scale"), [(0.25, 1.0), (0.5, 2.0), (1 / 3, 1.25), (0.75, 4.0)])
def test_a_place_between_pixels_is_honoured(first: float, scale: float) -> None:
    start, end, phase = span_of(first, 50, scale)
    assert (start, phase) == (0, first)
    source = noise(end)
    assert np.abs(resampled(source, 50, scale, phase) - area_average(source, 50, scale, phase)).max() <= 0.52


@pytest.mark.parametrize("scale", [0.9, 0.99, 0.998, 0.9995])
def test_a_coarser_slide_is_interpolated_between_pixel_centres(scale: float) -> None:
    side = math.ceil(224 * scale)
    ramp = np.tile(np.linspace(20, 200, side), (side, 1))
    source = np.repeat(np.rint(ramp).astype(np.uint8)[..., None], 3, axis=2)
    centres = np.clip((np.arange(224) + 0.5) * scale - 0.5, 0, side - 1)
    assert np.abs(resampled(source, 224, scale)[100, :, 0] - np.interp(centres, np.arange(side), ramp[0])).max() <= 1.01


def test_a_scale_of_one_copies_the_pixels() -> None:
    source = noise(9)
    np.testing.assert_array_equal(resampled(source, 9, 1.0), source)


@pytest.mark.parametrize("scale", [0.87, 0.95, 0.999, 1.0005, 1.002, 1.5, 1.979, 2.0, 2.1, 7.3])
def test_a_flat_image_stays_flat_to_the_last_pixel(scale: float) -> None:
    side = math.ceil(224 * scale)
    assert (resampled(np.full((side, side, 3), 137, np.uint8), 224, scale) == 137).all()


def test_threads_that_resample_at_once_get_what_each_gets_alone() -> None:
    source = noise(500)
    cases = [(1.0 + number / 7, number / 20) for number in range(16)]
    alone = [resampled(source, 150, *case) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda case: resampled(source, 150, *case), cases * 3))
    for number, tile in enumerate(together):
        np.testing.assert_array_equal(tile, alone[number % len(cases)])


def test_doctests() -> None:
    assert doctest.testmod(mtdp_runtime.slide.resample).failed == 0
