"""benchmarks/gpu.py without a GPU: every step runs on one that is acted out, and one that fails costs its own rows."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtdp_runtime.backends.gpus import gpus
from mtdp_runtime.errors import BackendError
from support import BENCHMARKS, script


def run_gpu(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a dry run leaves."""
    folder = tmp_path_factory.mktemp("gpu")
    result = run_gpu("--dry-run", "--out", folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (folder / "gpu.md").read_text() in result.stdout
    return folder


@pytest.fixture(scope="module")
def rows(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "gpu.json").read_text())["rows"]
    return found


def test_every_step_is_done(out: Path) -> None:
    report = json.loads((out / "gpu.json").read_text())
    names = [step["step"].split()[0] for step in report["steps"]]
    assert set(names) == set(script("gpu_steps").STEPS) == set(script("gpu").LIMITS_S)
    assert {step["status"] for step in report["steps"]} == {"done"}


def test_every_engine_is_measured_and_repeats_the_golden_tiles(rows: list[dict[str, Any]]) -> None:
    infer = [row for row in rows if row["what"] == "infer"]
    assert {row["way"] for row in infer} == {
        "tensorrt", "tensorrt-rtx", "tensorrt-rtx, built ahead", "onnxruntime-cuda", "onnxruntime-tensorrt", "torch",
    }  # fmt: skip
    assert {row["batch"] for row in infer} == {1, 4}
    assert all(row["tiles_per_s"] > 0 for row in infer)
    assert all(row["cosine"] >= 0.9999 for row in infer if row["way"] != "torch")
    ahead = [row["note"] for row in infer if row["way"] == "tensorrt-rtx, built ahead"]
    assert ahead
    assert all(note.startswith("the bundle's engines/") for note in ahead)


def test_the_whole_way_is_measured_at_each_scale_with_what_the_gpu_did(rows: list[dict[str, Any]]) -> None:
    whole = [row for row in rows if row["what"] == "extract"]
    assert [row["scale"] for row in whole] == [1.0, 1.979, 2.0]
    for row in whole:
        assert row["engine"].startswith("tensorrt")
        assert (row["gpu_used"], row["sm_mhz"]) == ("55%", 1980)
        assert min(row["read_s"], row["infer_s"], row["tiles"]) > 0


def test_the_table_says_what_it_is_and_how_many_cores_an_engine_needs(out: Path) -> None:
    said = (out / "gpu.md").read_text()
    assert "A dry run" in said
    assert "this engine needs N host cores with this reader, N = " in said
    for title in ("The model alone", "Copies alone", "Decoding on the host alone", "End to end", "Steps"):
        assert f"## {title}" in said


def test_without_a_gpu_nothing_is_begun(tmp_path: Path) -> None:
    try:
        gpus()
    except BackendError:
        result = run_gpu("--out", tmp_path)
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: nothing to measure: no NVIDIA GPU or driver")
        assert "nvidia-smi" in line
        assert not list(tmp_path.iterdir())
    else:
        pytest.skip("this machine has a GPU")


def test_a_step_that_crashes_or_hangs_is_named_and_ended(out: Path, tmp_path: Path) -> None:
    gpu = script("gpu")
    (tmp_path / "logs").mkdir()
    (tmp_path / "setup.json").write_bytes((out / "setup.json").read_bytes())
    setup = gpu.Setup(out=str(tmp_path), bundles="", envs="", dry_run=True)
    crashed = gpu.run_step("nonsense", setup, 60)
    assert crashed["status"] == "failed (1): KeyError: 'nonsense'"
    assert gpu.run_step("doctor", setup, 0.05)["status"] == "stopped after 0 s"


def test_a_line_that_a_killed_step_cut_short_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"what": "infer"}\n{"what": "inf')
    assert script("gpu").rows_of(tmp_path) == [{"what": "infer"}]


@given(st.floats(1, 1e5), st.lists(st.floats(0.2, 1.0), min_size=3, max_size=3), st.floats(1, 1e6))
def test_the_cores_that_are_named_are_enough_and_one_fewer_is_not(one: float, gains: list[float], rate: float) -> None:
    threads = [1, 4, 8, 16]
    rates = [one]
    for more, gain in zip((3, 4, 8), gains, strict=True):
        rates.append(rates[-1] + more * gain * one)
    decode = [{"scale": 1.0, "threads": n, "tiles_per_s": of} for n, of in zip(threads, rates, strict=True)]
    needed, measured = script("gpu_table").host_cores(decode, 1.0, rate)
    assert measured == (rate <= rates[-1])

    def feeds(cores: int) -> float:
        """What so many threads bring: measured, or a line between two measurements, or beyond them in proportion."""
        points = [(0, 0.0), *zip(threads, rates, strict=True)]
        if cores > 16:
            return rates[-1] * cores / 16
        (low, slow), (high, fast) = next(pair for pair in pairwise(points) if cores <= pair[1][0])
        return slow + (fast - slow) * (cores - low) / (high - low)

    assert feeds(needed) >= rate * (1 - 1e-6)
    assert needed == 1 or feeds(needed - 1) < rate * (1 + 1e-6)
