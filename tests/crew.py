"""Workers that are killed and stopped from outside: which process has a slide is what its claim says."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import h5py

import warm
from support import pyramid, stained

# A stride of 5 px makes thousands of tiles of a slide of a hundred KB: long enough to be met in the middle.
OPTIONS = ("--stride-px", 5, "--backend", "onnxruntime", "--threads", 2, "--no-report")
BIG, SMALL = (384, 512), (96, 128)


def write_cohort(folder: Path, big: int, small: int) -> Path:
    """Write slides big-0, big-1, ... and small-0, ..."""
    folder.mkdir()
    for kind, count, (height, width) in (("big", big, BIG), ("small", small, SMALL)):
        for number in range(count):
            pyramid(stained(height, width, number), folder / f"{kind}-{number}.tiff", 0.5, 1, lossy=True)
    return folder


def owner(out: Path, slide: str) -> int | None:
    """Return the process that has claimed a slide and stored rows of it."""
    for claim in out.glob(f".claims/{slide}.*"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            if (out / f".{slide}.h5.partial").stat().st_size:
                return int(json.loads(claim.read_bytes())["pid"])
    return None


def run_and_disturb(
    arguments: list[object], out: Path, disturb: Mapping[str, tuple[int, int]]
) -> subprocess.CompletedProcess[str]:
    """Run the command, and signal whoever works on a slide: `disturb` says by slide with what, and how many times."""
    code = "from mtdp_runtime.commands.extract import main; main()"
    process = warm.start(code, *arguments, "--out", out)
    left, met = {slide: times for slide, (_, times) in disturb.items()}, dict[str, set[int]]()
    give_up_s = time.monotonic() + 120
    while process.poll() is None and any(left.values()):
        assert time.monotonic() < give_up_s
        for slide in [slide for slide, times in left.items() if times]:
            pid = owner(out, slide)
            if pid is not None and pid not in met.setdefault(slide, set()):
                met[slide].add(pid)
                left[slide] -= 1
                os.kill(pid, disturb[slide][0])
        time.sleep(0.005)
    stdout, stderr = process.communicate(timeout=120)
    assert not any(left.values()), f"never met: {left}\n{stdout}{stderr}"
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def content(out: Path) -> dict[str, str]:
    """Return a digest of the datasets of each finished file."""
    found = {}
    for path in sorted(out.glob("*.h5")):
        digest = hashlib.sha256()
        with h5py.File(path, locking=False) as file:
            for name in sorted(file):
                digest.update(f"{name} {file[name].dtype} {file[name].shape}".encode())
                digest.update(file[name][()].tobytes())
        found[path.stem] = digest.hexdigest()
    return found


def survives(
    run: Callable[[list[object], Path, Mapping[str, tuple[int, int]]], subprocess.CompletedProcess[str]],
    slides: Path,
    tiny_bundle: Path,
    whole: dict[str, str],
    out: Path,
    *scheduler: object,
) -> None:
    """Run with one worker killed and one stopped in mid-slide, and one slide that kills each: what must come of it."""
    arguments = [slides, "--model", tiny_bundle, *OPTIONS, "--stall-limit", 5, *scheduler]
    faults = {"big-0": (signal.SIGKILL, 1), "big-1": (signal.SIGSTOP, 1), "big-2": (signal.SIGKILL, 2)}
    result = run(arguments, out, faults)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    there = content(out)
    assert there == {name: digest for name, digest in whole.items() if name != "big-2"}
    failed = [line for line in result.stderr.splitlines() if "failed: " in line]
    assert len(failed) == 1
    assert "big-2.tiff: the process died" in failed[0]
    again = run(arguments, out, {})
    assert again.returncode == 0, again.stderr
    assert content(out) == whole
    assert not list(out.glob(".claims/*"))
