"""Every source of a bundle: timm's models, checkpoints that are not what they say; and what a bundle then tells."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image

from mtdp.backbones import build_backbone
from mtdp.checkpoint import CheckpointInfo, save_checkpoint
from mtdp.errors import CheckpointError, UsageError, WeightsError
from mtdp.multitask import MultiTaskNet
from mtdp.preprocess import Preprocessing
from mtdp.tasks import load_task
from mtdp.transfer import extract_features, load_extractor, probe_task
from mtdp_export.card import model_card
from mtdp_export.errors import ExportError, ExportUsageError
from mtdp_export.schema import check_schema
from mtdp_export.source import open_source
from mtdp_export.write import ExportSettings, write_bundle
from mtdp_runtime.bundle import default_bundle_path, load_bundle, schema
from mtdp_runtime.bundle.golden import load_golden
from support import Run

TRAINING: dict[str, Any] = {
    "config": {"arch": "resnet18", "batch_size": 8},
    "init": {"source": "random", "description": "random initialisation", "licence": "none", "sha256": None},
    "tasks": {},
    "versions": {"torch": "2"},
}


def test_a_vision_transformer_of_timm_brings_its_preprocessing(tmp_path: Path, run: Run) -> None:
    timm = pytest.importorskip("timm")
    bundle = tmp_path / "vit"
    code, out, err = run("timm:test_vit", "--weights", "random", "--out", bundle)
    assert (code, "pass" in out) == (0, True), err
    manifest = load_bundle(bundle).manifest
    assert (manifest.tile_px, manifest.mean, manifest.interpolation) == (160, (0.5, 0.5, 0.5), "bicubic")
    tiles, golden = load_golden(bundle / "golden.npz")
    source = open_source("timm:test_vit", "random", None, True)
    reference = timm.create_model("test_vit", num_classes=0).eval()
    reference.load_state_dict(source.network.backbone.trunk.state_dict())
    pixels = torch.from_numpy((tiles / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        np.testing.assert_allclose(golden["features"], reference(pixels).numpy(), rtol=1e-3, atol=1e-4)


def test_a_side_that_a_transformer_cannot_take_is_refused(tmp_path: Path, run: Run) -> None:
    pytest.importorskip("timm")
    options = ("--weights", "random", "--tile-px", 250, "--out", tmp_path / "b")
    code, _, err = run("timm:vit_tiny_patch16_224", *options)
    assert (code, err.splitlines()[1]) == (2, "hint: use its own side, 224 px")
    assert err.startswith("error: timm:vit_tiny_patch16_224 takes no images of 250 px")
    code, _, err = run("timm:no_such_model", "--weights", "random", "--out", tmp_path / "b")
    assert (code, "has no model 'no_such_model'" in err) == (2, True)


def test_a_checkpoint_with_other_classes_than_its_heads_is_refused(tmp_path: Path, run: Run) -> None:
    torch.manual_seed(0)
    net = MultiTaskNet(build_backbone("resnet18"), {"lung": ("aca", "normal", "scc")})
    for heads in ({"lung": ("aca", "normal")}, {"blood": ("a", "b", "c")}, {}):
        info = CheckpointInfo("resnet18", heads, Preprocessing(64), TRAINING, 1)
        save_checkpoint(tmp_path / "checkpoint.safetensors", net, info)
        with pytest.raises(CheckpointError, match="do not fit resnet18 and its heads") as caught:
            open_source(str(tmp_path), None, None, True)
        assert "heads.lung" in str(caught.value) or "heads.blood" in str(caught.value)
    code, _, err = run(tmp_path, "--out", tmp_path / "b")
    assert (code, err.startswith("error: "), "Traceback" in err) == (2, True, False)
    assert not (tmp_path / "b").exists()


def test_the_weights_of_a_run_bring_its_preprocessing_or_are_refused(checkpoint: Path) -> None:
    """By the architecture's mean, std and size they would compute something else than was trained."""
    with pytest.raises(
        ExportUsageError, match="a training run of ours, which has a preprocessing of its own"
    ) as caught:
        open_source("resnet18", str(checkpoint), None, True)
    assert caught.value.hint.startswith(f"mtdp-export {checkpoint} --out BUNDLE")
    assert open_source(str(checkpoint), None, None, True).preprocessing.mean == (0.6, 0.5, 0.7)


