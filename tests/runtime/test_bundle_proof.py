"""The proof at run time: every golden output counts, and a golden.npz that is none is refused in one line."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mtdp_runtime.backends import Backend, backend_class
from mtdp_runtime.backends.openvino import _output_name
from mtdp_runtime.backends.proof import Replayed, replay, run_backend
from mtdp_runtime.backends.proof_cache import recall, remember
from mtdp_runtime.bundle import Bundle, file_ref, load_bundle, write_manifest
from mtdp_runtime.bundle.golden import FEATURES, load_golden
from mtdp_runtime.bundle.manifest import Head
from mtdp_runtime.errors import BundleInvalid
from support import FEATURES_DIM, TILE_PX, write_tiny_bundle

HEADS = (Head("lung", ("aca", "n", "scc")),)


@pytest.fixture(scope="module")
def with_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose golden outputs hold probabilities."""
    folder = write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "heads", HEADS)
    bundle = load_bundle(folder)
    tiles, _ = load_golden(folder / "golden.npz")
    with engine_of(bundle) as engine:
        resign(folder, tiles=tiles, **run_backend(engine, tiles))
    return folder


def engine_of(bundle: Bundle) -> Backend:
    return backend_class("onnxruntime").load(bundle, "fp32", 2, 1)


def resign(folder: Path, **arrays: NDArray[Any]) -> Bundle:
    """Replace golden.npz, with a digest that fits."""
    np.savez(folder / "golden.npz", **arrays)
    write_manifest(folder, replace(load_bundle(folder).manifest, golden=file_ref(folder, "golden.npz")))
    return load_bundle(folder)


@pytest.fixture
def copy(with_heads: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(with_heads, tmp_path / "copy"))


def test_what_the_model_computes_passes(with_heads: Path) -> None:
    bundle = load_bundle(with_heads)
    with engine_of(bundle) as engine:
        found = replay(engine, bundle)
    assert found.cosine > 0.999999
    assert (found.probability_error, found.shortfall("fp32")) == (0.0, "")


def test_right_features_with_wrong_probabilities_do_not_pass(copy: Path) -> None:
    tiles, outputs = load_golden(copy / "golden.npz")
    outputs["probabilities_lung"] = outputs["probabilities_lung"] + np.float32(0.07)
    bundle = resign(copy, tiles=tiles, **outputs)
    with engine_of(bundle) as engine:
        found = replay(engine, bundle)
    assert "is off by 0.07 in a probability of its golden tiles here, 0.05 is allowed" in found.shortfall("bf16")
    assert found.shortfall("int8") == ""


def test_features_of_the_right_direction_and_a_wrong_length_do_not_pass(copy: Path) -> None:
    tiles, outputs = load_golden(copy / "golden.npz")
    outputs["features"] = outputs["features"] / np.float32(1.05)
    bundle = resign(copy, tiles=tiles, **outputs)
    with engine_of(bundle) as engine:
        found = replay(engine, bundle)
    assert found.cosine == pytest.approx(1)
    assert "has features that are 0.05 too long or too short here, 0.0141 is allowed" in found.shortfall("bf16")
    assert found.shortfall("int8") == ""


@pytest.mark.parametrize(
    "found", [Replayed(float("nan")), Replayed(1.0, float("nan")), Replayed(1.0, 0.0, float("nan"))]
)
def test_no_number_is_no_pass(found: Replayed) -> None:
    assert all(found.shortfall(precision) for precision in ("fp32", "int8"))


def test_a_remembered_proof_holds_all_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTDP_CACHE", str(tmp_path))
    for found in (Replayed(0.99995, 0.5), Replayed(0.9, 0.0), Replayed(1.0, 0.0, 0.2)):
        remember(("a",), found)
        assert recall(("a",)) == found
        assert found.shortfall("bf16")
    assert recall(("b",)) is None
    remember(("c",), Replayed(float("nan")))
    assert recall(("c",)) is None


FOUR = np.zeros((4, TILE_PX, TILE_PX, 3), np.uint8)
ONES = np.ones((4, FEATURES_DIM), np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"tiles": FOUR}, "it holds no features"),
        ({"tiles": FOUR.astype(np.float32), "features": ONES}, r"tiles is float32\[4, 64, 64, 3\], not uint8"),
        ({"tiles": FOUR[0], "features": ONES}, r"tiles is uint8\[64, 64, 3\], not uint8\[N, P, P, 3\]"),
        ({"tiles": np.uint8(3), "features": ONES}, r"tiles is uint8\[\]"),
        ({"tiles": FOUR[:0], "features": ONES[:0]}, "tiles is uint8"),
        ({"tiles": FOUR, "features": np.float32(1)}, r"features is float32\[\], not float32\[4, ...\]"),
        ({"tiles": FOUR, "features": ONES[:3]}, r"features is float32\[3, 12\]"),
        ({"tiles": FOUR, "features": ONES.astype(np.float64)}, "features is float64"),
        ({"tiles": FOUR, "features": ONES.astype("U1")}, "features is <U1"),
        ({"tiles": FOUR, "features": ONES, "probabilities_lung": ONES[0]}, "probabilities_lung is float32"),
        ({"tiles": FOUR[:, :32, :32], "features": ONES}, "tiles of 32 x 32 x 3, .* bundle.json states 64 x 64 x 3"),
        ({"tiles": FOUR, "features": ONES[:, :5]}, "features of 5; bundle.json states .* features of 12"),
        ({"tiles": FOUR, "features": ONES, "probabilities_x": ONES}, "probabilities_x of 12; bundle.json states"),
        ({"tiles": FOUR, "features": ONES}, "features of 12; bundle.json states .* probabilities_lung of 3"),
    ],
)
def test_a_golden_file_that_does_not_fit_is_refused(copy: Path, arrays: dict[str, Any], message: str) -> None:
    bundle = resign(copy, **arrays)
    with engine_of(bundle) as engine, pytest.raises(BundleInvalid, match=message) as caught:
        replay(engine, bundle)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("missing", [FEATURES, "probabilities_lung"])
def test_a_model_without_an_output_that_is_stated_is_refused(copy: Path, name: str, missing: str) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(copy / "model.fp32.onnx")
    for output in model.graph.output:
        if output.name == missing:
            output.name = "other"
    model.graph.node.add(op_type="Neg", input=[missing], output=["other"])
    onnx.save(model, copy / "model.fp32.onnx")
    manifest = load_bundle(copy).manifest
    variant = replace(manifest.variants[0], file=file_ref(copy, "model.fp32.onnx"))
    write_manifest(copy, replace(manifest, variants=(variant,)))
    with pytest.raises(BundleInvalid, match=f"the model has no output {missing}"):
        backend_class(name).load(load_bundle(copy), "fp32", 2, 1)


def test_of_the_names_that_an_engine_merged_the_known_one_is_taken() -> None:
    assert _output_name({"features", "Flatten_7"}) == "features"
    assert _output_name({"probabilities_lung", "a"}) == "probabilities_lung"
    assert _output_name({"b", "a"}) == "a"
