"""Kills real processes and looks at what the next one makes of it.

    python tests/reliability/killed.py FOLDER --kills 500 [--seed 0]

A run over one slide is forked from a process that has its imports done, and gets SIGKILL: in half of the trials at a
random time, in the other half at a random one of the calls that change files (before it, or right after it): writes,
syncs, renames, removals, the commit and the last rename among them. A trial kills up to three times in a row; then a
last run must end with the features, coords and status of a run that nobody disturbed, and leave nothing else behind.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnxruntime  # noqa: F401  (imported before the fork, so that each trial is short)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mtdp_runtime.backends.onnxruntime import OnnxRuntime
from mtdp_runtime.bundle import load_bundle
from mtdp_runtime.cohort import claims
from mtdp_runtime.cohort.job import Job
from mtdp_runtime.cohort.local import extract_slides
from mtdp_runtime.cohort.requests import SlideRequest
from mtdp_runtime.cohort.under_way import Run
from mtdp_runtime.extraction.models import Model
from mtdp_runtime.settings import ExtractSettings
from mtdp_runtime.store import run_log
from mtdp_runtime.store import writer as store
from support import pyramid, stained, write_tiny_bundle


def run(folder: Path, out: Path, die_at: tuple[int, bool] | None = None) -> None:
    """One whole run, as the command does it; commits after each batch, so that there are many moments to die at."""
    if die_at is not None:
        armed(*die_at)
    store._SYNC_EVERY_S = -1
    claims._WRITTEN_S = 0.2
    bundle = load_bundle(folder / "tiny")
    settings = ExtractSettings(mpp=0.5, stride_px=64, min_tissue=0)
    slides = (SlideRequest(folder / "slide.tiff"),)
    job = Job(slides=slides, out=out, bundles=(bundle,), settings=settings, threads=2, report=False)
    with OnnxRuntime.load(bundle, "fp32", 4, 1) as engine:
        failures = run_log.failures(out)
        (outcome,) = extract_slides(slides, Run(job, [Model(bundle, engine)], failures=failures))
    assert outcome.status in ("done", "skipped"), outcome


def forked(work: Callable[[], None], kill_after_s: float | None = None) -> bool:
    """Run in a child; say whether it ended by itself. An end that is neither that nor our SIGKILL is an error."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"died of {signal.Signals(os.WTERMSIG(status)).name}"
        return False
    assert os.WEXITSTATUS(status) == 0, "the run failed"
    return True


def armed(victim_call: int, after: bool) -> list[int]:
    """From now on die at that call which changes a file. Returns the count of such calls, as it grows."""
    calls = [0]

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            calls[0] += 1
            mine = calls[0] == victim_call
            if mine and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **options)
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, wrapped)

    for name in ("pwrite", "fdatasync", "fsync"):
        wrap(os, name)
    for name in ("replace", "unlink", "rmdir", "mkdir"):
        wrap(Path, name)
    for name in ("__init__", "close"):
        wrap(h5py.File, name)
    return calls


def rows(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        return {name: file[name][:] for name in ("features", "coords", "status", "tissue_fraction")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder: Path = options.folder
    rng = random.Random(options.seed)
    write_tiny_bundle(folder / "tiny")
    pyramid(stained(384, 512), folder / "slide.tiff", 0.5, 2, lossy=True)

    def counted() -> None:
        calls = armed(-1, False)
        run(folder, folder / "counted")
        (folder / "calls").write_text(str(calls[0]))

    for name in ("whole", "timed", "counted"):
        (folder / name).mkdir()
    assert forked(lambda: run(folder, folder / "whole"))
    start = time.perf_counter()
    assert forked(lambda: run(folder, folder / "timed"))
    run_s = time.perf_counter() - start
    assert forked(counted)
    most_calls = int((folder / "calls").read_text())
    whole = rows(folder / "whole" / "slide.h5")
    assert len(whole["features"]) > 30
    kills = trials = resumed = 0
    while kills < options.kills:
        out = folder / "trial"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        ended = False
        for _ in range(rng.randint(1, 3)):
            if rng.random() < 0.5:
                ended = forked(partial(run, folder, out), rng.uniform(0, 1.1 * run_s))
            else:
                call, after = rng.randint(1, most_calls), rng.random() < 0.5
                ended = forked(partial(run, folder, out, (call, after)))
            kills += not ended
            if ended:
                break
        resumed += (out / ".slide.h5.partial").exists()
        assert forked(partial(run, folder, out))
        again = rows(out / "slide.h5")
        for name, values in whole.items():
            np.testing.assert_array_equal(again[name], values, err_msg=f"{name}, trial {trials}")
        left = sorted(p.name for p in out.iterdir())
        assert left == ["run.jsonl", "slide.h5"], left
        trials += 1
    facts = {"kills": kills, "trials": trials, "resumed_from_a_partial": resumed, "file_calls_a_run": most_calls}
    print(json.dumps({**facts, "run_s": round(run_s, 3), "rows": len(whole["features"])}))


if __name__ == "__main__":
    main()
