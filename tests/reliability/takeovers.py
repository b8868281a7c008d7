"""Runs that are stopped while they work, lose their slide to a successor, and go on: no row of theirs may stay.

    python tests/reliability/takeovers.py FOLDER --count 100 --seed 0

The first run commits after each batch. At a random moment it is stopped with SIGSTOP until its claim has expired. The
second run takes the slide over, with the rows that are there; at a random moment the first is woken with SIGCONT, and
from then on no tile can be read for it. Whatever the order: the finished file must hold what an undisturbed run gives.
Claims expire after a second here, and no two processes think that they are on one machine.
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

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mtdp_runtime.backends.onnxruntime import OnnxRuntime
from mtdp_runtime.bundle import load_bundle
from mtdp_runtime.cohort import claims
from mtdp_runtime.cohort.job import Job
from mtdp_runtime.cohort.local import extract_slides
from mtdp_runtime.cohort.requests import SlideRequest
from mtdp_runtime.cohort.under_way import Run
from mtdp_runtime.extraction.models import Model
from mtdp_runtime.pipeline import run as pipeline
from mtdp_runtime.settings import ExtractSettings
from mtdp_runtime.store import run_log, writer
from mtdp_runtime.store.layout import TileStatus
from mtdp_runtime.store.verify import verify_file
from support import pyramid, stained, write_tiny_bundle

EXPIRES_S = 0.6


def work(folder: Path, out: Path, bad: bool, tile_s: float) -> None:
    """Extract the slide; where `bad`, no tile can be read after the run was woken."""
    writer._SYNC_EVERY_S = -1
    claims.BEAT_S, claims.EXPIRES_S, claims._WRITTEN_S = 0.1, EXPIRES_S, 0.2  # type: ignore[misc]
    claims._machine = lambda: f"machine {os.getpid()}"
    read = pipeline.read_tile

    def slow(*arguments):  # type: ignore[no-untyped-def]
        time.sleep(tile_s)
        status, reason = read(*arguments)
        return (TileStatus.UNREADABLE, "as told") if bad and (out / "awake").exists() else (status, reason)

    pipeline.read_tile = slow
    settings = ExtractSettings(mpp=0.5, stride_px=32, min_tissue=0)
    bundle = load_bundle(folder / "tiny")
    with OnnxRuntime.load(bundle, "fp32", 4, 1) as engine:
        slides = (SlideRequest(folder / "slide.tiff"),)
        job = Job(slides=slides, out=out, bundles=(bundle,), settings=settings, threads=1, report=False)
        for outcome in extract_slides(slides, Run(job, [Model(bundle, engine)], failures=run_log.failures(out))):
            print(os.getpid(), outcome.status, outcome.message, file=sys.stderr)


def forked(job: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            job()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(0)
    return pid


def good(path: Path) -> np.ndarray:
    with h5py.File(path) as file:
        return np.concatenate([file["features"][:], file["status"][:][:, None]], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder, rng = options.folder, random.Random(options.seed)
    write_tiny_bundle(folder / "tiny")
    pyramid(stained(256, 320), folder / "slide.tiff", 0.5, 2, lossy=True)
    (folder / "whole").mkdir()
    os.waitpid(forked(partial(work, folder, folder / "whole", False, 0.0)), 0)
    expected = good(folder / "whole" / "slide.h5")
    wrong = taken = 0
    for _ in range(options.count):
        out = folder / "trial"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        sleeper = forked(partial(work, folder, out, True, 0.01))
        partial_file = out / ".slide.h5.partial"
        while not partial_file.exists() and os.waitpid(sleeper, os.WNOHANG) == (0, 0):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.6))
        os.kill(sleeper, signal.SIGSTOP)
        time.sleep(EXPIRES_S + 0.3)
        if (out / "slide.h5").exists():  # it was faster
            os.kill(sleeper, signal.SIGCONT)
            os.waitpid(sleeper, 0)
            continue
        successor = forked(partial(work, folder, out, False, rng.choice([0.0, 0.005])))
        while not (out / ".claims" / "slide.2").exists() and not (out / "slide.h5").exists():
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.8))
        (out / "awake").touch()
        os.kill(sleeper, signal.SIGCONT)
        for pid in (sleeper, successor):
            os.waitpid(pid, 0)
        taken += 1
        os.waitpid(forked(partial(work, folder, out, False, 0.0)), 0)  # whoever was told that it is another's
        found = good(out / "slide.h5")
        if found.tobytes() != expected.tobytes() or verify_file(out / "slide.h5").status != "ok":
            wrong += 1
            print(f"wrong: {int((found[:, -1] != 0).sum())} bad rows of {len(found)}")
    print(json.dumps({"trials": options.count, "taken_over": taken, "wrong": wrong, "rows": len(expected)}))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