def test_a_network_that_was_fine_tuned_is_not_called_pre_trained(resnet18_bundle: Path, tmp_path: Path) -> None:
    training = {**TRAINING, "config": {"epochs": 50, "batch_size": 64, "lr": 0.01}}
    training["tasks"] = {"wbc": {"images": 90, "classes": ["a", "b"]}}
    net = MultiTaskNet(build_backbone("resnet18"), {"wbc": ("a", "b")})
    info = CheckpointInfo("resnet18", net.class_names, Preprocessing(64), training, 12)
    save_checkpoint(tmp_path / "checkpoint.safetensors", net, info)
    source = open_source(str(tmp_path), None, None, True)
    expected = "fine-tuning on wbc (90 images), epoch 12 of 50, started from: random initialisation"
    assert source.origin == expected
    card = model_card(load_bundle(resnet18_bundle).manifest, source.checkpoint)
    assert "12 epochs were done. Settings: batch_size 64" in card


class TestVerifySaysWhatIsWrong:
    @pytest.fixture
    def damaged(self, resnet18_bundle: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(resnet18_bundle, tmp_path / "copy"))

    def test_a_whole_one(self, resnet18_bundle: Path, run: Run) -> None:
        code, out, _ = run("--verify", resnet18_bundle, "--backend", "onnxruntime")
        assert code == 0
        assert "intact: model.fp32.onnx, golden.npz; reference: torch in fp32" in out
        assert out.splitlines()[-2].endswith("pass")
        assert out.splitlines()[-1].startswith("golden tiles: synthetic")

    @pytest.mark.parametrize("name", ["model.fp32.onnx", "golden.npz"])
    def test_a_missing_file(self, damaged: Path, run: Run, name: str) -> None:
        (damaged / name).unlink()
        code, _, err = run("--verify", damaged)
        assert (code, err.splitlines()[0]) == (2, f"error: {damaged / name}: missing from the bundle")

    @pytest.mark.parametrize(
        ("place", "value", "message"),
        [
            ("schema_version", 2, "schema_version: this version reads 1, got 2"),
            ("class_names", ["tumour"], "class_names: the 512 names as in mtdp"),
            ("mtdp", {}, "mtdp: weights: missing"),
        ],
    )
    def test_a_document_of_another_day(self, damaged: Path, run: Run, place: str, value: object, message: str) -> None:
        document = json.loads((damaged / "bundle.json").read_text())
        document[place] = value
        (damaged / "bundle.json").write_text(json.dumps(document))
        code, _, err = run("--verify", damaged)
        assert code == 2
        assert message in err.splitlines()[0]
        assert err.splitlines()[1].startswith("hint: ")


def test_what_is_exported_keeps_the_schema(resnet18_bundle: Path, tmp_path: Path) -> None:
    document = json.loads((resnet18_bundle / "bundle.json").read_text())
    jsonschema.Draft202012Validator(schema()).validate(document)
    check_schema(resnet18_bundle)
    document["mtdp"]["tile_px"] = "64"
    (tmp_path / "bundle.json").write_text(json.dumps(document))
    with pytest.raises(ExportError, match=r"bundle\.json: \$\.mtdp\.tile_px: '64' is not of type 'integer'"):
        check_schema(tmp_path)


