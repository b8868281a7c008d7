"""Weights apart from the graph: one file of fixed name, checked, and the same numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mtdp_export import model_store, write
from mtdp_export.fold import constant_nodes, fold_constants
from mtdp_export.model_store import array_of, is_apart, load_light, save_model
from mtdp_export.rounding import in_fp32, run
from mtdp_export.source import open_source
from mtdp_export.verify import verify_bundle
from mtdp_export.write import ExportSettings, write_bundle
from mtdp_runtime.backends import backend_class
from mtdp_runtime.backends.proof import replay
from mtdp_runtime.bundle import file_ref, load_bundle
from mtdp_runtime.bundle.manifest import Manifest
from mtdp_runtime.errors import BundleDigestMismatch, BundleInvalid


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose weights lie apart, as if a file could hold no more than 1 MB; without fp32."""
    out = tmp_path_factory.mktemp("apart") / "b"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "save_model", lambda m, f, p: save_model(m, f, p, 1_000_000))
        patch.setattr("mtdp_export.isolated.isolated", lambda what, function, *a: function(*a))
        patch.setattr(write, "isolated", lambda what, function, *a: function(*a))
        patch.setattr("mtdp_export.precision.save_model", lambda m, f, p: save_model(m, f, p, 1_000_000))
        settings = ExportSettings("apart", 0.5, precisions=("fp32", "fp16", "bf16"))
        write_bundle(open_source("resnet18", "random", 64, True), out, settings)
    return out


def test_every_variant_proves_itself_with_its_weights_apart(apart: Path) -> None:
    names = {file.name for file in apart.iterdir()}
    assert {f"model.{p}.onnx{end}" for p in ("fp32", "fp16", "bf16") for end in ("", ".data")} <= names
    assert max((apart / f"model.{p}.onnx").stat().st_size for p in ("fp32", "fp16", "bf16")) < 300_000
    manifest = load_bundle(apart).manifest
    assert [v.data.file for v in manifest.variants if v.data] == [f"{v.file.file}.data" for v in manifest.variants]
    document = json.loads((apart / "bundle.json").read_text())
    assert Manifest.from_json(document) == manifest
    rows = verify_bundle(apart)
    ran = {(row.backend.split()[0], row.precision) for row in rows if row.passed}
    assert {("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "fp16"), ("as", "bf16")} <= ran
    assert all(row.passed for row in rows if row.required)


def test_a_bundle_without_fp32_runs(tmp_path: Path) -> None:
    settings = ExportSettings("halves", 0.5, precisions=("fp16",))
    bundle, report = write_bundle(open_source("resnet18", "random", 64, True), tmp_path / "b", settings)
    assert not (tmp_path / "b" / "model.fp32.onnx").exists()
    assert all(row.passed for row in report.rows if row.required)
    assert bundle.manifest.reference == "torch"
    for engine in ("onnxruntime", "openvino"):
        with backend_class(engine).load(bundle, "auto", 8, 1) as loaded:
            assert loaded.precision == "fp16"
            assert replay(loaded, bundle).cosine >= 0.9999


def test_weights_behind_a_link_are_read_as_well(apart: Path, tmp_path: Path) -> None:
    """The hub's cache is made of links, and engines refuse weights that a link leads out of the graph's folder to."""
    snapshot, blobs = tmp_path / "snapshots" / "c", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("model.bf16.onnx", "model.bf16.onnx.data"):
        shutil.copy(apart / name, blobs / file_ref(apart, name).sha256)
        (snapshot / name).symlink_to(Path("../../blobs") / file_ref(apart, name).sha256)
    tiles = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    got, wanted = (
        run(in_fp32(load_light(folder / "model.bf16.onnx")), tiles, folder=folder)["features"]
        for folder in (snapshot, apart)
    )
    np.testing.assert_array_equal(got, wanted)
    assert len(list(blobs.iterdir())) == len(list(snapshot.iterdir())) == 2


@pytest.fixture
def copy(apart: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(apart, tmp_path / "copy"))


def _resign(bundle: Path, name: str = "model.fp32.onnx") -> None:
    document = json.loads((bundle / "bundle.json").read_text())
    for variant in document["mtdp"]["variants"]:
        for key in ("file", "data"):
            if variant[key]["file"] == name:
                ref = file_ref(bundle, name)
                variant[key] = {"file": name, "sha256": ref.sha256, "size_bytes": ref.size_bytes}
    (bundle / "bundle.json").write_text(json.dumps(document))


class TestNothingElseIsRead:
    def test_a_changed_or_missing_file_of_weights_is_found(self, copy: Path) -> None:
        data = copy / "model.fp32.onnx.data"
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
        bundle = load_bundle(copy)
        with pytest.raises(BundleDigestMismatch, match=r"model\.fp32\.onnx\.data: sha256"):
            bundle.checked(bundle.variant("fp32").file)
        data.unlink()
        with pytest.raises(BundleDigestMismatch, match="missing from the bundle"):
            bundle.checked(bundle.variant("fp32").file)

    @pytest.mark.parametrize(
        ("key", "value", "said"),
        [
            ("location", "/etc/passwd", "a tensor lies at location '/etc/passwd'"),
            ("location", "../model.fp32.onnx.data", "a tensor lies at location"),
            ("location", "model.fp16.onnx.data", "a tensor lies at location"),
            ("offset", "999999999999", "a tensor ends beyond it"),
            ("length", "-4", "a tensor lies at length '-4'"),
            ("checksum", "0", "a tensor lies at checksum"),
        ],
    )
    def test_a_graph_that_names_another_place_is_refused(self, copy: Path, key: str, value: str, said: str) -> None:
        model = load_light(copy / "model.fp32.onnx")
        tensor = next(tensor for tensor in model.graph.initializer if is_apart(tensor))
        entry = next((e for e in tensor.external_data if e.key == key), None) or tensor.external_data.add(key=key)
        entry.value = value
        (copy / "model.fp32.onnx").write_bytes(model.SerializeToString())
        _resign(copy)
        bundle = load_bundle(copy)
        with pytest.raises(BundleInvalid, match=said):
            bundle.checked(bundle.variant("fp32").file)

    def test_the_file_has_one_name(self, copy: Path) -> None:
        document = json.loads((copy / "bundle.json").read_text())
        document["mtdp"]["variants"][0]["data"]["file"] = "other.onnx.data"
        (copy / "bundle.json").write_text(json.dumps(document))
        with pytest.raises(BundleInvalid, match=r"data: model\.fp32\.onnx\.data, got 'other"):
            load_bundle(copy)

    def test_the_graphs_digest_covers_the_weights(self, apart: Path) -> None:
        """By it engines are kept."""
        for precision in ("fp32", "bf16"):
            model = load_light(apart / f"model.{precision}.onnx")
            stated = {entry.key: entry.value for entry in model.metadata_props}[model_store.DATA_DIGEST]
            assert stated == file_ref(apart, f"model.{precision}.onnx.data").sha256


def graph(*nodes: onnx.NodeProto, **constants: np.ndarray) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(values, name) for name, values in constants.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "m"]) for name in ("x", "y")]
    return helper.make_model(
        helper.make_graph(list(nodes), "g", ends[:1], ends[1:], tensors), opset_imports=[helper.make_opsetid("", 20)]
    )


