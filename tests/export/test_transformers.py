"""Transformers in low precision: what errs stays in fp32, and the yardstick is torch's own autocast."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mtdp_export import precision
from mtdp_export.attention import attention
from mtdp_export.encoder_source import Asked, open_timm
from mtdp_export.errors import ParityFailure
from mtdp_export.golden import calibration_tiles
from mtdp_export.graph import Deployed, autocast_outputs, export_light, reference_outputs
from mtdp_export.int8 import write_int8
from mtdp_export.model_store import load_light, save_model
from mtdp_export.parity import Comparison, compare_outputs, judged, knn_agreement, require, table
from mtdp_export.pixels import Stated
from mtdp_export.precision import near_the_end_of_fp16, plans, write_typed
from mtdp_export.rounding import in_fp32, run
from mtdp_export.typed import kernel_names, low_types, to_low_type
from mtdp_runtime.backends.proof import Replayed
from mtdp_runtime.bundle import load_bundle
from mtdp_runtime.bundle.golden import FEATURES
from mtdp_runtime.bundle.manifest import Autocast, Manifest, Parity
from mtdp_runtime.bundle.tolerance import cosines, least_cosine, least_cosine_of

PX = 112
IMAGENET = Stated((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), tile_px=PX)


class Dino:
    """The real DINOv2 ViT-S/14, on small tiles: random weights hide all of this."""

    def __init__(self, folder: Path, weights: Path, slide: Path) -> None:
        asked = Asked("cls", {"img_size": PX, "dynamic_img_size": True})
        opened = open_timm("timm:vit_small_patch14_dinov2", str(weights), IMAGENET, asked)
        self.tiles = calibration_tiles(slide, PX, 0.5, 24)
        self.model = Deployed(opened.network, opened.pixels).eval()
        self.expected = reference_outputs(self.model, self.tiles)
        self.folder = folder
        light = export_light(self.model, {}, folder)
        (folder / "base.onnx").write_bytes(light.SerializeToString())

    def cosine(self, model: onnx.ModelProto) -> float:
        got = run(model, self.tiles, folder=self.folder)[FEATURES]
        return float(cosines(got, self.expected[FEATURES]).min())


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory, data_dir: Path, slides_dir: Path) -> Dino:
    weights = data_dir / "weights" / "dinov2-vits14.safetensors"
    return Dino(tmp_path_factory.mktemp("dino"), weights, slides_dir / "CMU-1-Small-Region.svs")


def test_real_weights_in_bf16_are_as_near_as_autocast(dino: Dino) -> None:
    out = dino.folder / "bf16.onnx"
    typed = write_typed(dino.folder / "base.onnx", "bf16", out, dino.tiles, dino.expected)
    assert typed.kept.startswith("biases and scales")
    assert typed.fp32_kernels < typed.kernels / 2  # how many it takes depends on how a CPU rounds
    outputs = autocast_outputs(dino.model, dino.tiles, "bf16")
    assert outputs is not None
    autocast = float(cosines(outputs[FEATURES], dino.expected[FEATURES]).min())
    plain = dino.cosine(in_fp32(to_low_type(load_light(dino.folder / "base.onnx"), "bf16", (), dino.folder)))
    written = dino.cosine(in_fp32(load_light(out)))
    assert written == pytest.approx(typed.cosine_min, abs=2e-6)
    assert 1 - written < 0.7 * (1 - plain), "nothing was gained by what stays in fp32"
    assert written >= least_cosine_of("bf16", [Autocast("bf16", autocast, 1.0, None)])


def test_real_weights_in_int8_are_near_on_tissue_that_did_not_calibrate(dino: Dino, data_dir: Path) -> None:
    """And on that of another organ and scanner: calibrating on one slide alone must not bind a model to it."""
    write_int8(dino.folder / "base.onnx", dino.folder / "int8.onnx", dino.tiles[::2])
    quantised = onnx.load(dino.folder / "int8.onnx")
    assert sum(node.op_type == "QuantizeLinear" for node in quantised.graph.node) > 50
    others = calibration_tiles(data_dir / "tasks" / "lung" / "val", PX, 0.5, 12)
    for tiles, least, mean in ((dino.tiles[1::2], 0.99, 0.997), (others, 0.98, 0.994)):
        got, expected = run(quantised, tiles)[FEATURES], reference_outputs(dino.model, tiles)[FEATURES]
        similar = cosines(got, expected)
        assert similar.min() >= least
        assert similar.mean() >= mean
        assert (knn_agreement(got, expected) or 0) >= 0.8


def products(scale: float = 1.0, hidden: int = 8) -> onnx.ModelProto:
    """tiles -> a kernel -> times `scale` -> a kernel -> features: the second kernel's operand grows with the scale."""
    rng = np.random.default_rng(0)
    weights = {
        "a": rng.normal(size=(3, hidden)).astype(np.float32),
        "b": rng.normal(size=(hidden, 8)).astype(np.float32),
        "scale": np.float32(scale).reshape(1),
        "axes": np.array([1, 2], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["tiles"], ["float"], "cast", to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float", "axes"], ["mean"], "mean", keepdims=0),
        helper.make_node("MatMul", ["mean", "a"], ["h"], "first"),
        helper.make_node("Mul", ["h", "scale"], ["large"], "times"),
        helper.make_node("MatMul", ["large", "b"], ["wide"], "second"),
        helper.make_node("LayerNormalization", ["wide", "gain"], [FEATURES], "norm"),
    ]
    weights["gain"] = np.ones(8, np.float32)
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["batch", 8, 8, 3])],
        [helper.make_tensor_value_info(FEATURES, TensorProto.FLOAT, ["batch", 8])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def some_tiles() -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), np.uint8)


