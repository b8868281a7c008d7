"""The bundle: what is not exactly what was exported is refused, with the place named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtdp_runtime.bundle import load_bundle
from mtdp_runtime.bundle.manifest import FileRef, Head, Manifest
from mtdp_runtime.errors import BundleDigestMismatch, BundleInvalid, BundleNotFound, UsageError
from support import make_manifest

REF = FileRef("model.fp32.onnx", "a" * 64, 1)
GOLDEN = FileRef("golden.npz", "b" * 64, 1)
names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=8)  # of folders


@given(
    st.lists(
        st.tuples(names, st.lists(names, min_size=1, max_size=4, unique=True)), max_size=3, unique_by=lambda h: h[0]
    )
)
def test_the_document_reads_back_as_it_was_written(heads: list[tuple[str, list[str]]]) -> None:
    manifest = make_manifest(REF, GOLDEN, tuple(Head(name, tuple(classes)) for name, classes in heads))
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def test_the_seven_keys_of_wsinfer_are_there_and_true() -> None:
    manifest = make_manifest(REF, GOLDEN, (Head("lung", ("aca", "n")), Head("blood", ("rbc",))))
    document = manifest.to_json()
    assert document["spec_version"] == "1.0"
    assert document["architecture"] == "resnet18"
    assert document["class_names"] == ["lung/aca", "lung/n", "blood/rbc"]
    assert document["num_classes"] == 3
    assert document["patch_size_pixels"] == 64
    assert document["spacing_um_px"] == 0.5
    assert [step["name"] for step in document["transform"]] == ["Resize", "ToTensor", "Normalize"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["schema_version"], 2, "schema_version: this version reads 1, got 2"),
        (["mtdp", "tile_px"], 0, "mtdp: tile_px: an integer of at least 1 and at most 16384, got 0"),
        (["mtdp", "tile_px"], True, "tile_px: an integer"),
        (["mtdp", "mpp"], float("inf"), "mpp: a positive number"),
        (["mtdp", "variants"], [], "variants: at least one variant"),
        (["mtdp", "variants", 0, "file", "sha256"], "abc", "variants[0]: file: sha256: 64 hex digits, got 'abc'"),
        (["mtdp", "variants", 0, "file", "file"], "../x.onnx", "a plain file name inside the bundle, got '../x.onnx'"),
        (["mtdp", "variants", 0, "file", "file"], "/etc/passwd", "a plain file name inside the bundle"),
        (["mtdp", "variants", 0, "precision"], "fp8", "precision: one of fp32"),
        (["patch_size_pixels"], 65, "patch_size_pixels: 64 as in mtdp, got 65"),
        (["mtdp", "weights"], "x", "weights: an object was expected"),
    ],
)
def test_a_wrong_document_is_refused_with_the_place(path: list[Any], value: Any, message: str) -> None:
    document = json.loads(json.dumps(make_manifest(REF, GOLDEN).to_json()))
    target = document
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(BundleInvalid) as caught:
        Manifest.from_json(document)
    assert message in str(caught.value)


def test_a_missing_key_is_named() -> None:
    document = json.loads(json.dumps(make_manifest(REF, GOLDEN).to_json()))
    del document["mtdp"]["golden"]
    with pytest.raises(BundleInvalid, match="mtdp: golden: missing"):
        Manifest.from_json(document)


def test_no_bundle_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFound, match="not a model bundle"):
        load_bundle(tmp_path)
    (tmp_path / "bundle.json").write_text("{")
    with pytest.raises(BundleInvalid, match="not JSON"):
        load_bundle(tmp_path)


def test_a_changed_file_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    bundle = load_bundle(copy)
    model = copy / "model.fp32.onnx"
    assert bundle.checked(bundle.variant("fp32").file) == model
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    with pytest.raises(BundleDigestMismatch, match=r"model\.fp32\.onnx: sha256"):
        bundle.checked(bundle.variant("fp32").file)
    model.write_bytes(content[:-1])
    with pytest.raises(BundleDigestMismatch, match=r"bytes, bundle\.json says"):
        bundle.checked(bundle.variant("fp32").file)
    model.unlink()
    with pytest.raises(BundleDigestMismatch, match="missing from the bundle"):
        bundle.checked(bundle.variant("fp32").file)


def test_a_precision_that_is_not_there_is_named(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match=r"no int8 variant in this bundle \(it has fp32\)"):
        load_bundle(tiny_bundle).variant("int8")
