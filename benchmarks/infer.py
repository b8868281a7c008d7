"""The model alone: torch, ONNX Runtime and OpenVINO on the same batch of uint8 tiles, in turns.

    python benchmarks/infer.py [--arch resnet50 densenet121] [--batch 16] [--rounds 5] [--limit-s 180] [--json]
    python benchmarks/infer.py --arch timm:vit_small_patch16_224 timm:vit_base_patch16_224 --batch 8 --rounds 3

Random weights; the rate does not depend on them. torch gets its tiles normalised, as float32[N, 3, H, W], and computes
as built, channels-last (not transformers) and compiled, in fp32 and by autocast in bf16; all others start from
uint8[N, H, W, 3]. int8 is by NNCF, calibrated on the demo slide: its rate counts, its features do not. What this CPU
does not run is left out, torch's emulation of bf16 included, which takes a second a tile.

Each way has a process of its own, in which it waits while the others have their turns; one that fails, or has no answer
within --limit-s, costs its own row.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from int8 import with_int8
from numpy.typing import NDArray

from mtdp_export.golden import calibration_tiles
from mtdp_export.graph import Deployed
from mtdp_export.isolated import limited
from mtdp_export.source import open_source
from mtdp_export.write import ExportSettings, write_bundle
from mtdp_runtime.backends import backend_class
from mtdp_runtime.bundle import load_bundle
from mtdp_runtime.commands.demo_slide import write_demo_slide

Run = Callable[[], object]
GRAPHS = (
    ("onnxruntime", "fp32"),
    ("onnxruntime", "int8"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
)
LAYOUTS = ("as built", "channels last", "compiled")
CALIBRATING = 8  # tiles: enough for a rate


@dataclass(frozen=True, slots=True)
class Way:
    """What runs a batch, as a process of its own needs it."""

    engine: str
    precision: str
    how: str  # torch: one of LAYOUTS; else the folder of the bundle
    arch: str
    threads: int

    @property
    def name(self) -> str:
        return f"{self.engine} {self.precision}" + (f", {self.how}" if self.engine == "torch" else "")

    def load(self, batch: NDArray[np.uint8]) -> Run:
        torch.set_num_threads(self.threads)
        if self.engine == "torch":
            return self._torch(batch)
        backend = backend_class(self.engine).load(load_bundle(self.how), self.precision, len(batch), self.threads)
        return lambda: backend.result(backend.submit(batch))

    def _torch(self, batch: NDArray[np.uint8]) -> Run:
        source = open_source(self.arch, "random", None, False)
        layout = torch.channels_last if self.how == "channels last" else torch.contiguous_format
        images = (
            Deployed(source.network, source.pixels).pixels(torch.from_numpy(batch)).contiguous(memory_format=layout)
        )
        module = source.network.backbone.eval().to(memory_format=layout)
        model = torch.compile(module) if self.how == "compiled" else module

        def run() -> object:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
                return model(images)

        return run


def serve(pipe: Connection, way: Way, batch: NDArray[np.uint8]) -> None:
    """In a process of its own: load, warm up, then time one batch whenever asked, until the pipe closes."""
    try:
        run = way.load(batch)
        run()
        pipe.send(0.0)
        while True:
            pipe.recv()
            start = time.perf_counter()
            run()
            pipe.send(time.perf_counter() - start)
    except EOFError:
        return
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")


class Failed(Exception):
    """A way has no time to tell."""


@contextmanager
def served(way: Way, batch: NDArray[np.uint8], limit_s: float) -> Iterator[Callable[[], float]]:
    """Start a way; yield what returns the seconds of one batch.

    Raises:
        Failed: it could not be loaded, crashed, or took too long.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, way, batch), daemon=True)
    process.start()
    theirs.close()

    def answer() -> float:
        if not ours.poll(limit_s):
            raise Failed(f"no answer within {limit_s:g} s")
        try:
            got: float | str = ours.recv()
        except EOFError:
            raise Failed("its process crashed") from None
        if isinstance(got, str):
            raise Failed(got)
        return got

    def one_batch() -> float:
        with contextlib.suppress(OSError):  # crashed: the answer says so
            ours.send(None)
        return answer()

    try:
        answer()  # it is warm
        yield one_batch
    finally:
        ours.close()
        process.join(1)
        process.kill()
        process.join()


