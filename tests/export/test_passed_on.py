"""A bundle is passed on: no file of it holds the name of a slide, or a path of the machine that exported it."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mtdp_export.card import model_card
from mtdp_export.engines import EngineSettings
from mtdp_export.golden import describe_source
from mtdp_export.onnx_source import Declared, open_onnx
from mtdp_export.write import ExportSettings, write_bundle
from mtdp_runtime.bundle import load_bundle
from mtdp_runtime.bundle.manifest import Manifest
from mtdp_runtime.slide.open import open_slide
from support import pyramid, stained, write_tiny_bundle

PATIENT = "Mustermann_1957-03-04_S21-4711"
SECRET = "/home/mustermann/train.py"


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    """A slide that is named after a patient, in a folder that is, too."""
    folder = tmp_path / f"of_{PATIENT}"
    folder.mkdir()
    return pyramid(stained(768, 1024), folder / f"{PATIENT}.tiff", mpp=0.5)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / f"of_{PATIENT}"
    folder.mkdir()
    for number in range(3):
        cv2.imwrite(str(folder / f"{PATIENT}-{number}.png"), stained(80, 80, number))
    return folder


@pytest.fixture
def own_model(tmp_path: Path) -> Path:
    """A graph with notes of its exporter at every place that can hold one, graphs inside nodes included."""
    model = onnx.load(write_tiny_bundle(tmp_path / "tiny") / "model.fp32.onnx")
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    branches = []
    for name in ("then", "else"):
        constant = helper.make_node("Constant", [], [f"{name}_zero"], value=numpy_helper.from_array(np.zeros(1)))
        constant.attribute[0].doc_string = constant.attribute[0].t.doc_string = SECRET
        inner = helper.make_node("Relu", ["conv"], [f"{name}_out"])
        for node in (constant, inner):
            node.doc_string = SECRET
            node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=SECRET)
        out = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)
        graph = helper.make_graph([constant, inner], name, [], [out])
        graph.doc_string = SECRET
        branches.append(graph)
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    switch = helper.make_node("If", ["yes"], [relu.output[0]], then_branch=branches[0], else_branch=branches[1])
    relu.CopyFrom(switch)
    for noted in (model, model.graph, *model.graph.node, *model.graph.initializer, *model.graph.input):
        noted.doc_string = SECRET
        noted.metadata_props.add(key="source", value=SECRET)
    onnx.save(model, tmp_path / "own.onnx")
    return tmp_path / "own.onnx"


def contents(bundle: Path) -> Iterator[tuple[str, bytes]]:
    """Every file, and what is packed in one, with their names."""
    for file in bundle.rglob("*"):
        if file.is_file():
            yield file.name, file.name.encode() + file.read_bytes()
        if file.suffix == ".npz":
            with zipfile.ZipFile(file) as archive:
                yield from ((name, name.encode() + archive.read(name)) for name in archive.namelist())


@pytest.mark.parametrize("calibration", ["slide", "images"])
def test_nothing_names_the_slide_or_the_machine(
    request: pytest.FixtureRequest, own_model: Path, tmp_path: Path, calibration: str
) -> None:
    tissue: Path = request.getfixturevalue(calibration)
    engines = EngineSettings(("tensorrt-rtx",), (1, 2, 4)) if _installed("tensorrt_rtx") else EngineSettings()
    settings = ExportSettings("own", 0.5, calibration=tissue, engines=engines)
    bundle, _ = write_bundle(open_onnx(own_model, Declared()), tmp_path / "b", settings)
    searched = []
    for name, content in contents(bundle.path):
        searched.append(name)
        for trace in (PATIENT, "Mustermann", "mustermann", str(tmp_path), str(Path(sys.prefix)), str(Path.home())):
            if len(trace) > 1:
                assert trace.encode() not in content, f"{name} holds {trace}"
    assert {"bundle.json", "card.md", "golden.npz", "tiles.npy", "model.fp32.onnx"} <= set(searched)
    assert not engines.libraries or any(name.endswith(".log") for name in searched)


def _installed(module: str) -> bool:
    try:
        return bool(__import__(module))
    except ImportError:
        return False


def test_whoever_has_the_slide_finds_it(slide: Path) -> None:
    with open_slide(slide) as opened:
        quickhash = opened.info.quickhash
    assert len(quickhash) == 64
    assert describe_source(slide, 12) == f"12 tiles of a slide with quickhash {quickhash[:16]}"
    assert describe_source(slide.parent, 9) == "9 images"


def test_a_format_without_a_quickhash_is_still_not_named(slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Callable[[Path], object] = open_slide

    def without(path: Path) -> object:
        reader = opened(path)
        reader.info = replace(reader.info, quickhash="")  # type: ignore[attr-defined]
        return reader

    monkeypatch.setattr("mtdp_export.golden.open_slide", without)
    assert describe_source(slide, 12) == "12 tiles of a slide"


def test_a_bundle_that_names_its_slide_is_read_as_before(resnet18_bundle: Path) -> None:
    manifest = replace(load_bundle(resnet18_bundle).manifest, golden_source="slide CMU-1.svs")
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert "(slide CMU-1.svs)" in model_card(manifest)
