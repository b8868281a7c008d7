"""A GPU's first eight minutes: does everything work here, is it equal, and is it fast? One command, one table.

    python benchmarks/gpu.py --out gpu [--minutes 8] [--archs NAME ...] [--bundles DIR] [--envs DIR] [--dry-run]

Each step (`gpu_steps.py`) is a process of its own with a time limit, and writes each figure as soon as it has it: a
step that crashes or hangs costs its own rows. Steps stand in the order of what one wants to know first; what does not
fit into the minutes is said. It leaves OUT/gpu.json, OUT/gpu.md (the table, and how many host cores each engine needs),
and OUT/logs. What is not installed (TensorRT, torch, LazySlide) is a line, no failure.

`--bundles` holds bundles made before, DIR/ARCH with / and : as _; without it they are exported here, of random weights.
`--dry-run` runs the same steps without a GPU: CUDA and TensorRT are acted out in host memory (tests/fake_gpu.py), the
model and the slide are tiny. Its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_table import markdown

HERE = Path(__file__).parent
VIT = "timm:vit_{}_patch16_224"
ARCHS = ("resnet50", "densenet121", VIT.format("small"), VIT.format("base"), VIT.format("large"))
DRY_ARCH = "timm:test_resnet"
ENGINES = ("tensorrt-rtx", "tensorrt", "onnxruntime-cuda", "torch", "ahead", "onnxruntime-tensorrt")
LIMITS_S = {"doctor": 60, "machine": 15, "tests": 90, "copies": 20, "slide": 40, "decode": 60, "export": 90}
LIMITS_S |= {"tensorrt": 100, "tensorrt-rtx": 60, "onnxruntime-cuda": 45, "torch": 60, "ahead": 60}
LIMITS_S |= {"onnxruntime-tensorrt": 60, "extract": 45, "peers": 90}
LEAST_S = 3  # a step is not begun with less time left


@dataclass(frozen=True, slots=True)
class Setup:
    """What all steps are told: OUT/setup.json."""

    out: str
    bundles: str
    envs: str
    dry_run: bool
    threads: tuple[int, ...] = (1, 4, 8, 16)  # of the host, for decoding
    batches: tuple[int, ...] = (64, 256, 16, 1)  # the most telling first
    scales: tuple[float, ...] = (1.0, 1.979, 2.0)
    slide_tiles: int = 10  # the generated slide repeats a base image so often in each direction
    base_px: int = 4096
    tile_px: int = 224
    read_tiles: int = 1000  # at most, for each thread


def steps(archs: tuple[str, ...]) -> list[str]:
    """Return the steps, in the order of what one wants to know first.

    >>> steps(("resnet50",))[:4], steps(("a", "b"))[-1]
    (['machine', 'doctor', 'tests', 'copies'], 'onnxruntime-tensorrt b')
    """
    found = ["machine", "doctor", "tests", "copies", "slide", "decode"]
    for number, arch in enumerate(archs):
        found += [f"export {arch}", *(f"{engine} {arch}" for engine in ENGINES)]
        if not number:
            found += [f"extract {arch}", "peers"]
    return found


def run_step(step: str, setup: Setup, limit_s: float) -> dict[str, Any]:
    """Run a step in a process of its own; return how it ended."""
    out = Path(setup.out)
    log = out / "logs" / f"{step.replace(' ', '-').replace(':', '_')}.txt"
    start = time.monotonic()
    with log.open("w") as stream:
        command = [sys.executable, str(HERE / "gpu_steps.py"), str(out), step]
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its own session: what it started goes, too
                process.wait()
    seconds = round(time.monotonic() - start, 1)
    if code == 0:
        status = "done"
    elif code is None:
        status = f"stopped after {limit_s:.0f} s"
    else:
        said = log.read_text(errors="replace").strip().splitlines()
        status = f"failed ({code}): {said[-1] if said else 'no message'}"
    return {"step": step, "status": status, "seconds": seconds}


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Return what the steps wrote; a line that a killed one cut short is left out."""
    rows = []
    path = out / "rows.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def refused(options: argparse.Namespace) -> str:
    """Say why nothing can be measured here, in a line with what to do; empty where there is a GPU."""
    if options.dry_run:
        return ""
    from mtdp_runtime.backends.gpus import gpus
    from mtdp_runtime.errors import BackendError

    try:
        gpus()
    except BackendError as error:
        return f"{error}. {error.hint}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--archs", nargs="+", help=f"smaller first; default: {' '.join(ARCHS)}")
    parser.add_argument("--bundles", type=Path, help="bundles made before")
    parser.add_argument("--envs", type=Path, help="where benchmarks/peers.py --install made LazySlide's environment")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="steps whose names begin so")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    why = refused(options)
    if why:
        print(f"error: nothing to measure: {why}", file=sys.stderr)
        sys.exit(2)
    out = options.out.resolve()
    (out / "logs").mkdir(parents=True, exist_ok=True)
    (out / "rows.jsonl").unlink(missing_ok=True)
    bundles = str((options.bundles or out / "bundles").resolve())
    setup = Setup(str(out), bundles, str(options.envs.resolve()) if options.envs else "", options.dry_run)
    archs = tuple(options.archs or ARCHS)
    if options.dry_run:
        small = {"threads": (1, 2), "batches": (4, 1), "slide_tiles": 2, "base_px": 512, "tile_px": 64}
        setup = Setup(**{**asdict(setup), **small, "read_tiles": 16})
        archs = (DRY_ARCH,)
    (out / "setup.json").write_text(json.dumps(asdict(setup)))
    report: dict[str, Any] = {"dry_run": options.dry_run, "date": time.strftime("%Y-%m-%d"), "steps": []}
    ends = time.monotonic() + 60 * options.minutes
    for step in steps(archs):
        if options.only and not any(step.startswith(name) for name in options.only):
            continue
        left_s = ends - time.monotonic()
        if left_s < LEAST_S:
            ended = {"step": step, "status": "left out: no time left", "seconds": 0.0}
        else:
            ended = run_step(step, setup, min(left_s, LIMITS_S[step.split()[0]]))
        print(f"{ended['step']:<44} {ended['seconds']:6.1f} s  {ended['status']}", flush=True)
        report["steps"].append(ended)
        report["rows"] = rows_of(out)
        (out / "gpu.json").write_text(json.dumps(report, indent=1))
        (out / "gpu.md").write_text(markdown(report))
    print(f"\n{markdown(report)}")
    if options.dry_run and any(step["status"] != "done" for step in report["steps"]):
        sys.exit(1)  # on a GPU a step may fail, and that is a finding; here it is a mistake in these scripts


if __name__ == "__main__":
    main()