@pytest.mark.parametrize("most_inside", [10**9, 0], ids=["in one file", "apart"])
def test_what_is_written_is_what_was_given(tmp_path: Path, most_inside: int) -> None:
    rng = np.random.default_rng(0)
    given = {
        "big": rng.normal(size=(40, 50)).astype(np.float32),
        "half": rng.normal(size=(7, 11, 13)).astype(np.float16),
        "shape": np.array([-1, 50], np.int64),
        "none": np.zeros((0, 3), np.float32),
        "one": np.float32(3).reshape(()),
    }
    model = graph(helper.make_node("Add", ["x", "big"], ["y"]), **given)
    helper.set_model_props(model, {"name": "n"})
    model.graph.initializer.append(helper.make_tensor("listed", TensorProto.FLOAT, [2], [1.5, 2.5]))
    data = save_model(model, None, tmp_path / "a.onnx", most_inside)
    again = save_model(model, None, tmp_path / "b.onnx", most_inside)
    assert (data is None) == (again is None) == (most_inside > 0)
    light = load_light(tmp_path / "a.onnx")
    assert [n.op_type for n in light.graph.node] == ["Add"]
    assert {e.key: e.value for e in light.metadata_props}["name"] == "n"
    for tensor in light.graph.initializer:
        wanted = given.get(tensor.name, np.array([1.5, 2.5], np.float32))
        np.testing.assert_array_equal(array_of(tensor, tmp_path), wanted, strict=True)
    onnx.checker.check_model(str(tmp_path / "a.onnx"))
    save_model(light, tmp_path, tmp_path / "c.onnx", 10**9)  # from a file into one
    x = np.ones((40, 50), np.float32)
    for name in ("a.onnx", "c.onnx"):
        session = onnxruntime.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"])
        np.testing.assert_array_equal(session.run(None, {"x": x})[0], x + given["big"])


class TestConstants:
    Build = Callable[..., onnx.ModelProto]

    def test_are_computed_once(self) -> None:
        table = np.random.default_rng(1).normal(size=(1, 4, 6, 6)).astype(np.float32)
        sizes = np.array([1, 4, 9, 9], np.int64)
        resize = helper.make_node(
            "Resize", ["table", "", "", "sizes"], ["resized"], mode="cubic", antialias=1, cubic_coeff_a=-0.5
        )
        flat = helper.make_node("Flatten", ["resized"], ["flat"])
        model = graph(resize, flat, helper.make_node("MatMul", ["x", "flat"], ["y"]), table=table, sizes=sizes)
        x = np.random.default_rng(2).normal(size=(3, 1)).astype(np.float32)
        before = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        wanted = before.run(None, {"x": x})[0]
        assert [node.op_type for node in constant_nodes(model)] == ["Resize", "Flatten"]
        assert fold_constants(model) == 2
        assert [node.op_type for node in model.graph.node] == ["MatMul"]
        assert [tensor.name for tensor in model.graph.initializer] == ["flat"]
        after = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        np.testing.assert_array_equal(after.run(None, {"x": x})[0], wanted)

    def test_chance_and_stored_halves_are_left(self) -> None:
        noise = helper.make_node("RandomNormalLike", ["half"], ["noise"], dtype=1)
        widen = helper.make_node("Cast", ["half"], ["wide"], to=TensorProto.FLOAT)
        both = helper.make_node("Add", ["noise", "wide"], ["sum"])
        model = graph(noise, widen, both, helper.make_node("Add", ["x", "sum"], ["y"]), half=np.ones(3, np.float16))
        assert fold_constants(model) == 0
        assert len(model.graph.node) == 4