def test_a_kernel_near_the_end_of_fp16_stays_in_fp32_and_the_others_do_not(tmp_path: Path) -> None:
    tiles = some_tiles()
    for scale, wide in ((1.0, set()), (1e3, {"times", "second"}), (-1e3, {"times", "second"})):
        model = products(scale)
        onnx.save(model, tmp_path / "base.onnx")
        assert near_the_end_of_fp16(model, tiles, tmp_path) == wide
        expected = dict(run(model, tiles))
        typed = write_typed(tmp_path / "base.onnx", "fp16", tmp_path / "fp16.onnx", tiles, expected)
        assert (typed.fp32_kernels, typed.kernels) == (len(wide & {"first", "second"}), 2)
        assert ("2 nodes that come near the end of fp16" in typed.kept) == bool(wide)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_finite_number_does_not_fit_into_fp16(tmp_path: Path, scale: float) -> None:
    assert near_the_end_of_fp16(products(scale), some_tiles(), tmp_path) >= {"times", "second"}


def test_one_large_value_on_one_tile_is_enough(tmp_path: Path) -> None:
    dark = np.zeros((9, 8, 8, 3), np.uint8)  # more than one batch
    for at in (0, 7, 8):
        tiles = dark.copy()
        tiles[at] = 255
        assert near_the_end_of_fp16(products(1e3), tiles, tmp_path) == {"times", "second"}
    assert not near_the_end_of_fp16(products(1e3), dark, tmp_path)


def test_attention_is_found_and_is_what_is_kept_before_kernels(dino: Dino, resnet18_bundle: Path) -> None:
    model = load_light(dino.folder / "base.onnx")
    found = attention(model)
    assert (len(found.scores), len(found.mixes)) == (12, 12)
    kernels = kernel_names(model)
    steps = list(plans(model, kernels))
    assert [said for said, _ in steps[:4]] == [
        "",
        "biases and scales",
        "biases and scales, scores",
        "biases and scales, scores, what they weigh",
    ]
    assert all(before <= after for (_, before), (_, after) in pairwise(steps))
    types = low_types(model, "bf16", steps[3][1])
    assert {types[name] for name in (*found.scores, *found.mixes)} == {"fp32"}
    assert sum(types[name] == "bf16" for name in kernels) == len(kernels) - 24
    convolutional = onnx.load(resnet18_bundle / "model.fp32.onnx")
    assert attention(convolutional).mixes == ()
    assert [said for said, _ in plans(convolutional, kernel_names(convolutional))][:3] == [
        "",
        "the first 1",
        "the first 2",
    ]


