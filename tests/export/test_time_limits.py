"""Foreign models: one that computes for ever is ended, by a limit or a signal; what one is called stays text."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from hostile_models import endless_bundle, endless_onnx
from mtdp_runtime.bundle import file_ref, write_manifest
from support import make_manifest, pyramid, stained, write_tiny_bundle

EXPORT = "from mtdp_export.entry import main; main()"
EXTRACT = "from mtdp_runtime.commands.entry import extract; extract()"
PIXELS = ("--mean", "0", "0", "0", "--std", "1", "1", "1")


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless_bundle(tmp_path_factory.mktemp("endless") / "bundle")


@pytest.mark.parametrize("of_constants", [False, True])
def test_an_onnx_file_that_loops_for_ever_is_ended_in_one_line(tmp_path: Path, of_constants: bool) -> None:
    file = endless_onnx(tmp_path / "endless.onnx", of_constants)
    out = tmp_path / "bundles" / "own"
    done = run(EXPORT, "-q", "--onnx", file, *PIXELS, "--stall-limit", 1, "--out", out)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == f"error: --onnx {file}: one step took more than 1 s, and was ended"
    assert "--stall-limit" in done.stderr.splitlines()[1]
    assert len(done.stderr.splitlines()) == 2
    assert not list(tmp_path.glob("bundles/*")), "nothing is left of it"


def test_a_bundle_that_loops_for_ever_fails_its_proof_in_time(bundle: Path) -> None:
    done = run(EXPORT, "-q", "--verify", bundle, "--stall-limit", 1)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: the parity check of {bundle}: one step took more than 1 s, and was ended\n")


@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--workers", "2", "--threads", "2")])
def test_extraction_ends_a_model_that_is_never_loaded(tmp_path: Path, bundle: Path, more: tuple[str, ...]) -> None:
    slide = pyramid(stained(256, 256), tmp_path / "slide.tiff", 0.5)
    done = run(EXTRACT, slide, "--model", bundle, "--stall-limit", 1, "--out", tmp_path / "out", *more)
    assert done.returncode == 2
    first = done.stderr.splitlines()[0]
    who = "a worker" if "--workers" in more else "the process"
    assert first == (f"error: {who} read and computed nothing for 1 s and was ended while it loaded the model {bundle}")


@pytest.fixture
def endless_export(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", EXPORT, "--onnx", str(endless_onnx(tmp_path / "endless.onnx")), *PIXELS]
    command += ["--out", str(tmp_path / "out" / "own")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_and_what_it_started(
    endless_export: subprocess.Popen[str], tmp_path: Path, signum: int, code: int
) -> None:
    assert endless_export.stderr is not None
    assert endless_export.stderr.readline().startswith("reading ")
    children = Path(f"/proc/{endless_export.pid}/task/{endless_export.pid}/children").read_text().split()
    assert children
    endless_export.send_signal(signum)
    _, said = endless_export.communicate(timeout=60)
    assert endless_export.returncode == code
    assert said.splitlines() == ["stopped: what was computed is kept; run the same command again to go on"]
    assert not [child for child in children if os.path.exists(f"/proc/{child}/fd/0")]  # noqa: PTH110
    assert not list((tmp_path).glob("out/*"))


def test_names_in_a_foreign_bundle_command_no_terminal(tmp_path: Path) -> None:
    folder, evil = write_tiny_bundle(tmp_path / "evil"), "x\x1b[2J\x1b]0;owned\x07\x9b31m"
    model = onnx.load(folder / "model.fp32.onnx")
    model.graph.node[0].op_type = f"Cast{evil}"
    onnx.save(model, folder / "model.fp32.onnx")
    manifest = make_manifest(file_ref(folder, "model.fp32.onnx"), file_ref(folder, "golden.npz"))
    weights = replace(manifest.weights, origin=evil, licence=evil)
    write_manifest(folder, replace(manifest, name=evil, weights=weights))
    for way in ("--card", "--verify"):
        done = run(EXPORT, way, folder)
        assert done.stdout
        assert not [c for c in done.stdout + done.stderr if not c.isprintable() and c != "\n"]