def test_the_card_tells_what_the_bundle_states(run: Run) -> None:
    manifest = load_bundle(default_bundle_path()).manifest
    code, card, _ = run("--card", default_bundle_path())
    assert code == 0
    parity = manifest.variants[0].parity
    facts = [manifest.weights.origin, manifest.weights.licence, manifest.weights.sha256, "224 x 224 px, 112 µm wide"]
    facts += ["mean 0.485 0.456 0.406", f"| fp32 | {parity.backend} | {parity.tiles} | {parity.cosine_min:.8f}"]
    facts += [f"| {head.name} | {', '.join(head.class_names)} |" for head in manifest.heads]
    for fact in (*facts, "no diagnosis may rest on it", "0.5 µm per pixel"):
        assert fact in card, fact
    code, _, _ = run("--card", default_bundle_path().parent)
    assert code == 2


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blue against violet, hard enough that not everything scores 1."""
    folder = tmp_path_factory.mktemp("task")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6), ("test", 24)):
        for label, colour in (("blue", (110, 100, 170)), ("violet", (118, 100, 170))):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(np.array(colour) + rng.normal(0, 8, 3), 20, (70, 80, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / label / f"{split}{i}_{i}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    net = MultiTaskNet(build_backbone("resnet18"), {})
    preprocessing = Preprocessing(64, (0.6, 0.5, 0.7), (0.2, 0.3, 0.1), "bicubic")
    path = tmp_path_factory.mktemp("run") / "checkpoint.safetensors"
    save_checkpoint(path, net, CheckpointInfo("resnet18", {}, preprocessing, TRAINING, 1))
    return path


class TestProbeOfABundle:
    def test_it_scores_as_the_checkpoint_that_it_was_made_from(
        self, task: Path, checkpoint: Path, tmp_path: Path
    ) -> None:
        bundle, _ = write_bundle(
            open_source(str(checkpoint), None, None, True), tmp_path / "b", ExportSettings("b", 0.5)
        )
        before, after = load_extractor(str(checkpoint)), load_extractor(str(bundle.path))
        samples = load_task(task).of(("test",))
        ours = extract_features(before, samples, "fp32", batch_size=7)
        np.testing.assert_allclose(extract_features(after, samples, batch_size=7), ours, rtol=1e-3, atol=1e-4)
        expected, got = probe_task(before, load_task(task), precision="fp32"), probe_task(after, load_task(task))
        assert got.score == pytest.approx(expected.score, abs=0.5 / 48)
        assert 0.5 < expected.score < 1
        assert got.weights == f"bundle b, fp32, digest {bundle.digest[:16]}"

    def test_what_it_refuses(self, resnet18_bundle: Path, task: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="is a bundle, its model is in it"):
            load_extractor(str(resnet18_bundle), "resnet18")
        with pytest.raises(UsageError, match="judged in fp32"):
            probe_task(load_extractor(str(resnet18_bundle)), load_task(task), precision="bf16")
        copy = Path(shutil.copytree(resnet18_bundle, tmp_path / "copy"))
        document = json.loads((copy / "bundle.json").read_text())
        model = copy / "model.fp32.onnx"
        model.write_bytes(model.read_bytes()[:-1])
        with pytest.raises(WeightsError, match=r"model\.fp32\.onnx: sha256"):
            load_extractor(str(copy))
        model.unlink()
        with pytest.raises(WeightsError, match="missing from the bundle"):
            load_extractor(str(copy))
        (copy / "bundle.json").write_text(json.dumps({**document, "schema_version": 2}))
        with pytest.raises(WeightsError, match="schema version 2"):
            load_extractor(str(copy))
        (copy / "bundle.json").write_text(json.dumps({**document, "mtdp": {"variants": []}}))
        with pytest.raises(WeightsError, match="is not a bundle's description"):
            load_extractor(str(copy))
        document["mtdp"]["variants"][0]["precision"] = "bf16"
        (copy / "bundle.json").write_text(json.dumps(document))
        with pytest.raises(WeightsError, match="no fp32 variant"):
            load_extractor(str(copy))
