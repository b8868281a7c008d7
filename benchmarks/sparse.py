"""Memory on a huge slide, and the time to the first batch: 100,000 x 100,000 px, nearly all of it never scanned.

    python benchmarks/sparse.py [--side 100000] [--threads 2]

The slide is one tiled JPEG level, without a pyramid, whose missing tiles take no bytes, with tissue in two opposite
corners, so that all of it counts as scanned. A new process extracts it. Prints one JSON object: the largest resident
size of that process, the seconds of tissue search and grid, and those from its start to the end of its imports, to the
loaded model, to the first stored batch, and all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import imagecodecs
import tifffile

from mtdp_runtime.commands.demo_slide import demo_image

TILE = 256


def write_sparse_slide(path: Path, side: int, scanned: int = 2048) -> None:
    image = demo_image(scanned, scanned)
    across, corner = -(-side // TILE), scanned // TILE

    def tiles() -> Iterator[bytes]:
        for row in range(across):
            for column in range(across):
                if max(row, column) < corner or min(row, column) >= across - corner:
                    y, x = row % corner * TILE, column % corner * TILE
                    yield imagecodecs.jpeg8_encode(image[y : y + TILE, x : x + TILE], level=85)
                else:
                    yield b""

    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tiff.write(
            tiles(),
            shape=(side, side, 3),
            dtype="uint8",
            tile=(TILE, TILE),
            photometric="ycbcr",
            subsampling=(2, 2),
            compression="jpeg",
            resolution=(20000, 20000),
            resolutionunit="CENTIMETER",
            metadata=None,
        )


CHILD = """
import json, sys, time
start_s = time.time()
from pathlib import Path
from mtdp_runtime.backends import load
from mtdp_runtime.bundle import default_bundle_path, load_bundle
from mtdp_runtime.extraction.extract import Listeners, extract_slide
from mtdp_runtime.extraction.models import Model, Target
from mtdp_runtime.settings import ExtractSettings
from mtdp_runtime.slide.open import open_slide

imported_s = time.time() - start_s
slide, out, threads = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
bundle = load_bundle(default_bundle_path())
settings = ExtractSettings(bundle.manifest.mpp, bundle.manifest.tile_px)
first = []
with load("auto", bundle, "auto", None, threads)[0] as engine, open_slide(slide) as opened:
    loaded_s = time.time() - start_s
    outcome, plan = extract_slide(
        opened, [Target(out, Model(bundle, engine))], settings, readers=threads,
        listeners=Listeners(on_progress=lambda tiles: first.append(time.time() - start_s)),
    )
print(json.dumps({
    "tiles": outcome.tiles, "grid": len(plan.grid), "batch": engine.batch, "imported_s": imported_s,
    "loaded_s": loaded_s, "plan_s": plan.seconds, "first_batch_s": first[0],
    "all_s": time.time() - start_s, "reader": opened.info.reader,
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sparse.tiff"
        write_sparse_slide(path, options.side)
        arguments = [str(path), f"{folder}/sparse.h5", str(options.threads)]
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        print(
            json.dumps(
                {
                    "side_px": options.side,
                    "file_bytes": path.stat().st_size,
                    "exit": os.waitstatus_to_exitcode(status),
                    "max_rss_mb": usage.ru_maxrss / 1024,
                    "seconds": time.perf_counter() - start,
                    "said": json.loads(said) if said else None,
                },
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
