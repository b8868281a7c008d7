"""Engines built ahead of time by the real parser and builder of TensorRT-RTX, which need no GPU."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from isolated_work import abort
from mtdp_export import engines
from mtdp_export.cli import main
from mtdp_export.engines import EngineSettings, build_engines
from mtdp_export.errors import ExportError, ExportUsageError
from mtdp_export.source import open_source
from mtdp_export.verify import engines_not_run, verify_bundle
from mtdp_export.write import ExportSettings, write_bundle
from mtdp_runtime.backends import backend_class
from mtdp_runtime.backends.tensorrt.build import BuildOptions, build_engine
from mtdp_runtime.backends.tensorrt.library import LIBRARY
from mtdp_runtime.bundle import Bundle, default_bundle_path, load_bundle, write_manifest
from mtdp_runtime.bundle.engine_key import EngineKey, Wanted, misfit
from mtdp_runtime.errors import BackendError, BackendUnavailable, BundleDigestMismatch
from support import in_this_process

pytest.importorskip("tensorrt_rtx")

RTX = "tensorrt-rtx"
BATCH = (1, 4, 8)
SIDE = 32


@pytest.fixture(scope="module")
def bundle_with_engine(resnet18_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("engines") / "r18"
    shutil.copytree(resnet18_bundle, folder)
    manifest = load_bundle(folder).manifest
    settings = EngineSettings((RTX,), BATCH)
    settings.check()
    write_manifest(folder, replace(manifest, engines=build_engines(folder, manifest, settings)))
    return load_bundle(folder)


def typed_graph(
    path: Path,
    element: int = TensorProto.FLOAT,
    batch: str | int = "batch",
    name: str = "tiles",
    gemm: bool = False,
    op: str = "Relu",
    channels: int = 256,
) -> Path:
    """Write tiles uint8 -> Cast to `element` -> two convolutions -> mean in fp32 -> features [-> a fp32 product]."""
    rng = np.random.default_rng(0)

    def weight(label: str, shape: tuple[int, ...]) -> onnx.TensorProto:
        values = numpy_helper.from_array(rng.normal(0, 0.02, shape).astype(np.float32), label)
        if element == TensorProto.FLOAT:
            return values
        kind = helper.tensor_dtype_to_np_dtype(element)
        return numpy_helper.from_array(numpy_helper.to_array(values).astype(kind), label)

    nodes = [
        helper.make_node("Cast", [name], ["x"], to=element),
        helper.make_node("Transpose", ["x"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["nchw", "w1"], ["c1"], strides=[8, 8]),
        helper.make_node(op, ["c1"], ["r1"], name="the_activation"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"]),
        helper.make_node("Cast", ["c2"], ["c2_fp32"], to=TensorProto.FLOAT),
        helper.make_node("GlobalAveragePool", ["c2_fp32"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat" if gemm else "features"]),
    ]
    weights = [weight("w1", (channels, 3, 8, 8)), weight("w2", (channels, channels, 3, 3))]
    if gemm:
        nodes.append(helper.make_node("Gemm", ["flat", "w3"], ["features"]))
        weights.append(numpy_helper.from_array(rng.normal(size=(channels, channels)).astype(np.float32), "w3"))
    graph = helper.make_graph(
        nodes,
        "typed",
        [helper.make_tensor_value_info(name, TensorProto.UINT8, [batch, SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [batch, channels])],
        weights,
    )
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    return path


class TestInABundle:
    def test_engine_key_and_log_lie_side_by_side(self, bundle_with_engine: Bundle) -> None:
        (engine,) = bundle_with_engine.manifest.engines
        folder = bundle_with_engine.path / "engines"
        stem = Path(engine.file.file).stem
        assert sorted(path.name for path in folder.iterdir()) == [f"{stem}.{s}" for s in ("engine", "json", "log")]
        assert EngineKey.from_json(json.loads((folder / f"{stem}.json").read_text())) == engine.key
        assert "Engine generation completed" in (folder / f"{stem}.log").read_text()
        assert bundle_with_engine.checked(engine.file).stat().st_size > 40e6  # the weights are inside

    def test_the_key_says_what_it_was_built_for(self, bundle_with_engine: Bundle) -> None:
        (engine,) = bundle_with_engine.manifest.engines
        variant = bundle_with_engine.variant("fp32")
        version = LIBRARY[RTX].version
        assert engine.key == EngineKey(RTX, version, variant.file.sha256, "fp32", 64, BATCH, ("8.0+",))
        here = Wanted(RTX, version, variant.file.sha256, "fp32", 64, 8, "RTX 4090", "8.9")
        assert misfit(engine.key, here) == ""
        assert "compute capability" in misfit(engine.key, replace(here, capability="7.5"))

    def test_verify_checks_its_digest_and_says_that_it_was_not_run(
        self, bundle_with_engine: Bundle, tmp_path: Path
    ) -> None:
        (engine,) = bundle_with_engine.manifest.engines
        probe = backend_class(RTX).probe()
        if not probe.usable:
            assert engines_not_run(replace(bundle_with_engine, trust_engines=True)) == {engine.file.file: probe.reason}
        copy = tmp_path / "copy"
        shutil.copytree(bundle_with_engine.path, copy)
        content = bytearray((copy / engine.file.file).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / engine.file.file).write_bytes(content)
        with pytest.raises(BundleDigestMismatch, match=r"\.engine: sha256"):
            verify_bundle(copy)

    def test_the_packaged_models_fp16_weights_with_casts_are_taken(self) -> None:
        bundle = load_bundle(default_bundle_path())
        path = bundle.checked(bundle.variant("fp32").file)
        built = build_engine(RTX, path, bundle.manifest.tile_px, BuildOptions(BATCH))
        assert 27e6 < len(built.engine) < 60e6  # DenseNet-121: 7 million weights

    def test_the_command(self, tmp_path: Path) -> None:
        out = tmp_path / "b"
        options = "resnet18 --weights random --tile-px 64 --engine tensorrt-rtx --batch 1 2 4 --compute-capability 8.9"
        code, shown, errors = in_this_process(main, *options.split(), "--out", out)
        assert code == 0, errors
        (engine,) = load_bundle(out).manifest.engines
        assert engine.file.file in shown
        assert (engine.key.batch, engine.key.capabilities) == ((1, 2, 4), ("8.9",))


class TestBuilder:
    @pytest.mark.parametrize("element", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16])
    def test_precision_is_the_graphs_own(self, tmp_path: Path, element: int) -> None:
        built = build_engine(RTX, typed_graph(tmp_path / "m.onnx", element), SIDE, BuildOptions(BATCH))
        weights_bytes = 256 * (3 * 64 + 256 * 9) * (4 if element == TensorProto.FLOAT else 2)
        assert weights_bytes < len(built.engine) < 1.3 * weights_bytes

    def test_turing_has_no_fp32_product_and_that_is_said(self, tmp_path: Path) -> None:
        path = typed_graph(tmp_path / "m.onnx", gemm=True)
        with pytest.raises(BackendError, match=r"cannot build .*FP32 GEMM is not supported") as caught:
            build_engine(RTX, path, SIDE, BuildOptions(BATCH, capabilities=("7.5",)))
        assert "7.5" in caught.value.hint

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"batch": 2}, "its batch is fixed to 2, batches of 1 to 8 are wanted"),
            ({"name": "pixels"}, r"its input is pixels \(-1, 32, 32, 3\) UINT8; tiles uint8\[batch, 32, 32, 3\]"),
            ({"op": "NoSuchOp"}, r"cannot read .*: node the_activation \(NoSuchOp\)"),
        ],
    )
    def test_a_graph_that_is_not_ours_is_refused(self, tmp_path: Path, change: dict[str, str], message: str) -> None:
        path = typed_graph(tmp_path / "m.onnx", **change)  # type: ignore[arg-type]
        with pytest.raises(BackendError, match=message):
            build_engine(RTX, path, SIDE, BuildOptions(BATCH))

    def test_a_fixed_batch_is_fine_where_it_is_the_one_wanted(self, tmp_path: Path) -> None:
        path = typed_graph(tmp_path / "m.onnx", batch=2)
        assert build_engine(RTX, path, SIDE, BuildOptions((2, 2, 2))).engine

    def test_a_file_that_is_no_model(self, tmp_path: Path) -> None:
        (tmp_path / "m.onnx").write_bytes(b"not a model")
        with pytest.raises(BackendError, match=r"cannot read .*Failed to parse the ONNX model"):
            build_engine(RTX, tmp_path / "m.onnx", SIDE, BuildOptions(BATCH))

    def test_a_variant_that_cannot_be_built_is_named(self, resnet18_bundle: Path, tmp_path: Path) -> None:
        folder = tmp_path / "b"
        shutil.copytree(resnet18_bundle, folder)
        (folder / "model.fp32.onnx").write_bytes(b"not a model")
        with pytest.raises(ExportError, match="no tensorrt-rtx engine of the fp32 variant"):
            build_engines(folder, load_bundle(folder).manifest, EngineSettings((RTX,), BATCH))


@pytest.mark.parametrize(
    ("name", "tile_px", "low"), [("resnet18", 64, ("fp16",)), ("timm:test_vit", None, ("fp16", "bf16"))]
)
def test_typed_networks_of_both_kinds_are_compiled(
    tmp_path: Path, name: str, tile_px: int | None, low: tuple[str, ...]
) -> None:
    """A transformer mixes types at each norm and softmax, and a strongly typed network takes no mixed operands."""
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    settings = ExportSettings(
        "m", 0.5, precisions=("fp32", *low), engines=EngineSettings((RTX,), BATCH, capabilities=("8.9",))
    )
    bundle, report = write_bundle(open_source(name, "random", tile_px, False), tmp_path / "b", settings)
    assert not report.refused
    assert [engine.key.precision for engine in bundle.manifest.engines] == ["fp32", *low]
    sizes = {engine.key.precision: engine.file.size_bytes for engine in bundle.manifest.engines}
    for precision in low:
        (note,) = [note for note in report.notes if note.startswith(f"{precision}: ") and "kernels" in note]
        assert not note.startswith(f"{precision}: 0 ")
        assert sizes[precision] < sizes["fp32"]


class TestACrash:
    """Of a builder, or of its library's import: a line, not the end of the process."""

    def test_of_the_builder(self, resnet18_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = tmp_path / "b"
        shutil.copytree(resnet18_bundle, folder)
        monkeypatch.setattr(engines, "build_engine", abort)
        with pytest.raises(ExportError, match="building the tensorrt-rtx engine of the fp32 variant crashed: killed"):
            build_engines(folder, load_bundle(folder).manifest, EngineSettings((RTX,), BATCH))

    def test_of_the_import(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engines, "require_library", abort)
        with pytest.raises(ExportError, match="loading tensorrt-rtx crashed: killed by SIGABRT"):
            EngineSettings((RTX,), BATCH).check()


def test_int8_gets_no_engine(resnet18_bundle: Path, tmp_path: Path) -> None:
    manifest = load_bundle(resnet18_bundle).manifest
    int8 = replace(manifest, variants=(replace(manifest.variants[0], precision="int8"),))
    said: list[str] = []
    assert build_engines(tmp_path, int8, EngineSettings((RTX,), BATCH), said.append) == ()
    assert said == ["no tensorrt-rtx engine of the int8 variant: it is one for CPUs"]


class TestWrongUsage:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (EngineSettings(("trt",)), "--engine trt: unknown"),
            (EngineSettings((RTX,), (8, 4, 2)), "--batch 8 4 2"),
            (EngineSettings((RTX,), (0, 4, 8)), "--batch 0 4 8"),
            (EngineSettings((RTX,), capabilities=("9.9",)), "--compute-capability 9.9: tensorrt-rtx .* does not build"),
            (EngineSettings(capabilities=("8.9",)), "--compute-capability is an option of --engine tensorrt-rtx"),
            (EngineSettings((RTX,), hardware="ampere-plus"), "is an option of --engine tensorrt"),
            (EngineSettings((RTX,), hardware="any"), "--hardware-compatibility any: unknown"),
            (EngineSettings((RTX,), version_compatible=True), "--version-compatible is an option of --engine tensorrt"),
        ],
    )
    def test_is_found_before_anything_is_computed(self, settings: EngineSettings, message: str) -> None:
        with pytest.raises(ExportUsageError, match=message) as caught:
            settings.check()
        assert caught.value.hint

    @pytest.mark.skipif(LIBRARY["tensorrt"].installed, reason="TensorRT is installed")
    def test_a_library_that_is_not_installed_comes_with_its_install_line(self) -> None:
        with pytest.raises(BackendUnavailable, match="tensorrt is not installed") as caught:
            EngineSettings(("tensorrt",)).check()
        assert caught.value.hint == "pip install 'mtdp[gpu]'"


def test_densenet121_at_every_precision_and_with_an_engine_proves_itself(tmp_path: Path) -> None:
    def export(*arguments: object) -> list[str]:
        code, shown, errors = in_this_process(main, *arguments)
        assert code == 0, errors
        return [line for line in shown.splitlines() if line.endswith("pass")]

    out, names = tmp_path / "d121", ("fp32", "fp16", "bf16")
    precisions = [word for name in names for word in ("--precision", name)]
    written = export("densenet121", "--weights", "random", "--tile-px", 64, *precisions, "--engine", RTX, "--out", out)
    for rows in (written, export("--verify", out)):
        assert all(any(f" {name} " in row for row in rows) for name in names), rows
    manifest = load_bundle(out).manifest
    least = {variant.precision: variant.parity.cosine_min for variant in manifest.variants}
    assert least.keys() == set(names)
    assert least["fp32"] >= 0.999999
    assert min(least["fp16"], least["bf16"]) >= 0.9999
    assert {engine.key.precision for engine in manifest.engines} == set(names)
