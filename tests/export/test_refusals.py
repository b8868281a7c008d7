"""What must not happen: a proof without an engine, a lost file, a leaked path, an option that does nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mtdp.backbones import Backbone
from mtdp.checkpoint import CheckpointInfo, save_checkpoint
from mtdp.multitask import MultiTaskNet
from mtdp.preprocess import Preprocessing
from mtdp_export.errors import ExportError, ExportUsageError, ParityFailure
from mtdp_export.golden import save_golden, synthetic_tiles
from mtdp_export.graph import Deployed, _check_size, export_graph, round_weights_to_fp16
from mtdp_export.onnx_source import Declared, open_onnx
from mtdp_export.pixels import as_it_is
from mtdp_export.source import open_source
from mtdp_export.verify import verify_bundle
from mtdp_export.write import ExportSettings, _with_rounding, write_bundle
from mtdp_runtime.bundle import file_ref, load_bundle
from mtdp_runtime.bundle.golden import load_golden
from mtdp_runtime.errors import OutputUnwritable
from support import Run, write_tiny_bundle

WITH_VERIFY = "--verify goes with --backend, --stall-limit, --trust-engines and --json only"


def export(*arguments: object, shadow: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run mtdp-export; modules in `shadow` stand before the installed ones."""
    command = [sys.executable, "-c", "from mtdp_export.cli import main; main()", "-q", *map(str, arguments)]
    path = [*([str(shadow)] if shadow else []), *sys.path]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    )


