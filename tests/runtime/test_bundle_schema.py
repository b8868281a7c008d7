"""The published schema of bundle.json and the loader say the same of every document, and WSInfer's keys are true."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtdp_runtime.bundle import default_bundle_path, load_bundle, schema
from mtdp_runtime.bundle.manifest import FileRef, Head, Manifest, Tokens
from mtdp_runtime.errors import BundleInvalid
from support import make_manifest

VALIDATOR = jsonschema.Draft202012Validator(schema())
REF = FileRef("model.fp32.onnx", "a" * 64, 1)
GOLDEN = FileRef("golden.npz", "b" * 64, 1)
HEADS = (Head("lung", ("aca", "n")), Head("blood", ("rbc",)))
WITH_HEADS = json.loads(json.dumps(make_manifest(REF, GOLDEN, HEADS).to_json()))
WITH_HEADS["mtdp"]["golden_source"] = "slide a.svs"
PLAIN = json.loads(json.dumps(make_manifest(REF, GOLDEN).to_json()))
WITH_TOKENS = json.loads(json.dumps(replace(make_manifest(REF, GOLDEN), tokens=Tokens(2, 3, (2, 1))).to_json()))
WITH_TOKENS["mtdp"]["variants"][0]["parity"]["tokens_cosine_min"] = 1.0


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


def put(document: Any, path: tuple[Any, ...], change: Any) -> Any:
    """The document with one place changed by `change(parent, key)`."""
    if not path:
        return document
    document = copy.deepcopy(document)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return document


def halves_agree(document: Any) -> bool:
    """The three rules that the schema states in words."""
    own = document["mtdp"]
    tokens = own.get("tokens")
    if tokens is not None and tokens["grid"][0] * tokens["grid"][1] != tokens["count"]:
        return False
    names = [f"{head['name']}/{label}" for head in own["heads"] for label in head["class_names"]]
    names = names or [f"feature_{i}" for i in range(int(own["features_dim"]))]
    resize, _, normalise = (step.get("arguments") for step in document["transform"])
    return (
        document["class_names"] == names
        and document["num_classes"] == len(names)
        and document["architecture"] == own["arch"]
        and document["patch_size_pixels"] == own["tile_px"] == resize["size"]
        and document["spacing_um_px"] == own["mpp"]
        and (normalise["mean"], normalise["std"]) == (own["mean"], own["std"])
    )


def load(document: Any, folder: Path) -> bool:
    (folder / "bundle.json").write_text(json.dumps(document), encoding="utf-8")
    try:
        load_bundle(folder)
    except BundleInvalid:
        return False
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundle")


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.sampled_from([10**7, 64.0, 0.5, 1.5, -1.0, float("inf"), 1e39, 1e300, "1.0", "torch", "onnxruntime", "fp16"]),
    st.sampled_from(["", ".", "..", "...", "../x", "a/b", "a\\b", "./a", "a/", "a\n", "..\n", "a" * 64, "g" * 64]),
    st.sampled_from(["a" * 64 + "\n", "A" * 64, "x\x00", "resnet18", "lung", "rbc", [], {}, [1, 2, 3], [0, 1, 2, 3]]),
    st.sampled_from([[], ["a"], ["a", "a"], [""], [True, 1, 1], [1, 1, float("inf")], [0.5, 0.5, 0.5], [0, 0.0, 1]]),
    st.text(max_size=3),
)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_the_loader_takes_what_the_schema_takes(folder: Path, data: st.DataObject) -> None:
    document = data.draw(st.sampled_from([WITH_HEADS, PLAIN, WITH_TOKENS]))
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(places(document)))
        kind = data.draw(st.sampled_from(["set", "set", "set", "delete", "add", "repeat"]))
        if kind == "set":
            value = data.draw(VALUES)
            document = put(document, path, lambda parent, key, v=value: parent.__setitem__(key, v))
        elif kind == "delete":
            document = put(document, path, lambda parent, key: parent.pop(key))
        elif kind == "repeat":
            document = put(
                document,
                path,
                lambda parent, key: isinstance(parent, list) and parent.append(copy.deepcopy(parent[key])),
            )
        else:
            document = put(
                document, path, lambda parent, key: isinstance(parent, dict) and parent.__setitem__("later", {"x": [1]})
            )
    # What a file holds: json.dumps writes infinity as a word that is no JSON, and the schema never sees such a file.
    is_json = "Infinity" not in json.dumps(document)
    valid = VALIDATOR.is_valid(document)
    assert load(document, folder) == (is_json and valid and halves_agree(document))


@pytest.mark.parametrize("document", [WITH_HEADS, PLAIN, WITH_TOKENS], ids=["heads", "plain", "tokens"])
def test_what_is_written_is_valid_and_later_keys_are_let_be(document: Any, folder: Path) -> None:
    VALIDATOR.validate(document)
    for path in places(document):
        later = put(
            document, (*path, "later"), lambda parent, key: isinstance(parent, dict) and parent.update({key: 1})
        )
        assert VALIDATOR.is_valid(later)
        assert load(later, folder)
    document = copy.deepcopy(document)
    document["mtdp"]["calibrations"] = [{"anything": 1}]
    assert load(document, folder)


def test_a_number_that_overflows_is_refused(folder: Path) -> None:
    text = json.dumps(PLAIN).replace('"mpp": 0.5', '"mpp": 1e999')
    (folder / "bundle.json").write_text(text)
    with pytest.raises(BundleInvalid, match="mpp: a positive number, got inf"):
        load_bundle(folder)
    (folder / "bundle.json").write_text(text.replace("1e999", "NaN"))
    with pytest.raises(BundleInvalid, match="NaN is not a JSON number"):
        load_bundle(folder)


def test_the_schema_is_one_and_the_packaged_bundle_keeps_it() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    VALIDATOR.validate(json.loads((default_bundle_path() / "bundle.json").read_text(encoding="utf-8")))


def test_wsinfers_seven_keys_describe_what_the_graph_computes() -> None:
    """WSInfer's own steps (resize, x / 255, normalise), done by hand, are what the packaged graph does inside."""
    folder = default_bundle_path()
    document = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    manifest = load_bundle(folder).manifest
    assert {"spec_version", "architecture", "num_classes", "class_names"} <= set(document)
    assert document["num_classes"] == len(document["class_names"]) == sum(len(h.class_names) for h in manifest.heads)
    assert (document["patch_size_pixels"], document["spacing_um_px"]) == (manifest.tile_px, manifest.mpp)
    resize, to_tensor, normalise = document["transform"]
    assert (resize["arguments"]["size"], to_tensor) == (manifest.tile_px, {"name": "ToTensor"})
    onnx = pytest.importorskip("onnx")
    session = pytest.importorskip("onnxruntime")
    graph = onnx.load(folder / "model.fp32.onnx")
    with np.load(folder / "golden.npz") as golden:
        tiles = golden["tiles"][:2]
    # The value between normalisation and the first convolution.
    first = next(node for node in graph.graph.node if node.op_type == "Conv").input[0]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(first, onnx.TensorProto.FLOAT, None))
    running = session.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    got = running.run([first], {"tiles": tiles})[0]
    mean, std = (np.array(normalise["arguments"][key], np.float32) for key in ("mean", "std"))
    wanted = ((tiles.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_reference_and_interpolation_read_back() -> None:
    from dataclasses import replace

    manifest = replace(
        make_manifest(REF, GOLDEN), reference="onnxruntime", interpolation="bicubic", golden_source="9 images"
    )
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    document = json.loads(json.dumps(make_manifest(REF, GOLDEN).to_json()))
    del document["mtdp"]["reference"], document["mtdp"]["interpolation"]
    old = Manifest.from_json(document)
    assert (old.reference, old.interpolation, old.golden_source) == ("torch", "bilinear", "")
    assert "golden_source" not in old.to_json()["mtdp"]
