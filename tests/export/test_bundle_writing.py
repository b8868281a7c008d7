"""A bundle is written whole and proven, or not at all; and it proves itself again anywhere."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mtdp.checkpoint import CheckpointInfo, save_checkpoint
from mtdp.multitask import MultiTaskNet
from mtdp.preprocess import Preprocessing
from mtdp_export.card import front_matter, model_card
from mtdp_export.catalogue import catalogue
from mtdp_export.errors import ExportUsageError, ParityFailure
from mtdp_export.golden import calibration_tiles, save_golden, synthetic_tiles
from mtdp_export.parity import Comparison, compare_outputs, require, table
from mtdp_export.source import open_source
from mtdp_export.verify import verify_bundle
from mtdp_export.write import ExportSettings, write_bundle
from mtdp_runtime.backends import Probe
from mtdp_runtime.backends.openvino import OpenVINO
from mtdp_runtime.backends.proof import Replayed, replay
from mtdp_runtime.bundle import Bundle, file_ref, load_bundle
from mtdp_runtime.bundle.engine_key import EngineKey
from mtdp_runtime.bundle.golden import load_golden
from mtdp_runtime.bundle.manifest import Engine, FileRef, Parity
from mtdp_runtime.errors import BundleDigestMismatch
from support import Run, pyramid, stained


def test_what_is_in_it(resnet18_bundle: Path) -> None:
    assert sorted(p.name for p in resnet18_bundle.iterdir()) == [
        "README.md",
        "bundle.json",
        "card.md",
        "golden.npz",
        "model.fp32.onnx",
    ]
    manifest = load_bundle(resnet18_bundle).manifest
    assert (manifest.arch, manifest.tile_px, manifest.features_dim, manifest.heads) == ("resnet18", 64, 512, ())
    assert manifest.variants[0].parity.cosine_min >= 0.999999
    assert "random initialisation" in manifest.weights.origin
    tiles, outputs = load_golden(resnet18_bundle / "golden.npz")
    assert tiles.shape == (16, 64, 64, 3)
    assert outputs["features"].shape == (16, 512)
    card, page = ((resnet18_bundle / name).read_text() for name in ("card.md", "README.md"))
    assert "no diagnosis may rest on it" in card
    assert page == front_matter(manifest) + card


def test_the_front_matter_is_yaml_that_states_the_licence(resnet18_bundle: Path) -> None:
    yaml = pytest.importorskip("yaml")
    manifest = load_bundle(resnet18_bundle).manifest

    def said(licence: str) -> dict[str, object]:
        weights = replace(manifest.weights, licence=licence)
        _, front, rest = front_matter(replace(manifest, weights=weights), licence_text=True).split("---\n")
        assert not rest.strip()
        return yaml.safe_load(front)

    assert said("none")["library_name"] == "mtdp"
    assert {"pathology", "onnx"} <= set(said("none")["tags"])
    for licence in {recipe.licence for recipe in catalogue().values()}:
        found = said(f"{licence}; gated: to be accepted where the weights are published")
        assert (found["license"] == "other") == ("license_name" in found)
        if found["license"] != "other":  # an identifier of the hub says the same as the catalogue does
            assert ("no" if "nc" in found["license"] else "yes") == licence.commercial
    assert said("Apache-2.0")["license"] == "apache-2.0"
    assert said('a "licence": of # ours')["license_name"] == 'a "licence": of # ours'
    assert said("Apache-2.0, but not on Sundays")["license"] == "other"


def test_equal_exports_have_equal_digests(resnet18_bundle: Path, tmp_path: Path) -> None:
    bundle, _ = write_bundle(open_source("resnet18", "random", 64, True), tmp_path / "b", ExportSettings("r18", 0.5))
    assert bundle.digest == load_bundle(resnet18_bundle).digest


def test_it_verifies_on_every_engine_here(resnet18_bundle: Path) -> None:
    comparisons = verify_bundle(resnet18_bundle)
    assert {c.backend.split()[0] for c in comparisons} == {"openvino", "onnxruntime"}
    assert all(c.passed for c in comparisons if c.required)


class OpenVINOWithAMX(OpenVINO):
    """As on a machine where bf16 comes first."""

    @classmethod
    def probe(cls) -> Probe:
        return Probe("openvino", True, "as if with AMX", precisions=("bf16", "fp32"))


@pytest.mark.skipif("bf16" not in OpenVINO.probe().precisions, reason="needs a CPU that computes in bf16")
def test_auto_takes_bf16_only_where_the_model_proves_itself_in_it(resnet18_bundle: Path, tmp_path: Path) -> None:
    with OpenVINOWithAMX.load(load_bundle(resnet18_bundle), "auto", 8, 2) as engine:
        assert (engine.precision, engine.note) == ("bf16", "")
    other = tmp_path / "other"
    shutil.copytree(resnet18_bundle, other)
    tiles, outputs = load_golden(other / "golden.npz")
    outputs["features"] += np.float32(0.02) * np.arange(512, dtype=np.float32) / 512 * outputs["features"].max()
    resign_golden(other, tiles, outputs)
    with OpenVINOWithAMX.load(load_bundle(other), "auto", 8, 2) as engine:
        assert engine.precision == "fp32"
        assert "this model in bf16 has a cosine of 0.99" in engine.note


@pytest.mark.skipif("bf16" not in OpenVINO.probe().precisions, reason="needs a CPU that computes in bf16")
def test_the_proof_in_bf16_is_done_once(resnet18_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTDP_CACHE", str(tmp_path / "cache"))
    bundle, replayed = load_bundle(resnet18_bundle), []

    def replayed_once(engine: OpenVINO, bundle: Bundle) -> Replayed:
        replayed.append(engine.precision)
        return replay(engine, bundle)

    monkeypatch.setattr("mtdp_runtime.backends.proof.replay", replayed_once)
    for _ in range(3):
        with OpenVINOWithAMX.load(bundle, "auto", 8, 2) as engine:
            assert engine.precision == "bf16"
    assert replayed == ["bf16"]
    OpenVINOWithAMX.load(bundle, "auto", 4, 2).close()
    assert len(replayed) == 2, "another batch size is another engine"
    for file in (tmp_path / "cache" / "proofs").iterdir():
        file.write_bytes(file.read_bytes().replace(b"0.9", b"0.1"))
    OpenVINOWithAMX.load(bundle, "auto", 8, 2).close()
    assert len(replayed) == 3, "a file that was changed is not relied on"
    (tmp_path / "cache" / "proofs").chmod(0o777)
    OpenVINOWithAMX.load(bundle, "auto", 8, 2).close()
    assert len(replayed) == 4, "nothing is relied on where others may write"


def resign_golden(bundle: Path, tiles: NDArray[np.uint8], outputs: dict[str, NDArray[np.float32]]) -> None:
    """Replace the golden tiles, with a digest that fits."""
    save_golden(bundle / "golden.npz", tiles, outputs)
    document = json.loads((bundle / "bundle.json").read_text())
    ref = file_ref(bundle, "golden.npz")
    document["mtdp"]["golden"] = {"file": ref.file, "sha256": ref.sha256, "size_bytes": ref.size_bytes}
    (bundle / "bundle.json").write_text(json.dumps(document))


@pytest.mark.parametrize("name", ["model.fp32.onnx", "golden.npz"])
def test_a_flipped_bit_is_found(resnet18_bundle: Path, tmp_path: Path, run: Run, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(resnet18_bundle, copy)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 16
    (copy / name).write_bytes(content)
    with pytest.raises(BundleDigestMismatch, match=name):
        verify_bundle(copy)
    code, _, err = run("--verify", copy)
    assert code == 2
    assert f"{name}: sha256" in err
    assert "Traceback" not in err


def test_golden_features_that_are_not_the_models_fail(resnet18_bundle: Path, tmp_path: Path, run: Run) -> None:
    """Even with digests that fit: somebody re-signed a wrong model."""
    copy = tmp_path / "copy"
    shutil.copytree(resnet18_bundle, copy)
    tiles, outputs = load_golden(copy / "golden.npz")
    outputs["features"][3] = outputs["features"][3][::-1]
    resign_golden(copy, tiles, outputs)
    code, out, _ = run("--verify", copy)
    assert code == 1
    assert "FAIL" in out


def test_a_variant_below_the_bar_is_refused() -> None:
    comparison = Comparison("engine 1", "fp32", Parity("engine 1", 16, 0.99999, 1.0, 0.1), None)
    with pytest.raises(ParityFailure, match=r"smallest cosine to the reference 0\.9999900, 0\.999999 is required"):
        require(comparison)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_features_of_another_length_fail_though_the_cosine_is_1(precision: str) -> None:
    """As those of an engine that sums where it should average, or normalises what it gives."""
    wanted = {"features": np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)}
    right = compare_outputs("engine 1", precision, {"features": wanted["features"] * np.float32(1.0001)}, wanted)
    longer = compare_outputs("engine 1", precision, {"features": 49 * wanted["features"]}, wanted)
    assert (right.passed, longer.passed, longer.parity.cosine_min) == (True, False, pytest.approx(1))
    with pytest.raises(ParityFailure, match=r"largest error of a vector's length 48, \S+ is allowed"):
        require(longer)
    assert table([longer]).endswith("4.8e+01  100.0% -        FAIL")


def test_a_checkpoint_keeps_its_heads_and_tells_its_story(
    small_network: MultiTaskNet, tmp_path: Path, run: Run
) -> None:
    training = {
        "config": {"arch": "resnet18", "batch_size": 8, "lr": 0.1},
        "init": {"source": "random", "description": "random initialisation", "licence": "none", "sha256": None},
        "tasks": {
            name: {"images": 10, "classes": list(classes)} for name, classes in small_network.class_names.items()
        },
        "versions": {"torch": "2"},
    }
    info = CheckpointInfo("resnet18", small_network.class_names, Preprocessing(64), training, 5)
    save_checkpoint(tmp_path / "checkpoint.safetensors", small_network, info)
    code, _, err = run(tmp_path, "--out", tmp_path / "b", "--name", "mine", "--licence", "CC0", "--json")
    assert code == 0, err
    assert "note: --mpp was left out: 0.5 µm per pixel is taken as the model's scale" in err
    manifest = load_bundle(tmp_path / "b").manifest
    assert [(h.name, h.class_names) for h in manifest.heads] == list(small_network.class_names.items())
    assert (manifest.name, manifest.weights.licence) == ("mine", "CC0")
    assert manifest.weights.origin.startswith("multi-task pre-training, 5 batches of 8 from 2 tasks (20 images)")
    assert "| lung | 10 | aca, normal, scc |" in (tmp_path / "b" / "card.md").read_text()
    assert all(c.heads_max_abs_error is not None for c in verify_bundle(tmp_path / "b"))
    bundle, _ = write_bundle(open_source(str(tmp_path), None, None, False), tmp_path / "c", ExportSettings("c", 0.5))
    assert bundle.manifest.heads == ()


def test_golden_tiles_of_a_slide_are_its_tissue(slides_dir: Path) -> None:
    tiles = calibration_tiles(slides_dir / "CMU-1-Small-Region.svs", 96, 0.5)
    assert tiles.shape == (16, 96, 96, 3)
    assert (tiles.reshape(16, -1).std(axis=1) > 8).all()


def test_the_card_tells_all_that_was_measured(resnet18_bundle: Path) -> None:
    manifest = load_bundle(resnet18_bundle).manifest
    (fp32,) = manifest.variants
    int8 = replace(
        fp32,
        precision="int8",
        parity=replace(fp32.parity, probe_score=0.8125, probe_score_fp32=0.82, knn_agreement=0.875),
    )
    fp16 = replace(fp32, precision="fp16", fp32_kernels=4, engines=())
    key = EngineKey("tensorrt-rtx", "1.7.1", "a" * 64, "fp16", 64, (1, 16, 64), ("8.0+",))
    engines = (Engine(FileRef("engines/x.engine", "b" * 64, 2_000_000), key),)
    card = model_card(replace(manifest, variants=(fp32, fp16, int8), engines=engines, golden_source="9 images"))
    rows = [line for line in card.splitlines() if line.startswith("| fp32 |")]
    assert [row.split("|")[2].split()[0] for row in rows] == ["onnxruntime", "openvino"]
    for text in (
        "Features of the golden tiles (9 images) against",
        " 87.5% |",
        "- fp16: kernels that compute in fp32 all the same: 4.",
        "- int8: a linear probe on a real task scores 0.8125, with fp32 0.8200.",
        "| engines/x.engine (2.0 MB) | tensorrt-rtx 1.7.1 | fp16 | 1 to 64, best 16 | 8.0+ | any of these |",
    ):
        assert text in card
    assert "(synthetic)" in (resnet18_bundle / "card.md").read_text()
    assert "not run by the export: the table above says nothing of them" in card
    assert "## Engines" not in model_card(manifest)


def test_where_the_golden_tiles_come_from_is_said(resnet18_bundle: Path, run: Run) -> None:
    assert load_bundle(resnet18_bundle).manifest.golden_source == "synthetic"
    _, out, _ = run("--verify", resnet18_bundle)
    assert "golden tiles: synthetic; no real tissue was run: export with --calibration SLIDE|DIR" in out


def test_golden_tiles_of_a_folder(data_dir: Path) -> None:
    tiles = calibration_tiles(data_dir / "tasks" / "wbc_cellavision" / "test", 96, 0.5)
    assert tiles.shape == (27, 96, 96, 3)


def test_a_slide_without_a_scale_is_refused_with_a_hint_that_works_here(tmp_path: Path) -> None:
    slide = pyramid(stained(512, 512), tmp_path / "a.tiff", mpp=None)
    with pytest.raises(ExportUsageError, match=r"--calibration: .*a\.tiff") as caught:
        calibration_tiles(slide, 96, 0.5)
    assert caught.value.hint == "give a slide that states its scale"


def test_a_slide_among_the_images_is_named(tmp_path: Path) -> None:
    """OpenCV raises an error of its own for what is larger than it reads."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"pixels")),
    ]
    packed = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    (tmp_path / "slide.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    with pytest.raises(ExportUsageError, match=r"slide\.png: cannot be decoded"):
        calibration_tiles(tmp_path, 96, 0.5)


def test_synthetic_tiles_are_the_same_everywhere() -> None:
    np.testing.assert_array_equal(synthetic_tiles(48), synthetic_tiles(48))
    assert len(np.unique(synthetic_tiles(48).reshape(16, -1), axis=0)) == 16


class TestWrongUsage:
    def test_a_target_that_exists(self, resnet18_bundle: Path, tmp_path: Path) -> None:
        source = open_source("resnet18", "random", 64, True)
        with pytest.raises(ExportUsageError, match="exists already"):
            write_bundle(source, resnet18_bundle, ExportSettings("x", 0.5))
        (tmp_path / "thesis").mkdir()
        (tmp_path / "thesis" / "final.doc").touch()
        with pytest.raises(ExportUsageError, match="is no bundle; it is not replaced"):
            write_bundle(source, tmp_path / "thesis", ExportSettings("x", 0.5, overwrite=True))
        assert (tmp_path / "thesis" / "final.doc").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "SOURCE and --out are needed"),
            (["resnet50"], "SOURCE and --out are needed"),
            (["resnet49", "--weights", "random", "--out", "b"], "neither a run, nor a checkpoint, nor an architecture"),
            (["resnet18", "--out", "b"], "an architecture needs weights"),
            (["resnet18", "--weights", "nowhere.pth", "--out", "b"], "nowhere.pth"),
            (["resnet18", "--weights", "random", "--out", "b", "--precision", "fp8"], "--precision fp8"),
            (["resnet18", "--weights", "random", "--out", "b", "--calibration", "none"], "no such file or folder"),
            (["resnet18", "--weights", "random", "--out", "b", "--mpp", "0"], "--mpp 0.0: not a scale"),
            (["--verify", "b", "resnet18"], "--verify takes no SOURCE"),
        ],
    )
    def test_is_said_in_one_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, arguments: list[str], message: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        code, _, err = run(*arguments)
        assert code == 2, err
        lines = err.strip().splitlines()
        assert lines[0].startswith("error: ")
        assert message in lines[0]
        assert [line.split(":")[0] for line in lines[1:]] == ["hint"]
        assert not list(tmp_path.iterdir())

    def test_no_bundle_to_verify(self, tmp_path: Path, run: Run) -> None:
        code, _, err = run("--verify", tmp_path)
        assert (code, "not a model bundle" in err) == (2, True)


def test_help_imports_neither_torch_nor_onnx() -> None:
    code = (
        "import sys, contextlib\nfrom mtdp_export.cli import main\nsys.argv = ['mtdp-export', '--help']\n"
        "with contextlib.suppress(SystemExit): main()\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'openvino'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.rstrip().endswith("[]")
    for kind in ("<str>", "<int>", "<float", "list["):
        assert kind not in result.stdout, "an option says what it takes, not the type of that"
    assert "Exit codes: 0: all is done; 1:" in result.stdout
    assert "--precision fp32|fp16|bf16|int8" in result.stdout


def test_processes_that_prove_a_bundle_load_no_torch() -> None:
    """Each export starts some, each --verify one: torch would be half of what they take."""
    code = "import sys, mtdp_export.variants, mtdp_export.verify, mtdp_export.engines; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
