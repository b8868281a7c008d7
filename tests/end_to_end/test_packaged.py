"""What ships in the package works on its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from mtdp_runtime.bundle import default_bundle_path, load_bundle


def command(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    code = f"from {module} import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_the_default_model_is_small_and_tells_its_story() -> None:
    folder = default_bundle_path()
    manifest = load_bundle(folder).manifest
    assert manifest.arch == "densenet121"
    assert manifest.features_dim == 1024
    assert sum(f.stat().st_size for f in folder.iterdir()) < 20e6
    card = (folder / "card.md").read_text(encoding="utf-8").lower()
    for head in manifest.heads:
        assert head.name.lower() in card
    for word in ("licence", "not for", "imagenet", "iterations"):
        assert word in card


def test_the_default_model_proves_itself_here() -> None:
    result = command("mtdp_export.cli", "--verify", default_bundle_path(), "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    assert {c["backend"].split()[0] for c in json.loads(result.stdout)["parity"]} == {"openvino", "onnxruntime"}


def test_the_demo(tmp_path: Path) -> None:
    result = command("mtdp_runtime.commands.extract", "--demo", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "demo-slide.tiff: " in result.stdout
    report, look = result.stdout.splitlines()[-2:]
    assert Path(report.removeprefix("report: ")).is_file()
    assert look.endswith(f"mtdp-view {tmp_path}")
    with h5py.File(tmp_path / "demo-slide.h5") as file:
        assert file["features"].shape[1] == 1024
        assert file["features"].shape[0] > 200
        assert np.isfinite(file["features"][:]).all()
    assert (tmp_path / "report" / "demo-slide.html").is_file()


def test_the_doctor_finds_this_machine_fit() -> None:
    result = command("mtdp_runtime.commands.doctor", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    findings = json.loads(result.stdout)
    assert findings["problems"] == []
    assert findings["averaging"].startswith(("compiled, ", "by NumPy, "))
    assert set(findings["self_test"]) == {"openvino", "onnxruntime"}


@pytest.mark.parametrize("what", ["read", "infer", "extract"])
def test_the_bench_measures_each_stage(tmp_path: Path, what: str) -> None:
    from mtdp_runtime.commands.demo_slide import write_demo_slide

    write_demo_slide(tmp_path / "demo.tiff", 1536, 1024)
    result = command(
        "mtdp_runtime.commands.bench", what, tmp_path / "demo.tiff", "--repeats", 1, "--batch", 4, "--json"
    )
    assert result.returncode == 0, result.stderr
    rates = json.loads(result.stdout)
    assert rates[f"{what}_tiles_per_s"] > 0
    assert ("ceiling_tiles_per_s" in rates) == (what == "extract")


SETTINGS = ["--batch", 4, "--no-report", "--precision", "fp32"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a slide, and with the features of a run that nobody stopped."""
    from mtdp_runtime.commands.demo_slide import write_demo_slide

    folder = tmp_path_factory.mktemp("undisturbed")
    write_demo_slide(folder / "demo.tiff", 2048, 2048)
    assert command("mtdp_runtime.commands.extract", folder / "demo.tiff", *SETTINGS, "--out", folder).returncode == 0
    return folder


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_run_goes_on_to_the_same_bytes(undisturbed: Path, tmp_path: Path, signum: int, code: int) -> None:
    options = [undisturbed / "demo.tiff", *SETTINGS]
    program = [sys.executable, "-c", "from mtdp_runtime.commands.extract import main; main()", *map(str, options)]
    process = subprocess.Popen([*program, "--out", str(tmp_path / "stopped")], stderr=subprocess.PIPE, text=True)
    partial = tmp_path / "stopped" / ".demo.h5.partial"
    while not partial.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(process.pid, signum)
    _, errors = process.communicate()
    assert process.returncode == code
    assert "Traceback" not in errors
    assert not (tmp_path / "stopped" / "demo.h5").exists()
    result = command("mtdp_runtime.commands.extract", *options, "--out", tmp_path / "stopped")
    assert result.returncode == 0, result.stderr
    with h5py.File(undisturbed / "demo.h5") as a, h5py.File(tmp_path / "stopped" / "demo.h5") as b:
        np.testing.assert_array_equal(a["features"][:], b["features"][:])
        np.testing.assert_array_equal(a["coords"][:], b["coords"][:])
    assert not partial.exists()
