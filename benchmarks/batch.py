"""What `--batch auto` should be on a CPU: the model alone at several batch sizes, in turns.

    python benchmarks/batch.py [--arch resnet50 densenet121] [--sizes 1 2 4 8 16 32] [--rounds 5] [--json]

Random weights; the rate does not depend on them. Two batches in flight, as in a run. OpenVINO in each precision that
`auto` considers here, and ONNX Runtime. `loaded_s` is what it took to load the model for batches of that size.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from mtdp_export.source import open_source
from mtdp_export.write import ExportSettings, write_bundle
from mtdp_runtime.backends import backend_class
from mtdp_runtime.backends.speed import infer_rate
from mtdp_runtime.bundle import Bundle

TILES_A_TURN = 32  # at least, for each size


def measure(bundle: Bundle, name: str, precision: str, options: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Return for each size tiles/s, the median over rounds in which each size has one turn, and the seconds to load."""
    with ExitStack() as stack:
        engines, loaded_s = {}, {}
        for size in options.sizes:
            start = time.perf_counter()
            engine = backend_class(name).load(bundle, precision, size, options.threads)
            loaded_s[size] = time.perf_counter() - start
            engines[size] = stack.enter_context(engine)
        rates: dict[int, list[float]] = {size: [] for size in options.sizes}
        for _ in range(options.rounds):
            for size, engine in engines.items():
                tiles = max(TILES_A_TURN, engine.depth * size)
                rates[size].append(infer_rate(engine, tiles, bundle.manifest.tile_px))
    return {size: {"tiles_per_s": statistics.median(rates[size]), "loaded_s": loaded_s[size]} for size in options.sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["resnet50", "densenet121"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    offered = backend_class("openvino").probe().precisions
    ways = [("openvino", "fp32"), *([("openvino", "bf16")] if offered[0] == "bf16" else []), ("onnxruntime", "fp32")]
    found: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
    for arch in options.arch:
        with tempfile.TemporaryDirectory() as folder:
            source = open_source(arch, "random", None, False)
            bundle, _ = write_bundle(source, Path(folder) / "bundle", ExportSettings(name=arch, mpp=0.5))
            found[arch] = {f"{name} {precision}": measure(bundle, name, precision, options) for name, precision in ways}
    if options.json:
        print(json.dumps({"threads": options.threads, "by_size": found}))
        return
    print(f"{'tiles/s (seconds to load)':<34}", *(f"{size:<14}" for size in options.sizes))
    for arch, by_way in found.items():
        for way, by_size in by_way.items():
            cells = (f"{of['tiles_per_s']:.1f} ({of['loaded_s']:.2f})" for of in by_size.values())
            print(f"{arch + ', ' + way:<34}", *(f"{cell:<14}" for cell in cells))


if __name__ == "__main__":
    main()
