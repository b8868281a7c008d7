"""What an engine returns is what the manifest states, or an error; numbers that are not finite are no features."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from mtdp_runtime.backends.checked import CheckedEngine
from mtdp_runtime.backends.onnxruntime import OnnxRuntime
from mtdp_runtime.bundle import Bundle, load_bundle
from mtdp_runtime.bundle.manifest import FileRef, Head
from mtdp_runtime.errors import BackendError
from mtdp_runtime.extraction.check import Check, check_rows
from mtdp_runtime.extraction.extract import extract_slide
from mtdp_runtime.extraction.models import Model, Target
from mtdp_runtime.settings import ExtractSettings
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.store.layout import TileStatus
from mtdp_runtime.store.writer import FeatureStore
from store_life import BATCH, layout, rows
from support import FEATURES_DIM, TILE_PX, extract, make_manifest, write_tiny_bundle

HEAD = Head("blood", ("a", "b"))


class Engine:
    """Returns what it is told to."""

    name, batch, depth = "engine 1", 4, 2

    def __init__(self, outputs: Mapping[str, NDArray[np.float32]]) -> None:
        self.outputs = outputs

    def submit(self, tiles: NDArray[np.uint8]) -> int:
        return 0

    def result(self, ticket: int) -> Mapping[str, NDArray[np.float32]]:
        return self.outputs


def outputs() -> dict[str, NDArray[np.float32]]:
    return {"features": np.ones((4, FEATURES_DIM), np.float32), HEAD.output: np.ones((4, 2), np.float32)}


def result(given: Mapping[str, NDArray[np.float32]]) -> Mapping[str, NDArray[np.float32]]:
    file = FileRef("model.onnx", "0" * 64, 1)
    return CheckedEngine(Engine(given), Bundle(Path(), make_manifest(file, file, (HEAD,)), "")).result(0)


def test_what_is_stated_passes() -> None:
    assert result(outputs()).keys() == outputs().keys()


@pytest.mark.parametrize(
    ("name", "values", "got"),
    [
        ("features", np.ones((4, 11), np.float32), "float32[4, 11]"),
        ("features", np.ones((4, 13), np.float32), "float32[4, 13]"),
        ("features", np.ones((3, 12), np.float32), "float32[3, 12]"),
        ("features", np.ones((8, 12), np.float32), "float32[8, 12]"),
        ("features", np.ones((4, 12, 1), np.float32), "float32[4, 12, 1]"),
        ("features", np.ones(48, np.float32), "float32[48]"),
        ("features", np.ones((4, 12), np.float64), "float64[4, 12]"),
        ("features", np.ones((4, 12), np.float16), "float16[4, 12]"),
        ("features", None, "nothing"),
        (HEAD.output, np.ones((4, 3), np.float32), "float32[4, 3]"),
        (HEAD.output, None, "nothing"),
    ],
)
def test_any_other_shape_or_type_is_an_error_that_names_all(
    name: str, values: NDArray[np.float32] | None, got: str
) -> None:
    given = {key: one for key, one in (outputs() | {name: values}).items() if one is not None}
    stated = f"float32[4, {2 if name == HEAD.output else FEATURES_DIM}]"
    with pytest.raises(BackendError) as caught:
        result(given)
    assert str(caught.value) == f"tiny: engine 1 gives {got} as {name}, {stated} is stated"
    assert caught.value.hint


@pytest.mark.parametrize("width", [4, 60])
def test_a_model_of_another_width_than_its_manifest_says_ends_the_run(
    make_slide: Callable[..., Path], tmp_path: Path, width: int
) -> None:
    """The command itself, with an engine that is not proven when it is loaded."""
    bundle = write_tiny_bundle(tmp_path / "tiny")
    facts = json.loads((bundle / "bundle.json").read_text())
    facts["mtdp"]["features_dim"] = facts["num_classes"] = width
    facts["class_names"] = [f"feature_{i}" for i in range(width)]
    (bundle / "bundle.json").write_text(json.dumps(facts))
    ended = extract(make_slide(), "--model", bundle, "--out", tmp_path / "o", "--backend", "onnxruntime", "--batch", 4)
    assert ended.returncode != 0
    assert f"gives float32[4, {FEATURES_DIM}] as features, float32[4, {width}] is stated" in ended.stderr
    assert not (tmp_path / "o" / "slide.h5").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_probability_that_is_not_finite_makes_its_row_bad(tmp_path: Path, value: float) -> None:
    values, _ = rows()
    values["probabilities_x"][7, 1] = value
    with FeatureStore(tmp_path / "s.h5", layout()) as store:
        store.append({name: one[:BATCH] for name, one in values.items()}, np.zeros(BATCH, np.uint8))
        status = store.statuses()[:BATCH]
    assert np.flatnonzero(status).tolist() == [7]
    assert status[7] == TileStatus.NOT_FINITE


def test_a_check_by_a_reference_that_is_not_finite_is_no_agreement(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    bundle, path = load_bundle(tiny_bundle), tmp_path / "slide.h5"
    settings = ExtractSettings(mpp=0.5, stride_px=TILE_PX, min_tissue=0)
    with OnnxRuntime.load(bundle, "fp32", 4, 1) as engine, open_slide(make_slide()) as slide:
        extract_slide(slide, [Target(path, Model(bundle, engine))], settings, readers=1)
        run = engine._session.run

        class Broken:
            def run(self, *arguments: object) -> list[NDArray[np.float32]]:
                return [np.full_like(one, np.nan) for one in run(*arguments)]

        engine._session = Broken()
        with pytest.raises(BackendError, match=r"the reference of --check .* gives numbers that are not finite"):
            check_rows(path, slide.info, 1.0, TILE_PX, Check(5, engine))
    with h5py.File(path) as file:
        assert (file["status"][:] == 0).all()