class TestTheGate:
    @pytest.mark.parametrize(
        ("autocast", "least"),
        [
            (0.9999999, 0.9999),  # never stricter than it was
            (0.99996, 0.9999),
            (0.9998, 0.99975),  # autocast's distance and a quarter
            (0.99, 0.999),  # and never further than this
        ],
    )
    def test_follows_autocast(self, resnet18_bundle: Path, autocast: float, least: float) -> None:
        manifest = load_bundle(resnet18_bundle).manifest
        measured = replace(manifest, autocast=(Autocast("bf16", autocast, 1.0, 1.0),))
        assert least_cosine(measured, "bf16") == pytest.approx(least, abs=1e-9)
        assert least_cosine(measured, "fp16") == 0.9999
        assert least_cosine(manifest, "bf16") == 0.9999
        assert Manifest.from_json(json.loads(json.dumps(measured.to_json()))) == measured
        assert Replayed(least + 1e-6, 0.0, 0.0).shortfall("bf16", least) == ""
        assert "is required" in Replayed(least - 1e-6, 0.0, 0.0).shortfall("bf16", least)

    def test_below_the_plain_bar_the_neighbours_count(self, resnet18_bundle: Path) -> None:
        manifest = replace(load_bundle(resnet18_bundle).manifest, autocast=(Autocast("bf16", 0.9997, 0.9999, 0.95),))
        for cosine, agreement, passes in (
            (0.99995, 0.2, True),
            (0.99965, 0.91, True),
            (0.99965, 0.89, False),
            (0.9993, 1.0, False),
        ):
            one = Comparison("engine 1", "bf16", Parity("engine 1", 16, cosine, 1.0, 0.1, agreement), None)
            assert judged(one, manifest).passed is passes, (cosine, agreement)
        with pytest.raises(ParityFailure, match=r"0\.9993000, 0\.999625 is required"):
            require(judged(one, manifest))
        shown = table([judged(one, manifest)], manifest.autocast).splitlines()
        assert shown[-1].split() == [
            "torch",
            "autocast",
            "bf16",
            "0.99970000",
            "0.99990000",
            "-",
            "-",
            "95.0%",
            "-",
            "what",
            "it",
            "is",
            "judged",
            "by",
        ]

    def test_a_longer_vector_is_judged_by_the_same_distance(self) -> None:
        wanted = {FEATURES: np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)}
        longer = compare_outputs("engine 1", "bf16", {FEATURES: wanted[FEATURES] * np.float32(1.02)}, wanted)
        assert not longer.passed
        assert replace(longer, least_cosine=0.9997).passed


@pytest.mark.parametrize("passes", [True, False], ids=["it passes", "it is refused"])
def test_weights_that_no_graph_holds_are_judged_from_the_file_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: bool
) -> None:
    """Beyond 2 GB a graph with its weights in it cannot be handed to an engine, nor to ONNX itself."""
    tiles, model = some_tiles(), products(hidden=512)  # kernels of more than 1,024 bytes lie apart
    held: list[int] = []

    def seen(graph: onnx.ModelProto, *given: Any, **named: Any) -> Mapping[str, NDArray[np.float32]]:
        held.append(sum(len(tensor.raw_data) for tensor in graph.graph.initializer if len(tensor.dims) > 1))
        return run(graph, *given, **named)

    monkeypatch.setattr(precision, "save_model", partial(save_model, most_inside=0))
    monkeypatch.setattr(precision, "run", seen)
    save_model(model, None, tmp_path / "base.onnx", most_inside=0)
    expected = dict(run(load_light(tmp_path / "base.onnx"), tiles, folder=tmp_path))
    out = tmp_path / "bundle" / "fp16.onnx"
    out.parent.mkdir()
    if passes:
        write_typed(tmp_path / "base.onnx", "fp16", out, tiles, expected)
        assert sorted(path.name for path in out.parent.iterdir()) == ["fp16.onnx", "fp16.onnx.data"]
    else:
        with pytest.raises(ParityFailure, match="too far from torch"):
            write_typed(tmp_path / "base.onnx", "fp16", out, tiles, {FEATURES: -expected[FEATURES]})
        assert not list(out.parent.iterdir())
    assert held
    assert not any(held)


def test_a_stored_weight_is_widened_just_before_it_is_used() -> None:
    """The nodes run as they stand: all weights widened first would be all of them in fp32 at once."""
    nodes = list(in_fp32(to_low_type(products(), "fp16")).graph.node)
    widened = {node.output[0]: place for place, node in enumerate(nodes) if node.input[0].endswith(".stored")}
    assert len(widened) == 3  # two kernels and the scale
    for name, place in widened.items():
        assert name in nodes[place + 1].input
