"""A feature extractor of one's own: what was declared is what is computed, and nothing is guessed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mtdp.errors import WeightsError
from mtdp_export.cli import main
from mtdp_export.errors import ExportError, ExportUsageError
from mtdp_export.golden import check_sees, synthetic_tiles
from mtdp_export.onnx_source import Declared, open_onnx, original_outputs, wrap_onnx
from mtdp_export.source import open_source
from mtdp_export.verify import verify_bundle
from mtdp_export.write import ExportSettings, write_bundle
from mtdp_runtime.bundle import load_bundle
from mtdp_runtime.bundle.golden import load_golden
from support import extract, pyramid, stained

PX = 32
MEAN, STD = (0.7, 0.5, 0.6), (0.2, 0.3, 0.25)
DECLARED = Declared(MEAN, STD, output="feat")
Make = Callable[..., Path]


@pytest.fixture
def make_onnx(tmp_path: Path) -> Make:
    """A small network, x -> feat [N, 5], logits [N, 2]; the arguments are what may be wrong with it."""

    def make(
        name: str = "own.onnx",
        *,
        batch: Any = "n",
        side: Any = PX,
        opset: int = 17,
        layout: str = "nchw",
        kind: int = TensorProto.FLOAT,
        pooled: bool = True,
        extra: tuple[onnx.NodeProto, ...] = (),
        external: bool = False,
        baked: bool = False,
        mixed: bool = False,
    ) -> Path:
        rng = np.random.default_rng(3)
        weights = {
            "kernel": rng.normal(0, 0.2, (5, 3, 4, 4)),
            "dense": rng.normal(0, 1, (5, 2)),
            "target": np.array([1 if baked else -1, 5], np.int64),
        }
        tensors = [
            numpy_helper.from_array(v if v.dtype == np.int64 else v.astype(np.float32), k) for k, v in weights.items()
        ]
        nodes = [
            helper.make_node("Cast", ["x"], ["cast"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["cast"], ["planes"], perm=[0, 3, 1, 2])
            if layout == "nhwc"
            else helper.make_node("Identity", ["cast"], ["planes"]),
            helper.make_node("Conv", ["planes", "kernel"], ["map"], strides=[4, 4]),
            helper.make_node("Relu", ["map"], ["relu"]),
            helper.make_node("GlobalAveragePool", ["relu"], ["pool"]),
            helper.make_node("Reshape", ["pool", "target"], ["flat"]),
        ]
        if mixed:
            nodes.append(helper.make_node("ReduceMean", ["flat"], ["all"], axes=[0], keepdims=1))
            nodes.append(helper.make_node("Sub", ["flat", "all"], ["feat"]))
        else:
            nodes.append(helper.make_node("Identity", ["flat" if pooled else "relu"], ["feat"]))
        nodes += [helper.make_node("MatMul", ["flat", "dense"], ["logits"]), *extra]
        shape = [batch, 3, side, side] if layout == "nchw" else [batch, side, side, 3]
        feat = [batch, 5] if pooled else [batch, 5, 8, 8]
        graph = helper.make_graph(
            nodes,
            "own",
            [helper.make_tensor_value_info("x", kind, shape)],
            [
                helper.make_tensor_value_info("feat", TensorProto.FLOAT, feat),
                helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 2]),
            ],
            tensors,
        )
        imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.example", 1)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=8)
        options = {"save_as_external_data": True, "location": "own.weights", "size_threshold": 100} if external else {}
        onnx.save(model, tmp_path / name, **options)
        return tmp_path / name

    return make


def original(path: Path, pixels: NDArray[Any]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    features: NDArray[np.float32] = session.run(["feat"], {"x": pixels})[0]
    return features


def normalised(tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    return ((tiles / 255 - MEAN) / STD).astype(np.float32)


def test_from_the_file_to_the_features_of_a_slide(
    make_onnx: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = make_onnx(external=True)
    options = ["--mean", *map(str, MEAN), "--std", *map(str, STD), "--feature-output", "feat", "--licence", "CC0"]
    monkeypatch.setattr(sys, "argv", ["mtdp-export", "--onnx", str(file), *options, "--out", str(tmp_path / "b")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None), capsys.readouterr().err
    assert "pass" in capsys.readouterr().out
    manifest = load_bundle(tmp_path / "b").manifest
    assert (manifest.reference, manifest.arch, manifest.tile_px) == ("onnxruntime", "onnx:own", PX)
    assert (manifest.features_dim, manifest.mean, manifest.weights.licence) == (5, MEAN, "CC0")
    assert manifest.weights.origin == "brought as own.onnx (output feat, made by a program that it does not name)"
    assert sorted(f.name for f in (tmp_path / "b").iterdir()) == [
        "README.md",
        "bundle.json",
        "card.md",
        "golden.npz",
        "model.fp32.onnx",
    ]
    assert "the ONNX file as it was brought" in (tmp_path / "b" / "card.md").read_text(encoding="utf-8")
    tiles, golden = load_golden(tmp_path / "b" / "golden.npz")
    planes = normalised(tiles).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(golden["features"], original(file, planes), atol=1e-5)
    assert all(comparison.passed for comparison in verify_bundle(tmp_path / "b") if comparison.required)

    image = stained(768, 1024)
    slide = pyramid(image, tmp_path / "slide.tiff", mpp=0.5)
    arguments = [str(slide), "--model", str(tmp_path / "b"), "--out", str(tmp_path / "out"), "--no-report"]
    run = extract(*arguments, "--precision", "fp32")
    assert run.returncode == 0, run.stderr
    with h5py.File(tmp_path / "out" / "slide.h5") as stored:
        features, coords = stored["features"][:], stored["coords"][:]
    assert len(coords) > 8
    cut = np.stack([image[y : y + PX, x : x + PX] for x, y in coords])
    np.testing.assert_allclose(features, original(file, normalised(cut).transpose(0, 3, 1, 2)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("given", ["0..1", "0..255", "uint8"])
def test_layout_and_range_are_as_declared(make_onnx: Make, tmp_path: Path, layout: str, given: str) -> None:
    file = make_onnx(layout=layout, kind=TensorProto.UINT8 if given == "uint8" else TensorProto.FLOAT)
    declared = {
        "0..1": DECLARED,
        "0..255": Declared((180.0, 130.0, 150.0), (50.0, 60.0, 70.0), 255, output="feat"),
        "uint8": Declared(output="feat"),
    }[given]
    bundle, report = write_bundle(open_onnx(file, declared), tmp_path / "b", ExportSettings("b", 0.5))
    assert report.rows
    assert all(row.passed for row in report.rows if row.required)
    tiles, golden = load_golden(tmp_path / "b" / "golden.npz")
    pixels: NDArray[Any] = {
        "0..1": normalised(tiles),
        "0..255": ((tiles.astype(float) - (180, 130, 150)) / (50, 60, 70)).astype(np.float32),
        "uint8": tiles,
    }[given]
    wanted = original(file, pixels.transpose(0, 3, 1, 2) if layout == "nchw" else pixels)
    np.testing.assert_allclose(golden["features"], wanted, rtol=1e-4, atol=1e-4)
    # What bundle.json states is the same arithmetic, on the scale 0..1.
    stated = (tiles / 255 - np.array(bundle.manifest.mean)) / np.array(bundle.manifest.std)
    np.testing.assert_allclose(stated, pixels, rtol=1e-5, atol=1e-4)


def test_nodes_without_names_are_typed_like_others(make_onnx: Make, tmp_path: Path) -> None:
    settings = ExportSettings("b", 0.5, precisions=("fp32", "fp16"))
    bundle, report = write_bundle(open_onnx(make_onnx(), DECLARED), tmp_path / "b", settings)
    assert "fp16: 1 of 1 kernels in fp16" in report.notes
    model = onnx.load(bundle.path / "model.fp16.onnx")
    assert TensorProto.FLOAT16 in {tensor.data_type for tensor in model.graph.initializer}
    names = [node.name for node in onnx.load(bundle.path / "model.fp32.onnx").graph.node]
    assert all(names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_uint8_reaches_nothing_but_a_cast(make_onnx: Make, layout: str) -> None:
    """TensorRT takes no other operation on it."""
    source = open_onnx(make_onnx(layout=layout, kind=TensorProto.UINT8), Declared(output="feat"))
    graph = wrap_onnx(source, {}).graph
    assert [node.op_type for node in graph.node if "tiles" in node.input] == ["Cast"]
    assert sum(node.op_type == "Cast" for node in graph.node) == 1
    trt = pytest.importorskip("tensorrt_rtx")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    assert trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR)).parse(wrap_onnx(source, {}).SerializeToString())


def test_uint8_that_is_not_cast_first_keeps_its_type(make_onnx: Make) -> None:
    file = make_onnx(kind=TensorProto.UINT8)
    model = onnx.load(file)
    model.graph.node.insert(0, helper.make_node("Max", ["x"], ["most"]))
    model.graph.node[1].input[0] = "most"
    onnx.save(model, file)
    graph = wrap_onnx(open_onnx(file, Declared(output="feat")), {}).graph
    assert graph.node[0].op_type == "Transpose"


def test_weights_in_constant_nodes_are_part_of_the_digest(make_onnx: Make) -> None:
    def with_constants(factor: float) -> str:
        file = make_onnx()
        model = onnx.load(file)
        nodes = list(model.graph.node)
        for tensor in model.graph.initializer:
            array = numpy_helper.to_array(tensor)
            scaled = numpy_helper.from_array(array * factor if array.dtype == np.float32 else array)
            nodes.insert(0, helper.make_node("Constant", [], [tensor.name], value=scaled))
        del model.graph.initializer[:], model.graph.node[:]
        model.graph.node.extend(nodes)
        onnx.save(model, file)
        return open_onnx(file, DECLARED).digest

    assert with_constants(1.0) == with_constants(1.0) != with_constants(2.0)


def pool_what_is_chosen(model: onnx.ModelProto, branches: list[onnx.GraphProto]) -> None:
    """Put an If with the two branches before the pooling."""
    switch = helper.make_node("If", ["yes"], ["chosen"], then_branch=branches[0], else_branch=branches[1])
    position = next(i for i, node in enumerate(model.graph.node) if node.op_type == "GlobalAveragePool")
    model.graph.node[position].input[0] = "chosen"
    model.graph.node.insert(position, switch)
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))


@pytest.mark.parametrize("place", ["initializer", "Constant"])
def test_weights_inside_a_branch_are_part_of_the_digest(make_onnx: Make, place: str) -> None:
    """Two branches name their weights alike; it matters which of them has which."""

    def with_branches(*factors: float) -> str:
        file = make_onnx()
        model = onnx.load(file)
        branches = []
        for name, factor in zip(("then", "else"), factors, strict=True):
            weight = numpy_helper.from_array(np.full(1, factor, np.float32), "factor")
            output = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)
            graph = helper.make_graph([helper.make_node("Mul", ["relu", "factor"], [output.name])], name, [], [output])
            if place == "initializer":
                graph.initializer.append(weight)
            else:
                graph.node.insert(0, helper.make_node("Constant", [], ["factor"], value=weight))
            branches.append(graph)
        pool_what_is_chosen(model, branches)
        onnx.save(model, file)
        return open_onnx(file, DECLARED).digest

    digests = {with_branches(1.0, 2.0), with_branches(2.0, 1.0), with_branches(1.0, 3.0)}
    assert len(digests) == 3
    assert with_branches(1.0, 2.0) in digests


def test_a_graph_inside_a_node_that_reads_a_low_value_is_said(make_onnx: Make, tmp_path: Path) -> None:
    file = make_onnx()
    model = onnx.load(file)
    branches = [
        helper.make_graph(
            [helper.make_node(op, ["relu"], [f"{op}_out"])],
            op,
            [],
            [helper.make_tensor_value_info(f"{op}_out", TensorProto.FLOAT, None)],
        )
        for op in ("Identity", "Abs")
    ]
    pool_what_is_chosen(model, branches)
    onnx.save(model, file)
    settings = ExportSettings("b", 0.5, precisions=("fp32", "bf16"))
    with pytest.raises(ExportError, match=r"--precision bf16: the If .* reads net/relu, which would be bf16"):
        write_bundle(open_onnx(file, DECLARED), tmp_path / "b", settings)


def test_a_bundles_own_graph_may_be_brought_back(resnet18_bundle: Path, tmp_path: Path) -> None:
    source = open_onnx(resnet18_bundle / "model.fp32.onnx", Declared())
    bundle, _ = write_bundle(source, tmp_path / "again", ExportSettings("again", 0.5))
    _, before = load_golden(resnet18_bundle / "golden.npz")
    _, after = load_golden(bundle.path / "golden.npz")
    np.testing.assert_allclose(after["features"], before["features"], rtol=1e-4, atol=1e-5)


custom = helper.make_node("Magic", ["flat"], ["magic"], domain="com.example")
half = helper.make_node("Cast", ["flat"], ["half"], to=TensorProto.FLOAT16)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch": 1}, "the batch axis of x is fixed to 1"),
        ({"opset": 12}, "opset 12; 13 to"),
        ({"extra": (custom,)}, "operations outside the ONNX standard: com.example::Magic"),
        ({"extra": (half,)}, "it computes with less than fp32"),
        ({"pooled": False}, r"output feat is float\[n, 5, 8, 8\], not float\[batch, D\]"),
        ({"kind": TensorProto.DOUBLE}, "its input is double"),
        ({"baked": True}, "fails on a batch of 4"),
        ({"mixed": True}, "depend on the other tiles of its batch"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(make_onnx: Make, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        open_onnx(make_onnx(**wrong), DECLARED)
    assert caught.value.exit_code == 1
    assert caught.value.hint


@pytest.mark.parametrize(
    ("made", "declared", "message"),
    [
        ({}, Declared(MEAN, STD), "several outputs: feat, logits"),
        ({}, Declared(MEAN, STD, output="x"), "--feature-output x"),
        ({}, Declared(output="feat"), "--onnx needs the preprocessing"),
        ({}, Declared(MEAN, STD, tile_px=64, output="feat"), "takes 32 px only"),
        ({}, Declared(MEAN, STD, layout="nhwc", output="feat"), "has no 3 channels there"),
        ({"side": "s"}, DECLARED, "add --tile-px|takes images of any size"),
        ({"kind": TensorProto.UINT8}, DECLARED, "takes uint8 and prepares it by itself"),
    ],
)
def test_what_must_be_declared_is_asked_for(
    make_onnx: Make, made: dict[str, Any], declared: Declared, message: str
) -> None:
    with pytest.raises(ExportUsageError, match=message):
        open_onnx(make_onnx(**made), declared)


class TestWeightsOfMoreThanOneFileHolds:
    """Acted out at a few bytes: they stay in their file, and the bundle is the same."""

    @pytest.fixture
    def large(self, make_onnx: Make, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr("mtdp_export.onnx_file.LARGEST_BYTES", 100)
        monkeypatch.setattr("mtdp_export.model_store._SMALL", 100)
        return make_onnx(external=True)

    def test_give_the_same_bundle(self, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        apart = open_onnx(large, DECLARED)
        assert [t.name for t in apart.model.graph.initializer if t.external_data] == ["kernel"]
        monkeypatch.setattr("mtdp_export.onnx_file.LARGEST_BYTES", 1 << 20)
        inside = open_onnx(large, DECLARED)
        assert not any(t.external_data for t in inside.model.graph.initializer)
        assert apart.digest == inside.digest
        beside = sorted(path.name for path in large.parent.iterdir())
        bundle, _ = write_bundle(apart, tmp_path / "b", ExportSettings("b", 0.5))
        assert sorted(path.name for path in large.parent.iterdir()) == ["b", *beside]
        assert bundle.manifest.weights.sha256 == inside.digest
        tiles, golden = load_golden(tmp_path / "b" / "golden.npz")
        np.testing.assert_array_equal(golden["features"], original_outputs(inside, tiles)["features"])

    @pytest.mark.parametrize("left", [0, 500])
    def test_that_are_cut_or_missing_are_said(self, large: Path, left: int) -> None:
        weights = large.with_name("own.weights")
        content = weights.read_bytes()[:left]
        weights.unlink()
        if left:
            weights.write_bytes(content)
        with pytest.raises(ExportError, match=r"own\.onnx: (not a usable ONNX file: |its weights are in another)"):
            open_onnx(large, DECLARED)

    def test_that_lie_elsewhere_are_not_read(self, large: Path, tmp_path: Path) -> None:
        model = onnx.load(large, load_external_data=False)
        model.graph.initializer[0].external_data[0].value = "../own.weights"
        (tmp_path / "inner").mkdir()
        (tmp_path / "inner" / "own.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(ExportError, match="points outside the directory"):
            open_onnx(tmp_path / "inner" / "own.onnx", DECLARED)


def test_what_does_not_see_its_tiles_is_no_model(make_onnx: Make, tmp_path: Path) -> None:
    """Any graph would repeat what it gives, whatever its weights are."""
    model = onnx.load(make_onnx())
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((5, 3, 4, 4), np.float32), "kernel"))
    onnx.save(model, tmp_path / "blind.onnx")
    network = open_source("resnet18", "random", 32, True)
    for name, parameter in network.network.backbone.named_parameters():
        parameter.requires_grad_(False).fill_(1.0 if name.endswith("bias") else 0.0)
    for source in (open_onnx(tmp_path / "blind.onnx", DECLARED), network):
        with pytest.raises(ExportError, match="features are the same for all 16 golden tiles"):
            write_bundle(source, tmp_path / "b", ExportSettings("b", 0.5))
    tiles = synthetic_tiles(32)
    with pytest.raises(ExportError, match="features are the same for all 16 golden tiles, which differ") as caught:
        check_sees(np.full((16, 4), 0.5, np.float32), tiles)
    assert caught.value.hint
    check_sees(np.full((16, 4), 0.5, np.float32), np.zeros_like(tiles))  # of one image, they may be
    check_sees(np.eye(16, 4, dtype=np.float32), tiles)


def test_any_size_takes_the_declared_one(make_onnx: Make) -> None:
    source = open_onnx(make_onnx(side="s"), Declared(MEAN, STD, tile_px=48, output="feat"))
    assert (source.preprocessing.image_px, source.features_dim) == (48, 5)


def test_missing_and_damaged_files(make_onnx: Make, tmp_path: Path) -> None:
    with pytest.raises(ExportUsageError, match="no such file"):
        open_onnx(tmp_path / "none.onnx", DECLARED)
    file = make_onnx(external=True)
    (tmp_path / "own.weights").unlink()
    with pytest.raises(ExportError, match=r"own\.onnx: its weights are in another file, .*missing.*own\.weights"):
        open_onnx(file, DECLARED)
    for content, said in (
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS, not an ONNX file"),
        (b"<!doctype html>", "is a web page, not an ONNX file"),
        (b"PK\x03\x04", "it is of torch, and no ONNX file"),
    ):
        (tmp_path / "other.onnx").write_bytes(content)
        with pytest.raises((ExportError, WeightsError), match=said) as caught:
            open_onnx(tmp_path / "other.onnx", DECLARED)
        assert caught.value.hint
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(ExportError, match="not a usable ONNX file"):
        open_onnx(tmp_path / "text.onnx", DECLARED)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet18", "--weights", "random", "--out", "b", "--input-range", "1"], "--input-range goes with --onnx"),
        (["--onnx", "x.onnx", "--out", "b", "--no-heads"], "--no-heads does not go with --onnx"),
        (["resnet18", "--onnx", "x.onnx", "--out", "b"], "--onnx takes no SOURCE"),
        (["--onnx", "x.onnx", "--out", "b", "--input-layout", "hwc"], "--input-layout hwc: unknown"),
        (["--onnx", "x.onnx", "--out", "b", "--input-range", "7"], "--input-range 7: unknown"),
        (["--onnx", "x.onnx"], "SOURCE and --out are needed"),
        (["--card", "b", "--out", "c"], "--card goes alone"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mtdp-export", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


class TestTokens:
    """A transformer that was exported with all of its tokens, as optimum does it."""

    @pytest.fixture(params=[13, 18])
    def file(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        rng = np.random.default_rng(4)
        weights = {
            "kernel": rng.normal(0, 0.2, (6, 3, 8, 8)).astype(np.float32),
            "shape": np.array([0, 6, -1], np.int64),
        }
        nodes = [
            helper.make_node("Conv", ["x", "kernel"], ["map"], strides=[8, 8]),
            helper.make_node("Reshape", ["map", "shape"], ["flat"]),
            helper.make_node("Transpose", ["flat"], ["tokens"], perm=[0, 2, 1]),
        ]
        graph = helper.make_graph(
            nodes,
            "vit",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, PX, PX])],
            [helper.make_tensor_value_info("tokens", TensorProto.FLOAT, ["n", 16, 6])],
            [numpy_helper.from_array(value, name) for name, value in weights.items()],
        )
        opset = helper.make_opsetid("", request.param)
        onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), tmp_path / "vit.onnx")
        return tmp_path / "vit.onnx"

    @pytest.mark.parametrize(
        ("pool", "prefix"), [("cls", 1), ("mean", 0), ("mean", 5), ("cls+mean", 1), ("cls+mean", 5)]
    )
    def test_are_pooled_as_is_said(self, file: Path, pool: str, prefix: int) -> None:
        source = open_onnx(file, Declared(MEAN, STD, pool=pool, prefix_tokens=prefix))
        graph = wrap_onnx(source, {})
        tiles = synthetic_tiles(PX)
        session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        plain = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        tokens = plain.run(None, {"x": np.ascontiguousarray(normalised(tiles).transpose(0, 3, 1, 2))})[0]
        parts = {"cls": tokens[:, 0], "mean": tokens[:, prefix:].mean(1)}
        wanted = np.concatenate([parts[name] for name in pool.split("+")], axis=1)
        np.testing.assert_allclose(session.run(["features"], {"tiles": tiles})[0], wanted, rtol=1e-4, atol=1e-5)
        assert (source.feature, source.features_dim) == (pool, 12 if "+" in pool else 6)

    def test_what_does_not_fit_is_said(self, file: Path, make_onnx: Make) -> None:
        with pytest.raises(ExportError, match=r"output tokens is float\[n, 16, 6\], not float\[batch, D\]") as caught:
            open_onnx(file, Declared(MEAN, STD))
        assert caught.value.hint.startswith("add --pool cls, mean or cls+mean")
        for pool, prefix, said in (
            ("max", 1, "--pool max: unknown"),
            ("cls", 0, "--prefix-tokens 0: not with --pool cls of 16 tokens"),
            ("mean", 16, "--prefix-tokens 16: not with --pool mean of 16 tokens"),
        ):
            with pytest.raises(ExportUsageError, match=said):
                open_onnx(file, Declared(MEAN, STD, pool=pool, prefix_tokens=prefix))
        with pytest.raises(ExportUsageError, match=r"output feat of .* has 2 axes, tokens have 3"):
            open_onnx(make_onnx(), Declared(MEAN, STD, output="feat", pool="cls"))
