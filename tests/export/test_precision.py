"""Variants: strongly typed, fp32 where a measurement says so, proven on every engine here, or not written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from isolated_work import raise_held, raise_picky, refuse
from mtdp.errors import MtdpError, TaskError
from mtdp_export import variants, verify
from mtdp_export.cli import main
from mtdp_export.errors import ExportError, ExportUsageError, ParityFailure
from mtdp_export.golden import synthetic_tiles
from mtdp_export.graph import _store_as_fp16
from mtdp_export.int8 import Probe as ProbeScore
from mtdp_export.int8 import Speed, _features, time_int8, write_int8
from mtdp_export.isolated import isolated
from mtdp_export.parity import Comparison, knn_agreement, table
from mtdp_export.precision import write_typed
from mtdp_export.rounding import in_fp32, run
from mtdp_export.source import Source
from mtdp_export.typed import KERNELS, kernel_names, low_types, name_nodes, round_to_bf16, to_low_type
from mtdp_export.verify import verify_bundle
from mtdp_export.write import ExportSettings, _calibration, golden_tiles, write_bundle
from mtdp_runtime.backends import Probe, backend_class
from mtdp_runtime.backends.onnxruntime import OnnxRuntime
from mtdp_runtime.backends.proof import replay
from mtdp_runtime.bundle import load_bundle
from mtdp_runtime.bundle.golden import FEATURES, load_golden
from mtdp_runtime.bundle.manifest import Manifest
from mtdp_runtime.bundle.tolerance import cosines
from mtdp_runtime.errors import BackendError, UsageError
from support import in_this_process, write_tiny_bundle

PX = 32
LOW = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def export(*arguments: object, shadow: Path) -> subprocess.CompletedProcess[str]:
    """Run mtdp-export in a process of its own; modules in `shadow` stand before the installed ones."""
    command = [sys.executable, "-c", "from mtdp_export.cli import main; main()", *map(str, arguments)]
    path = os.pathsep.join([str(shadow), *sys.path])
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})


@pytest.fixture(scope="module")
def typed_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, tiles of 64 px, three precisions."""
    out = tmp_path_factory.mktemp("typed") / "r18"
    precisions = ["--precision", "fp32", "--precision", "fp16", "--precision", "bf16"]
    options = ["--weights", "random", "--tile-px", 64, *precisions, "--out", out]
    code, shown, errors = in_this_process(main, "resnet18", *options)
    assert code == 0, errors
    rows = [line for line in shown.splitlines() if line.endswith("pass")]
    assert sum(" fp16 " in row for row in rows) == 3, shown
    return out


