"""Runs in which one call to the file system fails once, each followed by a rerun: what they end with is compared.

    python tests/reliability/injections.py FOLDER --count 500 --seed 0

A random call below the output folder (write, pwrite, fsync, fdatasync, rename, open, ftruncate, mmap) fails
with EIO, ENOSPC or ESTALE; a sync that fails may lose what was written, as a disk may. What then has its final name
must be right at once. The same command again must end as an undisturbed run does: the datasets byte by byte, the
derived files, nothing left over, every checksum right, and no failure remembered as a slide's.

The harness starts itself anew under LD_PRELOAD with `faults.c`, which gcc builds, and forks for each run.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import hashlib
import json
import os
import random
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mtdp_runtime.backends.onnxruntime import OnnxRuntime
from mtdp_runtime.bundle import load_bundle
from mtdp_runtime.cohort.job import Job
from mtdp_runtime.cohort.local import extract_slides
from mtdp_runtime.cohort.requests import SlideRequest
from mtdp_runtime.cohort.under_way import Run
from mtdp_runtime.errors import RuntimeFailure
from mtdp_runtime.extraction.models import Model
from mtdp_runtime.settings import ExtractSettings
from mtdp_runtime.store import run_log, writer
from mtdp_runtime.store.verify import verify_file
from shim import build_shim
from support import pyramid, stained, write_tiny_bundle

CALLS = ("write", "pwrite", "fsync", "fdatasync", "rename", "open", "ftruncate", "mmap")
ERRORS = (errno.EIO, errno.ENOSPC, errno.ESTALE)
SLIDES = ("a", "b")
FORMATS = ("pt", "npy", "csv", "geojson")


def run(folder: Path, out: Path, drop: bool) -> list[tuple[str, str, bool]]:
    """Do what the command does; return status, message and whether it is remembered, of each slide."""
    writer._SYNC_EVERY_S = 0.02
    settings = ExtractSettings(mpp=0.5, stride_px=32, min_tissue=0, on_bad_tile="drop" if drop else "nan")
    bundle = load_bundle(folder / "tiny")
    with OnnxRuntime.load(bundle, "fp32", 4, 1) as engine:
        requests = tuple(SlideRequest(folder / f"{name}.tiff") for name in SLIDES)
        job = Job(slides=requests, out=out, bundles=(bundle,), settings=settings, threads=1, formats=FORMATS)
        try:
            whole = Run(job, [Model(bundle, engine)], failures=run_log.failures(out))
            return [(one.status, one.message, bool(one.attempt)) for one in extract_slides(requests, whole)]
        except RuntimeFailure as error:
            return [("ended", str(error), False)]


def forked(work: Callable[[], Any]) -> Any:
    """Run in a child and return its result; a child that dies of anything, or raises, says so instead."""
    reader, pipe = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            result = work()
        except BaseException as error:
            result = [("raised", f"{type(error).__name__}: {error}", False)]
        os.write(pipe, json.dumps(result).encode())
        os._exit(0)
    os.close(pipe)
    with os.fdopen(reader, "rb") as stream:
        text = stream.read()
    _, status = os.waitpid(pid, 0)
    return json.loads(text) if text else [("died", f"status {status}", False)]


def content(out: Path) -> dict[str, str]:
    """Return a digest of every file whose bytes are the features' alone, and the names of all others."""
    found = {}
    for path in sorted(one for one in out.rglob("*") if one.is_file()):
        name, digest = str(path.relative_to(out)), hashlib.sha256()
        if path.suffix == ".h5" and not path.name.startswith("."):
            with h5py.File(path, locking=False) as file:
                for dataset in file:
                    digest.update(f"{dataset} {file[dataset].dtype} {file[dataset].shape}".encode())
                    digest.update(file[dataset][()].tobytes())
        elif path.suffix == ".pt" and not path.name.startswith("."):
            with zipfile.ZipFile(path) as archive:
                for entry in archive.namelist():
                    digest.update(archive.read(entry))
        elif path.suffix in (".npy", ".csv", ".geojson"):
            digest.update(path.read_bytes())
        found[name] = digest.hexdigest()
    return found


