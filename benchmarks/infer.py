"""The model alone: torch, ONNX Runtime and OpenVINO on the same batch of uint8 tiles, in turns.

    python benchmarks/infer.py [--arch resnet50 densenet121] [--batch 16] [--rounds 5] [--json]

Random weights; the rate does not depend on them. torch gets its tiles normalised, as float32[N, 3, H, W]; all others
start from uint8[N, H, W, 3]. int8 is by NNCF, calibrated on the demo slide: its rate counts, its features do not.
What this CPU does not run is left out, torch's emulation of bf16 included, which takes a second a tile.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
from int8 import with_int8
from numpy.typing import NDArray

from mtdp_export.golden import calibration_tiles
from mtdp_export.graph import Deployed
from mtdp_export.source import Source, open_source
from mtdp_export.write import ExportSettings, write_bundle
from mtdp_runtime.backends import Backend, backend_class
from mtdp_runtime.commands.demo_slide import write_demo_slide

Way = Callable[[], object]
GRAPHS = (("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"), ("openvino", "int8"))


def torch_ways(source: Source, batch: NDArray[np.uint8]) -> dict[str, Way]:
    """Return what runs a batch through torch: fp32, and bf16 by autocast, in either memory layout."""
    ways: dict[str, Way] = {}
    tiles = Deployed(source.network, source.pixels).pixels(torch.from_numpy(batch))
    for name, layout in (("as built", torch.contiguous_format), ("channels last", torch.channels_last)):
        model = copy.deepcopy(source.network.backbone).eval().to(memory_format=layout)
        images = tiles.contiguous(memory_format=layout)
        for precision in ("fp32", "bf16") if "bf16" in backend_class("openvino").probe().precisions else ("fp32",):
            ways[f"torch {precision}, {name}"] = partial(through_torch, model, images, precision == "bf16")
    return ways


def through_torch(model: torch.nn.Module, images: torch.Tensor, bf16: bool) -> object:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return model(images)


def through(backend: Backend, batch: NDArray[np.uint8]) -> object:
    return backend.result(backend.submit(batch))


def measure(arch: str, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Return tiles/s of each way: medians over rounds in which each takes one batch."""
    source = open_source(arch, "random", None, False)
    slide = folder / "demo.tiff"
    write_demo_slide(slide)
    bundle, _ = write_bundle(source, folder / "bundle", ExportSettings(name=arch, mpp=0.5))
    manifest = bundle.manifest
    tiles = calibration_tiles(slide, manifest.tile_px, manifest.mpp, 2 * options.batch)
    base = bundle.checked(bundle.variant("fp32").file)
    quantised = with_int8(bundle, folder / "int8", "nncf", base, tiles[::2])
    batch = np.ascontiguousarray(np.resize(tiles, (options.batch, *tiles.shape[1:])))
    ways = torch_ways(source, batch)
    with ExitStack() as stack:
        for engine, precision in GRAPHS:
            if precision not in backend_class(engine).probe().precisions:
                continue
            of = quantised if precision == "int8" else bundle
            backend = backend_class(engine).load(of, precision, options.batch, options.threads)
            stack.enter_context(backend)
            ways[f"{engine} {precision}"] = partial(through, backend, batch)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - start)
    return {name: options.batch / statistics.median(times[1:]) for name, times in seconds.items()}  # the first warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["resnet50", "densenet121"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rates = {}
    for arch in options.arch:
        with tempfile.TemporaryDirectory() as folder:
            rates[arch] = measure(arch, options, Path(folder))
    if options.json:
        print(json.dumps({"batch": options.batch, "threads": options.threads, "tiles_per_s": rates}))
        return
    print(f"{'tiles/s':<28}", *(f"{arch:<14}" for arch in rates))
    for name in next(iter(rates.values())):
        print(f"{name:<28}", *(f"{rate[name]:<14.1f}" for rate in rates.values()))


if __name__ == "__main__":
    main()