def cancelling(kernels: int) -> onnx.ModelProto:
    """A network whose first kernel subtracts nearly equal channels: what it is given must not be rounded."""
    rng = np.random.default_rng(0)
    first = np.zeros((4, 3, 1, 1), np.float32)
    first[:, 0, 0, 0], first[:, 1, 0, 0] = 40 * np.arange(1, 5), -40 * np.arange(1, 5)
    first[:, 2, 0, 0] = (2.0, -2.0, 1.0, 0.0)  # so that an error of the difference turns the features
    nodes = [
        helper.make_node("Cast", ["tiles"], ["float"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["nchw"], "transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Mul", ["nchw", "scale"], ["x0"], "normalise"),
    ]
    weights = [numpy_helper.from_array(np.float32(1 / 300), "scale")]
    for i in range(kernels):
        weight = first if i == 0 else rng.normal(0, 0.5, (4, 4, 1, 1)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"conv.{i}.weight"))
        nodes.append(helper.make_node("Conv", [f"x{i}", f"conv.{i}.weight"], [f"x{i + 1}"], f"conv{i}"))
    nodes += [
        helper.make_node("GlobalAveragePool", [f"x{kernels}"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], [FEATURES], "flatten"),
    ]
    graph = helper.make_graph(
        nodes,
        "cancelling",
        [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["batch", PX, PX, 3])],
        [helper.make_tensor_value_info(FEATURES, TensorProto.FLOAT, ["batch", 4])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def nearly_grey(count: int = 6) -> NDArray[np.uint8]:
    """Tiles of one colour each: red, and green one level below."""
    tiles = np.empty((count, PX, PX, 3), np.uint8)
    tiles[..., 0] = np.linspace(120, 240, count)[:, None, None]
    tiles[..., 1] = tiles[..., 0] - 1 - 2 * (np.arange(count)[:, None, None] % 3)
    tiles[..., 2] = 100
    tiles[:, ::2, :, 1] -= 1
    return tiles


class TestTypedGraph:
    @pytest.mark.parametrize("low", ["fp16", "bf16"])
    def test_kernels_are_low_and_the_ends_are_not(self, resnet18_bundle: Path, low: str) -> None:
        model = onnx.load(resnet18_bundle / "model.fp32.onnx")
        typed = to_low_type(model, low)
        graph = onnx.shape_inference.infer_shapes(typed, strict_mode=True).graph
        types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
        types |= {t.name: t.data_type for t in graph.initializer}
        assert (types["tiles"], types[FEATURES]) == (TensorProto.UINT8, TensorProto.FLOAT)
        for node in graph.node:
            floats = {types[name] for name in node.input if types.get(name) in (1, *LOW.values())}
            assert len(floats) <= 1, f"{node.name} mixes types: TensorRT refuses it"
            if node.op_type in KERNELS:
                assert floats == {LOW[low]}
            if node.op_type == "ReduceMean":
                assert floats == {TensorProto.FLOAT}
        assert graph.node[0].op_type == "Cast"
        assert len(typed.SerializeToString()) < 0.51 * len(model.SerializeToString())

    def test_norm_and_softmax_of_a_transformer_stay_in_fp32(self) -> None:
        nodes = [
            helper.make_node("MatMul", ["tokens", "w"], ["q"], "q"),
            helper.make_node("MatMul", ["q", "k"], ["scores"], "scores"),
            helper.make_node("Softmax", ["scores"], ["weights"], "softmax"),
            helper.make_node("MatMul", ["weights", "v"], ["mixed"], "mix"),
            helper.make_node("Add", ["mixed", "q"], ["sum"], "residual"),
            helper.make_node("LayerNormalization", ["sum", "g"], ["normed"], "norm"),
            helper.make_node("MatMul", ["normed", "w"], [FEATURES], "last"),
            helper.make_node("MatMul", [FEATURES, "w"], ["logits"], "head"),
            helper.make_node("Softmax", ["logits"], ["probabilities_a"], "classes"),
        ]
        square = numpy_helper.from_array(np.eye(8, dtype=np.float32))
        weights = [TensorProto.FromString(square.SerializeToString()) for _ in "wkv"]
        for tensor, name in zip(weights, "wkv", strict=True):
            tensor.name = name
        weights.append(numpy_helper.from_array(np.ones(8, np.float32), "g"))
        ends = [helper.make_tensor_value_info(n, 1, [8, 8]) for n in ("tokens", FEATURES, "probabilities_a")]
        model = helper.make_model(
            helper.make_graph(nodes, "t", ends[:1], ends[1:], weights), opset_imports=[helper.make_opsetid("", 20)]
        )
        types = low_types(model, "fp16", ())
        assert {name for name, kind in types.items() if kind == "fp16"} == {"q", "scores", "mix", "residual", "last"}
        to_low_type(model, "fp16")  # a valid graph

    def test_types_are_not_kept_for_nodes_that_share_a_name(self) -> None:
        model = cancelling(2)
        for node in model.graph.node:
            node.name = ""
        with pytest.raises(AssertionError, match="without names"):
            low_types(model, "fp16", ())
        name_nodes(model)
        assert len(kernel_names(model)) == 2
        model.graph.node[1].name = model.graph.node[0].name = "2:Mul"
        name_nodes(model)
        assert len({node.name for node in model.graph.node}) == len(model.graph.node)

    def test_a_graph_with_weights_stored_in_fp16_is_typed_like_another(self) -> None:
        plain = cancelling(2)
        for tensor in plain.graph.initializer:
            rounded = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
        stored = onnx.ModelProto()
        stored.CopyFrom(plain)
        _store_as_fp16(stored)
        name_nodes(stored)
        tiles = nearly_grey()
        wanted, got = (run(in_fp32(to_low_type(model, "fp16")), tiles)[FEATURES] for model in (plain, stored))
        np.testing.assert_allclose(got, wanted, rtol=1e-2, atol=1e-2)

    def test_a_weight_that_fp16_cannot_hold_is_an_error(self) -> None:
        model = cancelling(2)
        model.graph.initializer[1].CopyFrom(
            numpy_helper.from_array(np.full((4, 3, 1, 1), 1e5, np.float32), "conv.0.weight")
        )
        with pytest.raises(ExportError, match=r"conv\.0\.weight holds 1e\+05, fp16 ends at 65504"):
            to_low_type(model, "fp16")
        to_low_type(model, "bf16")

    @given(st.lists(st.floats(width=32), min_size=1, max_size=20))
    def test_bf16_is_rounded_as_torch_rounds(self, values: list[float]) -> None:
        array = np.array(values, np.float32)
        np.testing.assert_array_equal(round_to_bf16(array), torch.from_numpy(array).bfloat16().float().numpy())

    @pytest.mark.parametrize(("low", "largest"), [("fp16", 2e-6), ("bf16", 1e-4)])
    def test_its_roundings_are_those_of_the_type(self, resnet18_bundle: Path, low: str, largest: float) -> None:
        model = onnx.load(resnet18_bundle / "model.fp32.onnx")
        tiles = synthetic_tiles(64)[:4]
        exact = run(model, tiles)[FEATURES]
        rounded = run(in_fp32(to_low_type(model, low)), tiles)[FEATURES]
        assert 0 < 1 - cosines(rounded, exact).min() < largest
        every = kernel_names(model)
        np.testing.assert_array_equal(run(in_fp32(to_low_type(model, low, every)), tiles)[FEATURES], exact)


class TestWhatStaysInFp32:
    def test_as_few_first_kernels_as_it_takes(self, tmp_path: Path) -> None:
        onnx.save(cancelling(6), tmp_path / "fp32.onnx")
        tiles = nearly_grey()
        expected = run(cancelling(6), tiles)
        made = write_typed(tmp_path / "fp32.onnx", "bf16", tmp_path / "bf16.onnx", tiles, expected)
        assert (made.fp32_kernels, made.kernels) == (1, 6)
        typed = onnx.load(tmp_path / "bf16.onnx")
        assert cosines(run(in_fp32(typed), tiles)[FEATURES], expected[FEATURES]).min() == made.cosine_min >= 0.99995

    def test_where_that_is_half_of_them_it_is_refused_and_the_layer_named(self, tmp_path: Path) -> None:
        onnx.save(cancelling(1), tmp_path / "fp32.onnx")
        tiles = nearly_grey()
        with pytest.raises(ParityFailure, match=r"bf16: too far .* leaves the path is Conv conv0 \(conv\.0\.weight"):
            write_typed(tmp_path / "fp32.onnx", "bf16", tmp_path / "bf16.onnx", tiles, run(cancelling(1), tiles))
        assert not (tmp_path / "bf16.onnx").exists()

    def test_a_graph_with_nothing_to_type_is_refused(self, tmp_path: Path) -> None:
        model = cancelling(0)
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 3
        onnx.save(model, tmp_path / "fp32.onnx")
        with pytest.raises(ExportError, match="--precision fp16: no convolution and no matrix product"):
            write_typed(tmp_path / "fp32.onnx", "fp16", tmp_path / "fp16.onnx", nearly_grey(), {})


class TestBundle:
    def test_it_holds_every_variant_and_its_proof(self, typed_bundle: Path) -> None:
        document = json.loads((typed_bundle / "bundle.json").read_text())
        manifest = load_bundle(typed_bundle).manifest
        assert [v.precision for v in manifest.variants] == ["fp32", "fp16", "bf16"]
        assert manifest.variants[2].parity.backend.startswith("as typed")
        assert {p.backend.split()[0] for p in manifest.variants[1].engines} == {"openvino", "onnxruntime"}
        assert all(0.9 <= (p.knn_agreement or 0) <= 1 for v in manifest.variants for p in v.engines)
        assert Manifest.from_json(document) == manifest

    def test_it_verifies_and_says_what_cannot_run(self, typed_bundle: Path) -> None:
        code, shown, errors = in_this_process(main, "--verify", typed_bundle)
        assert code == 0, shown + errors
        lines = [" ".join(line.split()) for line in shown.splitlines()]
        assert "onnxruntime bf16 not run: this engine runs fp32, fp16, int8 here" in lines

    def test_a_bundle_without_the_later_keys_is_read(self, typed_bundle: Path) -> None:
        document = json.loads((typed_bundle / "bundle.json").read_text())
        for variant in document["mtdp"]["variants"]:
            del variant["engines"], variant["fp32_kernels"]
            for key in ("knn_agreement", "probe_score", "probe_score_fp32"):
                del variant["parity"][key]
        variant = Manifest.from_json(document).variants[0]
        assert (variant.engines, variant.fp32_kernels, variant.parity.knn_agreement) == ((), 0, None)

    @pytest.mark.parametrize(("engine", "precision"), [("openvino", "fp16"), ("onnxruntime", "fp16")])
    def test_the_runtime_takes_the_variant_that_is_asked_for(
        self, typed_bundle: Path, resnet18_bundle: Path, engine: str, precision: str
    ) -> None:
        bundle = load_bundle(typed_bundle)
        with backend_class(engine).load(bundle, precision, 8, 1) as loaded:
            assert loaded.precision == precision
            assert 0.9999 <= replay(loaded, bundle).cosine < 1
        with backend_class(engine).load(bundle, "auto", 8, 1) as loaded:
            assert loaded.precision in ("fp32", "bf16")
        with pytest.raises(UsageError, match="no fp16 variant in this bundle"):
            backend_class(engine).load(load_bundle(resnet18_bundle), precision, 8, 1)
        with pytest.raises(UsageError, match="no int8 variant in this bundle"):
            backend_class(engine).load(bundle, "int8", 8, 1)

    def test_neighbours(self) -> None:
        rows = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
        assert knn_agreement(rows, 3 * rows) == 1
        assert knn_agreement(rows[::-1], rows) < 0.9  # type: ignore[operator]
        assert knn_agreement(rows[:2], rows[:2]) is None


class Refusing(OnnxRuntime):
    """An engine that seems usable and then takes nothing."""

    @classmethod
    def probe(cls) -> Probe:
        return Probe("refusing", True, "", precisions=("fp32", "fp16", "bf16", "int8"))

    @classmethod
    def load(cls, *arguments: Any) -> Any:
        raise BackendError("its GPU is in a broken state")


class WithoutInt8(Refusing):
    """As a GPU's engines are: not to be timed against."""

    @classmethod
    def probe(cls) -> Probe:
        return Probe("gpu", True, "", precisions=("fp16", "fp32"))

    @classmethod
    def load(cls, *arguments: Any) -> Any:
        raise AssertionError("int8 was timed against an engine that does not run it")


class TestAnEngineThatRefuses:
    @pytest.fixture(params=["beside", "alone"])
    def names(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        classes: dict[str, type[OnnxRuntime]] = {"refusing": Refusing}
        if request.param == "beside":
            classes["onnxruntime"] = OnnxRuntime
        monkeypatch.setattr(verify, "probe_all", lambda: [one.probe() for one in classes.values()])
        monkeypatch.setattr(verify, "backend_class", classes.__getitem__)
        return list(classes)

    def test_is_a_row_that_fails_and_the_others_are_seen(self, typed_bundle: Path, names: list[str]) -> None:
        rows = verify.replay(typed_bundle, ())
        refused = [row for row in rows if row.backend == "refusing"]
        assert [row.precision for row in refused] == ["fp32", "fp16", "bf16"]
        assert all(row.required and not row.passed for row in refused)
        assert "refusing  fp32       not run: its GPU is in a broken state" in table(refused)
        assert ("onnxruntime" in names) == any(isinstance(row, Comparison) for row in rows)

    def test_does_not_decide_an_export(self, typed_bundle: Path, names: list[str]) -> None:
        if "onnxruntime" not in names:
            with pytest.raises(ExportError, match=r"fp32: no engine here runs it \(refusing: its GPU is in a broken"):
                variants.prove(typed_bundle, None)
            return
        assert variants.prove(typed_bundle, None).parities.keys() == {"fp32", "fp16", "bf16"}

    def test_a_note_of_an_engine_is_under_the_table(self, typed_bundle: Path, names: list[str]) -> None:
        """Such as that the bundle's own engine does not fit and another was built."""
        if "onnxruntime" not in names:
            pytest.skip("there is no other row")
        rows = verify.replay(typed_bundle, ())
        (row,) = [row for row in rows if row.backend.startswith("onnxruntime") and row.precision == "fp16"]
        assert table(rows).splitlines()[-1] == f"{row.backend} fp16: {asdict(row)['note']}"
        assert asdict(row)["note"].startswith("ONNX Runtime's CPU provider computes")


class TestInt8:
    def test_it_is_quantised_and_near(self, tmp_path: Path, resnet18_bundle: Path) -> None:
        tiles, expected = load_golden(resnet18_bundle / "golden.npz")
        write_int8(resnet18_bundle / "model.fp32.onnx", tmp_path / "int8.onnx", tiles[:8])
        model = onnx.load(tmp_path / "int8.onnx")
        assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) > 10
        assert [n.op_type for n in model.graph.node if "tiles" in n.input] == ["Cast"]
        assert str(tmp_path).encode() not in model.SerializeToString()
        base = onnx.load(resnet18_bundle / "model.fp32.onnx")
        kinds = [Counter(n.op_type for n in m.graph.node if "Linear" not in n.op_type) for m in (model, base)]
        assert kinds[0] == kinds[1], "what smooths a transformer's channels has no place in a convolutional network"
        assert cosines(run(model, tiles)[FEATURES], expected[FEATURES]).min() >= 0.99

    @pytest.mark.parametrize(
        ("times", "score", "message"),
        [(0.9, 0.8, "it is not the fastest here"), (2.0, 0.794, "0.005 less is allowed"), (2.0, 0.796, None)],
    )
    def test_it_ships_only_where_faster_and_as_good(
        self, monkeypatch: pytest.MonkeyPatch, times: float, score: float, message: str | None
    ) -> None:
        # The figures are given: a clock or a task of our own would make the rule's test a test of this machine.
        speed = Speed("openvino", 0.1, "fp32 on openvino", 0.1 * times, times)
        monkeypatch.setattr(variants, "time_int8", lambda _: speed)
        monkeypatch.setattr(variants, "probe_int8", lambda *_: ProbeScore("lung", "accuracy", 500, score, 0.8))
        notes: list[str] = []
        if message is None:
            assert variants._judge_int8(Path(), Path(), notes).int8 == score
            assert len(notes) == 2
            return
        with pytest.raises(ExportError, match=message):
            variants._judge_int8(Path(), Path(), notes)

    def test_an_engine_that_refuses_is_not_timed(self, typed_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        classes = {"onnxruntime": OnnxRuntime, "refusing": Refusing, "gpu": WithoutInt8}
        monkeypatch.setattr("mtdp_export.int8.probe_all", lambda: [one.probe() for one in classes.values()])
        monkeypatch.setattr("mtdp_export.int8.backend_class", classes.__getitem__)
        with pytest.raises(ExportError, match="no engine here runs it"):  # there is no int8 in this bundle
            time_int8(typed_bundle)

    def test_it_needs_tissue_and_a_task(self, tmp_path: Path) -> None:
        options = ["--weights", "random", "--precision", "int8", "--out", tmp_path / "b"]
        code, _, errors = in_this_process(main, "resnet18", *options)
        assert (code, "--precision int8 needs tissue" in errors) == (2, True)

    def test_a_task_without_a_test_split_is_refused_before_any_work(self, tmp_path: Path) -> None:
        task = tmp_path / "task"
        for folder in ("train/benign", "train/malignant", "val/benign", "val/malignant"):
            (task / folder).mkdir(parents=True)
            cv2.imwrite(str(task / folder / f"{folder.replace('/', '-')}.png"), np.full((8, 8, 3), 99, np.uint8))
        settings = ExportSettings("m", 0.5, calibration=tmp_path, precisions=("fp32", "int8"), probe_task=task)
        with pytest.raises(TaskError, match="task has no test split"):
            write_bundle(cast(Source, None), tmp_path / "b", settings)  # it has not looked at the network yet
        with pytest.raises(MtdpError, match="no task at"):
            write_bundle(cast(Source, None), tmp_path / "b", replace(settings, probe_task=tmp_path / "none"))

    def test_the_golden_tiles_do_not_calibrate(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        for i in range(33):
            cv2.imwrite(str(tmp_path / f"{i:02}.png"), rng.integers(0, 256, (PX, PX, 3), np.uint8))
        settings = ExportSettings("m", 0.5, calibration=tmp_path)
        golden = golden_tiles(settings, PX)
        calibration = _calibration(settings, golden)
        assert (len(golden), len(calibration)) == (32, 1)
        assert calibration[0].tobytes() not in {tile.tobytes() for tile in golden}
        (tmp_path / "00.png").unlink()
        with pytest.raises(ExportUsageError, match="32 tiles are too few for int8"):
            _calibration(settings, golden_tiles(settings, PX))

    def test_it_is_judged_on_images_that_are_resized_as_in_training(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bundle = load_bundle(write_tiny_bundle(tmp_path / "tiny"))
        bundle = replace(bundle, manifest=replace(bundle.manifest, interpolation="bicubic"))
        made: list[tuple[object, ...]] = []
        monkeypatch.setattr("mtdp.images.ImageCache", lambda *arguments: made.append(arguments))
        assert _features(bundle, "onnxruntime", "fp32", []).shape == (0, 12)
        assert made == [(64, 0, "bicubic")]

    def test_without_nncf_it_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setitem(sys.modules, "nncf", None)
        with pytest.raises(ExportError, match="NNCF is not installed") as caught:
            write_int8(tmp_path / "model.onnx", tmp_path / "int8.onnx", nearly_grey())
        assert caught.value.hint == "pip install 'mtdp[export]'"


class TestACrash:
    def test_of_a_process_of_its_own_is_an_error(self) -> None:
        with pytest.raises(ExportError, match="the work crashed: killed by SIGABRT"):
            isolated("the work", os.abort)
        with pytest.raises(ExportError, match="exit code 3 and no answer"):
            isolated("the work", os._exit, 3)

    def test_by_the_systems_hand_speaks_of_memory(self) -> None:
        with pytest.raises(ExportError, match="the work crashed: killed by SIGKILL") as caught:
            isolated("the work", signal.raise_signal, signal.SIGKILL)
        assert "memory runs out" in (caught.value.hint or "")

    def test_results_and_errors_come_through(self) -> None:
        assert isolated("the work", divmod, 7, 2) == (3, 1)
        with pytest.raises(ExportUsageError, match="wrong") as caught:
            isolated("the work", refuse, "wrong", "so do it right")
        assert caught.value.hint == "so do it right"

    @pytest.mark.parametrize("fails", [raise_picky, raise_held])
    def test_an_error_that_cannot_be_sent_is_said_all_the_same(self, fails: Callable[[], None]) -> None:
        with pytest.raises(ExportError, match=r"Picky: it wants two|Held: it keeps a lock"):
            isolated("the work", fails)

    def test_of_an_engine_is_one_line(self, resnet18_bundle: Path, tmp_path: Path) -> None:
        (tmp_path / "openvino.py").write_text("import os\nos.abort()\n")
        result = export("--verify", resnet18_bundle, shadow=tmp_path)
        assert result.returncode == 1
        assert f"error: the parity check of {resnet18_bundle} crashed: killed by SIGABRT" in result.stderr
        assert "Traceback" not in result.stderr


def test_an_engine_that_leaves_the_path_fails(resnet18_bundle: Path) -> None:
    rows = verify_bundle(resnet18_bundle, ["onnxruntime"])
    assert [(row.precision, row.passed) for row in rows] == [("fp32", True)]