class Trials:
    """The undisturbed run, and what became of the others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_tiny_bundle(folder / "tiny")
        for seed, name in enumerate(SLIDES):
            pyramid(stained(256, 320, seed), folder / f"{name}.tiff", 0.5, 2, lossy=True)
        self.whole, self.most = {}, {}
        for drop in (False, True):
            out = folder / f"whole-{drop}"
            out.mkdir()
            assert [one[0] for one in forked(lambda out=out, drop=drop: run(folder, out, drop))] == ["done", "done"]
            self.whole[drop] = content(out)
        for call in CALLS:
            out = folder / "counted"
            out.mkdir()
            self.most[call] = forked(partial(self.counted, out, call))
            shutil.rmtree(out)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def counted(self, out: Path, call: str) -> int:
        self.disturbed(out, False, call, -1, 0, False)
        return int(ctypes.CDLL(None).fault_seen())

    def disturbed(self, out: Path, drop: bool, call: str, number: int, error: int, lose: bool) -> Any:
        ctypes.CDLL(None).fault_arm(str(out).encode(), call.encode(), ctypes.c_long(number), error, int(lose))
        result = run(self.folder, out, drop)
        ctypes.CDLL(None).fault_disarm()
        return result

    def trial(self, rng: random.Random) -> None:
        call = rng.choice([call for call in CALLS if self.most[call]])
        number, error = rng.randint(1, self.most[call]), rng.choice(ERRORS)
        lose, drop = rng.random() < 0.5, rng.random() < 0.25
        out = self.folder / "trial"
        out.mkdir()
        what = f"{call} {number} of {self.most[call]}: {errno.errorcode[error]}{', lost' if lose else ''}"
        what += ", drop" if drop else ""
        first = forked(lambda: self.disturbed(out, drop, call, number, error, lose))
        said = [one for one in first if one[0] not in ("done", "no-tissue")]
        for name in SLIDES:  # what has its name is right at once
            if (out / f"{name}.h5").exists() and content(out)[f"{name}.h5"] != self.whole[drop][f"{name}.h5"]:
                self.wrong.append(f"{what}: {name}.h5 is wrong after {first}")
        if any(one[2] or one[0] in ("died", "raised") for one in first):
            self.wrong.append(f"{what}: blamed or died: {first}")
        again = forked(lambda: run(self.folder, out, drop))
        there, expected = content(out), self.whole[drop]
        equal = {name: digest for name, digest in there.items() if expected.get(name) == digest}
        odd = sorted({*there, *expected} - {*equal})
        if [one[0] for one in again if one[0] not in ("done", "skipped")]:
            self.wrong.append(f"{what}: the rerun ended with {again} after {first}")
        elif odd:
            self.wrong.append(f"{what}: after the rerun {odd} differ; first {first}")
        elif bad := [one for name in SLIDES if (one := verify_file(out / f"{name}.h5")).status != "ok"]:
            self.wrong.append(f"{what}: {bad}")
        self.counts["said" if said else "unnoticed"] += 1
        self.counts[call] += 1
        shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    folder.mkdir(exist_ok=True)
    if not hasattr(ctypes.CDLL(None), "fault_arm"):
        os.environ["LD_PRELOAD"] = str(build_shim(folder))
        os.execv(sys.executable, [sys.executable, *sys.argv])
    trials, rng = Trials(folder), random.Random(options.seed)
    for _ in range(options.count):
        trials.trial(rng)
    for line in trials.wrong:
        print(line)
    print(json.dumps({"injections": options.count, "wrong": len(trials.wrong), "calls": trials.most} | trials.counts))
    sys.exit(bool(trials.wrong))


if __name__ == "__main__":
    main()
