"""Resampling: the area under each output pixel, whatever the scale."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import mtdp_runtime.slide.resample
from mtdp_runtime.slide.resample import resample_into, source_px


def area_average(source: NDArray[np.uint8], out_px: int, scale: float) -> NDArray[np.float64]:
    """The definition, in the plainest form: integrate the piecewise constant image over each cell."""
    low = np.arange(out_px)[:, None] * scale
    pixel = np.arange(source.shape[0])[None, :]
    weights = np.clip(np.minimum(low + scale, pixel + 1) - np.maximum(low, pixel), 0, None) / scale
    weights /= weights.sum(axis=1, keepdims=True)
    return np.einsum("ij,jkc,lk->ilc", weights, source.astype(np.float64), weights, optimize=True)


@settings(max_examples=60, deadline=None)
@given(out_px=st.integers(1, 24), scale=st.floats(1.0, 5.0), seed=st.integers(0, 1000))
def test_equals_the_definition_for_any_scale(out_px: int, scale: float, seed: int) -> None:
    side = source_px(out_px, scale)
    source = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    out = np.zeros((out_px, out_px, 3), np.uint8)
    resample_into(out, source, scale)
    # Half a level of rounding per axis, and slivers below a thousandth of a pixel that OpenCV leaves out.
    assert np.abs(out - area_average(source, out_px, scale)).max() <= 1.26


@pytest.mark.parametrize("scale", [1.0001, 1.002, 1.0022, 1.0025, 1.01])
def test_a_scale_next_to_one_is_not_taken_for_one(scale: float) -> None:
    # 0.499 µm/px read at 0.5: OpenCV alone would hand back the pixels as they are, half a pixel off at the far edge.
    side = source_px(224, scale)
    source = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    out = np.zeros((224, 224, 3), np.uint8)
    resample_into(out, source, scale)
    assert np.abs(out - area_average(source, 224, scale)).max() <= 1.26


@pytest.mark.parametrize("scale", [0.9, 0.99, 0.998, 0.9999])
def test_a_coarser_slide_is_interpolated_between_pixel_centres(scale: float) -> None:
    side = source_px(224, scale)
    ramp = np.tile(np.linspace(20, 200, side), (side, 1))
    source = np.repeat(np.rint(ramp).astype(np.uint8)[..., None], 3, axis=2)
    out = np.zeros((224, 224, 3), np.uint8)
    resample_into(out, source, scale)
    centres = np.clip((np.arange(224) + 0.5) * scale - 0.5, 0, side - 1)
    assert np.abs(out[100, :, 0] - np.interp(centres, np.arange(side), ramp[0])).max() <= 1.26


def test_a_scale_of_one_copies_the_pixels() -> None:
    source = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    out = np.zeros((7, 9, 3), np.uint8)
    resample_into(out, source, 1.0)
    np.testing.assert_array_equal(out, source)


@pytest.mark.parametrize("scale", [0.87, 0.95, 0.999, 1.0005, 1.002, 1.5, 1.979, 2.0, 2.1, 7.3])
def test_a_flat_image_stays_flat_to_the_last_pixel(scale: float) -> None:
    side = source_px(224, scale)
    out = np.zeros((224, 224, 3), np.uint8)
    resample_into(out, np.full((side, side, 3), 137, np.uint8), scale)
    assert (out == 137).all()


def test_doctests() -> None:
    assert doctest.testmod(mtdp_runtime.slide.resample).failed == 0
