"""Area averaging as a graph gives the host's bits, at drawn scales and phases, computed by ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mtdp_export.averaging import Weights, averaging_graph, weights
from mtdp_runtime.backends.tensorrt.library import LIBRARY, Log
from mtdp_runtime.slide.resample import is_still, resample_into, span_of


@pytest.fixture(scope="module")
def session() -> Any:
    return onnxruntime.InferenceSession(averaging_graph().SerializeToString(), providers=["CPUExecutionProvider"])


def run(session: Any, windows: NDArray[np.uint8], of: Weights) -> NDArray[np.uint8]:
    given_ = {"window": windows, "rows": of.rows, "columns": of.columns}
    given_ |= {"row_factors": of.row_factors, "column_factors": of.column_factors}
    (tiles,) = session.run(["tiles"], given_)
    found: NDArray[np.uint8] = tiles
    return found


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
def test_a_tile_is_the_hosts_to_the_bit(session: Any, scale: float, start: float, out_px: int, seed: int) -> None:
    window, phase = window_for(start, out_px, scale, seed)
    assume(phase or not is_still(scale, out_px))  # then nothing is resampled, and the stage is not asked
    host = np.zeros((out_px, out_px, 3), np.uint8)
    resample_into(host, window, scale, phase, phase)
    of = weights(out_px, *window.shape[:2], scale, phase, phase)
    np.testing.assert_array_equal(run(session, window[None], of)[0], host)


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
        np.concatenate([of.row_factors for of in each]),
        np.concatenate([of.columns for of in each]),
        np.concatenate([of.column_factors for of in each]),
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


@pytest.mark.parametrize("capability", ["8.0+", "8.9"])
def test_tensorrt_rtx_builds_it_without_a_gpu(capability: str) -> None:
    """Built, and never run: whether a GPU gives the same bits is not known, and neither is what it costs there."""
    pytest.importorskip("tensorrt_rtx")
    library = LIBRARY["tensorrt-rtx"].load()
    log = Log(library)
    builder = library.Builder(log.logger)
    network = builder.create_network(0)
    parser = library.OnnxParser(network, log.logger)
    assert parser.parse(averaging_graph().SerializeToString()), log.last_error
    of = weights(56, 112, 112, 1.979)
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        own = (1, 112, 112, 3) if name == "window" else getattr(of, name).shape
        profile.set_shape(name, own, own, (8, *own[1:]) if name == "window" else own)
    config.add_optimization_profile(profile)
    config.clear_flag(library.BuilderFlag.TF32)  # it would round what the law has whole
    if capability == "8.9":
        config.num_compute_capabilities = 1
        assert config.set_compute_capability(library.ComputeCapability.SM89, 0)
    assert builder.build_serialized_network(network, config) is not None, log.last_error