@pytest.fixture(scope="module")
def run_folder(small_network: MultiTaskNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run that started from a file of its machine."""
    folder = tmp_path_factory.mktemp("run")
    init = {
        "source": "x.safetensors",
        "description": "weights file x.safetensors",
        "licence": "MIT",
        "sha256": "0" * 64,
    }
    training = {
        "config": {"arch": "resnet18", "batch_size": 8, "init": "/secret/place/x.safetensors"},
        "init": init,
        "tasks": {name: {"images": 9, "classes": list(names)} for name, names in small_network.class_names.items()},
        "versions": {"torch": "2"},
    }
    info = CheckpointInfo("resnet18", small_network.class_names, Preprocessing(64), training, 5)
    save_checkpoint(folder / "checkpoint.safetensors", small_network, info)
    return folder


@pytest.fixture(scope="module")
def bundle_with_heads(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "heads"
    write_bundle(open_source(str(run_folder), None, None, True), out, ExportSettings("heads", 0.5))
    return out


@pytest.fixture
def no_engines(tmp_path: Path) -> Path:
    """A folder that makes both engines as absent as on a machine without them."""
    folder = tmp_path / "shadow"
    folder.mkdir()
    for name in ("onnxruntime", "openvino"):
        (folder / f"{name}.py").write_text(f"raise ImportError('No module named {name}')\n")
    return folder


def test_no_file_tells_a_path_of_the_training_machine(bundle_with_heads: Path) -> None:
    for file in bundle_with_heads.iterdir():
        assert b"/secret/place" not in file.read_bytes(), file.name
    assert "x.safetensors" in (bundle_with_heads / "card.md").read_text()


def test_right_features_with_wrong_probabilities_fail(bundle_with_heads: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle_with_heads, copy)
    tiles, outputs = load_golden(copy / "golden.npz")
    outputs["probabilities_lung"] = outputs["probabilities_lung"][:, [1, 2, 0]]
    save_golden(copy / "golden.npz", tiles, outputs)
    document = json.loads((copy / "bundle.json").read_text())
    ref = file_ref(copy, "golden.npz")
    document["mtdp"]["golden"] = {"file": ref.file, "sha256": ref.sha256, "size_bytes": ref.size_bytes}
    (copy / "bundle.json").write_text(json.dumps(document))
    assert not any(comparison.passed for comparison in verify_bundle(copy))


def test_without_an_engine_nothing_is_verified(bundle_with_heads: Path, no_engines: Path) -> None:
    result = export("--verify", bundle_with_heads, shadow=no_engines)
    assert result.returncode == 2
    assert result.stderr.startswith("error: no inference engine is usable here")
    assert "Traceback" not in result.stderr


def test_without_the_reference_engine_nothing_is_exported(no_engines: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "b"
    result = export("resnet18", "--weights", "random", "--tile-px", 64, "--out", out, shadow=no_engines)
    assert result.returncode == 2
    assert result.stderr.startswith("error: backend onnxruntime is not usable here")
    assert "pip install" in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists()


def test_overwrite_replaces_a_bundle_and_nothing_else(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    tiny = write_tiny_bundle(tmp_path_factory.mktemp("source") / "tiny")
    source = open_onnx(tiny / "model.fp32.onnx", Declared())
    out = tmp_path / "b"
    write_bundle(source, out, ExportSettings("first", 0.5))
    write_bundle(source, out, ExportSettings("second", 0.5, overwrite=True))
    assert load_bundle(out).manifest.name == "second"
    assert [entry.name for entry in tmp_path.iterdir()] == ["b"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ExportUsageError, match=r"is no bundle; it is not replaced \(notes.txt is in it\)"):
        write_bundle(source, out, ExportSettings("third", 0.5, overwrite=True))
    assert (out / "notes.txt").read_text() == "mine"
    assert load_bundle(out).manifest.name == "second"


def test_an_architecture_is_one_though_a_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "resnet18").mkdir()
    monkeypatch.chdir(tmp_path)
    assert open_source("resnet18", "random", 64, True).checkpoint is None


def test_a_target_that_cannot_be_written_is_said_before_the_work() -> None:
    source = open_source("resnet18", "random", 64, True)
    with pytest.raises(OutputUnwritable, match="cannot be written"):
        write_bundle(source, Path("/proc/nowhere/b"), ExportSettings("b", 0.5))


def test_fp16_storage_leaves_the_callers_network_alone(run_folder: Path, tmp_path: Path) -> None:
    source = open_source(str(run_folder), None, None, True)
    before = {name: tensor.clone() for name, tensor in source.network.state_dict().items()}
    bundle, _ = write_bundle(source, tmp_path / "b", ExportSettings("b", 0.5, weights_storage="fp16"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.network.state_dict().items())
    assert bundle.manifest.variants[0].file.size_bytes < 24e6  # of 45e6
    # Every other number is against the rounded network: how far that is from the one that was given stands in words.
    origin = bundle.manifest.weights.origin
    said = re.search(r"; kernels rounded to fp16, smallest cosine to the network before that (\S+)$", origin)
    assert said is not None
    assert 0.9999 < float(said[1]) <= 1


def test_weights_that_fp16_changes_too_much_are_not_stored_in_it(run_folder: Path) -> None:
    source = open_source(str(run_folder), None, None, True)
    tiles = synthetic_tiles(64)[:2]
    other = {"features": np.random.default_rng(0).normal(size=(2, 512)).astype(np.float32)}
    with pytest.raises(
        ParityFailure, match=r"rounding the weights brings features to a cosine of .* 0\.9999 is required"
    ):
        _with_rounding(source, tiles, other)
    network = torch.nn.Linear(2, 2)
    with torch.no_grad():
        network.weight[0, 1] = 1e5
    with pytest.raises(ExportError, match="--weights-storage fp16: weight is beyond fp16"):
        round_weights_to_fp16(network)


def test_a_network_that_no_file_can_hold_is_said_before_it_is_traced() -> None:
    network = torch.nn.Linear(30_000, 20_000, device="meta")
    with pytest.raises(ExportError, match=r"2\.4 GB of weights; one ONNX file holds at most 2\.1 GB") as caught:
        _check_size(network, "fp32")
    assert "--precision fp16 takes half of that" in caught.value.hint
    _check_size(network, "fp16")
    with pytest.raises(ExportError, match=r"2\.4 GB of weights"):
        _check_size(torch.nn.Linear(30_000, 40_000, device="meta"), "fp16")


def test_a_network_that_torch_cannot_export_is_an_error_of_ours() -> None:
    class Undecided(Backbone):
        def feature_map(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    network = MultiTaskNet(Undecided("undecided", torch.nn.Identity(), 3), {})
    with pytest.raises(ExportError, match="cannot export this network to ONNX"):
        export_graph(Deployed(network, as_it_is(Preprocessing(32))).eval(), {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet18", "--weights", "random", "--out", "b", "--backend", "openvino"], "--backend goes with --verify"),
        (["resnet18", "--weights", "random", "--out", "b", "--mpp", "inf"], "--mpp inf: not a scale"),
        (
            ["--verify", "b", "--precision", "fp32"],
            WITH_VERIFY,
        ),
        (
            ["--verify", "b", "--mpp", "0.5"],
            WITH_VERIFY,
        ),
        (
            ["--verify", "b", "--batch", "1", "64", "256"],
            WITH_VERIFY,
        ),
        (["--card", "b", "--engine", "foo"], "--card goes alone"),
        (["--card", "b", "--mpp", "0.5"], "--card goes alone"),
        (
            ["resnet18", "--weights", "random", "--out", "b", "--probe-task", "t"],
            "--probe-task goes with --precision int8",
        ),
        (["resnet18", "--weights", "random", "--out", "b", "--trust-engines"], "--trust-engines goes with --verify"),
        (
            ["resnet18", "--weights", "random", "--out", "b", "--batch", "1", "2", "3"],
            "--batch is an option of --engine",
        ),
        (["resnet18", "--weights", "random", "--out", "b", "--tile-px", "0"], "--tile-px 0: no side of a tile"),
        (
            ["--verify", "b", "--no-heads"],
            WITH_VERIFY,
        ),
    ],
)
def test_no_option_is_ignored(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*arguments)
    assert (code, err.splitlines()[0]) == (2, f"error: {message}")
    assert not list(tmp_path.iterdir())
