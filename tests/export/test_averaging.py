"""Area averaging as a graph equals the host's, at drawn scales and phases, computed by ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mtdp_export.averaging import Weights, averaging_graph, weights
from mtdp_runtime.slide.resample import is_still, resample_into, span_of

NEAR_A_HALF = 1e-4


@pytest.fixture(scope="module")
def session() -> Any:
    return onnxruntime.InferenceSession(averaging_graph().SerializeToString(), providers=["CPUExecutionProvider"])


def run(session: Any, windows: NDArray[np.uint8], of: Weights) -> NDArray[np.uint8]:
    given_ = {"window": windows, "rows": of.rows, "columns": of.columns, "factor": of.factor, "nudge": of.nudge}
    (tiles,) = session.run(["tiles"], given_)
    found: NDArray[np.uint8] = tiles
    return found


def exact(window: NDArray[np.uint8], of: Weights) -> NDArray[np.float64]:
    """The sums in float64, before they are rounded."""
    rows, columns = of.rows[0, 0].astype(np.float64), of.columns[0, 0].astype(np.float64)
    return np.asarray(np.einsum("oh,hwc,wp->opc", rows, window.astype(np.float64), columns) * float(of.factor))


def window_for(start: float, out_px: int, scale: float, seed: int) -> tuple[NDArray[np.uint8], float]:
    first, end, phase = span_of(start, out_px, scale)
    return np.random.default_rng(seed).integers(0, 256, (end - first, end - first, 3), np.uint8), phase


@settings(max_examples=40)
@given(
    st.one_of(st.floats(1.001, 9.0), st.floats(0.3, 0.99), st.sampled_from([1.5, 1.979, 2.5, 2.035, 4.008])),
    st.floats(0, 500),
    st.integers(1, 40),
    st.integers(0, 99),
)
def test_a_tile_is_the_hosts_but_where_it_is_a_half(
    session: Any, scale: float, start: float, out_px: int, seed: int
) -> None:
    window, phase = window_for(start, out_px, scale, seed)
    assume(phase or not is_still(scale, out_px))  # then nothing is resampled, and the stage is not asked
    host = np.zeros((out_px, out_px, 3), np.uint8)
    resample_into(host, window, scale, phase, phase)
    of = weights(out_px, *window.shape[:2], scale, phase, phase)
    found = run(session, window[None], of)[0]
    values = exact(window, of)
    half = np.abs(values - np.floor(values) - 0.5) < NEAR_A_HALF
    np.testing.assert_array_equal(found[~half], host[~half])
    assert np.abs(found.astype(int) - host)[half].max(initial=0) <= 1


@settings(max_examples=30)
@given(st.integers(2, 9), st.integers(1, 40), st.integers(0, 99))
def test_at_whole_scales_every_value_is_the_hosts_halves_included(
    session: Any, scale: int, out_px: int, seed: int
) -> None:
    # Few grey levels make many halves.
    window = np.random.default_rng(seed).integers(0, 3, (out_px * scale, out_px * scale, 3), np.uint8)
    host = np.zeros((out_px, out_px, 3), np.uint8)
    resample_into(host, window, scale)
    np.testing.assert_array_equal(run(session, window[None], weights(out_px, *window.shape[:2], scale))[0], host)


def test_a_batch_may_share_its_weights_or_have_its_own(session: Any) -> None:
    """On level 0 all tiles of a slide share them; on a coarser level each has its phase."""
    scale, out_px = 1.979, 16
    starts = [0.0, 31.4, 62.7]
    windows, each = [], []
    side = max(span_of(start, out_px, scale)[1] - span_of(start, out_px, scale)[0] for start in starts)
    for seed, start in enumerate(starts):
        phase = span_of(start, out_px, scale)[2]
        windows.append(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))
        each.append(weights(out_px, side, side, scale, phase, phase))
    own = Weights(
        np.concatenate([of.rows for of in each]),
        np.concatenate([of.columns for of in each]),
        each[0].factor,
        each[0].nudge,
    )
    together = run(session, np.stack(windows), own)
    for tile, window, of in zip(together, windows, each, strict=True):
        np.testing.assert_array_equal(tile, run(session, window[None], of)[0])
    shared = run(session, np.stack(windows), each[0])
    np.testing.assert_array_equal(shared[1], run(session, windows[1][None], each[0])[0])


def test_white_stays_white_and_black_black(session: Any) -> None:
    for scale in (1.3, 2.0, 3.7):
        window, phase = window_for(0.3, 20, scale, 0)
        for grey in (0, 255):
            window[:] = grey
            of = weights(20, *window.shape[:2], scale, phase, phase)
            assert (run(session, window[None], of) == grey).all()