def ways_of(arch: str, threads: int, folders: dict[str, Path]) -> list[Way]:
    """Return what this CPU runs; `folders` holds the bundle for each precision that there is one for."""
    offered = {engine: backend_class(engine).probe().precisions for engine in ("onnxruntime", "openvino")}
    layouts = [how for how in LAYOUTS if not (arch.startswith("timm:") and how == "channels last")]
    precisions = [one for one in ("fp32", "bf16") if one == "fp32" or one in offered["openvino"]]
    ways = [Way("torch", precision, how, arch, threads) for how in layouts for precision in precisions]
    graphs = [(engine, one) for engine, one in GRAPHS if one in offered[engine] and (one != "int8" or one in folders)]
    return ways + [Way(engine, one, str(folders.get(one, folders["fp32"])), arch, threads) for engine, one in graphs]


def export(arch: str, folder: Path, batch: int) -> NDArray[np.uint8]:
    """Write the bundle; return uint8[batch, P, P, 3] of tissue."""
    slide = folder / "demo.tiff"
    write_demo_slide(slide)
    source = open_source(arch, "random", None, False)
    manifest = write_bundle(source, folder / "fp32", ExportSettings(name="random", mpp=0.5))[0].manifest
    tiles = calibration_tiles(slide, manifest.tile_px, manifest.mpp, max(batch, CALIBRATING))
    return np.ascontiguousarray(np.resize(tiles, (max(batch, CALIBRATING), *tiles.shape[1:])))


def quantise(folder: Path, tiles: NDArray[np.uint8]) -> None:
    bundle = load_bundle(folder / "fp32")
    with_int8(bundle, folder / "int8", "nncf", bundle.checked(bundle.variant("fp32").file), tiles)


def measure(arch: str, options: argparse.Namespace, folder: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Return tiles/s of each way, medians over rounds in which each takes one batch; and why others have none."""
    tiles = export(arch, folder, options.batch)
    folders, failed = {"fp32": folder / "fp32"}, {}
    try:
        limited("int8", options.limit_s, quantise, folder, tiles[:CALIBRATING])
        folders["int8"] = folder / "int8"
    except Exception as error:
        failed["int8"] = str(error)
    seconds: dict[str, list[float]] = {}
    with ExitStack() as stack:
        turns: dict[str, Callable[[], float]] = {}
        for way in ways_of(arch, options.threads, folders):
            try:
                turns[way.name] = stack.enter_context(served(way, tiles[: options.batch], options.limit_s))
            except Failed as error:
                failed[way.name] = str(error)
        for _ in range(options.rounds):
            for name in [name for name in turns if name not in failed]:
                try:
                    seconds.setdefault(name, []).append(turns[name]())
                except Failed as error:
                    failed[name] = str(error)
    rates = {name: options.batch / statistics.median(s) for name, s in seconds.items() if name not in failed}
    return rates, failed


def table(rates: dict[str, dict[str, float]]) -> str:
    """Return the rates, each with how many times torch's fastest it is."""
    by_torch = {arch: [rate for name, rate in of.items() if name.startswith("torch")] for arch, of in rates.items()}
    best = {arch: max(found, default=float("nan")) for arch, found in by_torch.items()}  # all of them may have failed
    lines = [" | ".join(["tiles/s (times torch's fastest)".ljust(31), *(arch.ljust(28) for arch in rates)])]
    for name in dict.fromkeys(name for of in rates.values() for name in of):
        cells = [f"{of[name]:.1f} ({of[name] / best[arch]:.2f})" if name in of else "-" for arch, of in rates.items()]
        lines.append(" | ".join([name.ljust(31), *(cell.ljust(28) for cell in cells)]))
    return "\n".join(line.rstrip() for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["resnet50", "densenet121"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--limit-s", type=float, default=180, help="for int8, for a way to load, and for each batch")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rates, failed = {}, {}
    for arch in options.arch:
        with tempfile.TemporaryDirectory() as folder:
            rates[arch], failed[arch] = measure(arch, options, Path(folder))
        for name, reason in failed[arch].items():
            print(f"{arch}: {name}: {reason}", file=sys.stderr)
    if options.json:
        settings = {"batch": options.batch, "threads": options.threads}
        print(json.dumps(settings | {"tiles_per_s": rates, "failed": failed}))
        return
    print(table(rates))


if __name__ == "__main__":
    main()
