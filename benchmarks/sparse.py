"""Memory on a huge slide, and the time to the first batch: 100,000 x 100,000 px, nearly all of it never scanned.

    python benchmarks/sparse.py [--side 100000] [--threads 2]

The slide is one tiled JPEG level whose missing tiles take no bytes, with tissue in a corner, and a coarse level. Prints
one JSON object: the largest resident size of an mtdp-extract process over the slide, its seconds, and its first line.
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

import cv2
import imagecodecs
import tifffile

from mtdp_runtime.demo import demo_image

TILE = 256
COARSE = 64


def write_sparse_slide(path: Path, side: int, scanned: int = 4096) -> None:
    image = demo_image(scanned, scanned)
    across = -(-side // TILE)

    def tiles() -> Iterator[bytes]:
        for row in range(across):
            for column in range(across):
                y, x = row * TILE, column * TILE
                inside = y < scanned and x < scanned
                yield imagecodecs.jpeg8_encode(image[y : y + TILE, x : x + TILE], level=85) if inside else b""

    thumbnail = cv2.copyMakeBorder(
        cv2.resize(image, None, fx=1 / COARSE, fy=1 / COARSE, interpolation=cv2.INTER_AREA),
        0,
        (side - scanned) // COARSE,
        0,
        (side - scanned) // COARSE,
        cv2.BORDER_CONSTANT,
        value=(255, 255, 255),
    )
    common = {"tile": (TILE, TILE), "photometric": "ycbcr", "compression": "jpeg", "metadata": None}
    um = {"resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tiff.write(
            tiles(), shape=(side, side, 3), dtype="uint8", subsampling=(2, 2), resolution=(20000, 20000), **common, **um
        )
        common["photometric"] = "rgb"
        tiff.write(thumbnail, subfiletype=1, resolution=(20000 / COARSE,) * 2, **common, **um)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sparse.tiff"
        write_sparse_slide(path, options.side)
        program = "import sys; from mtdp_runtime.cli import main; sys.argv[0] = 'mtdp-extract'; main()"
        arguments = [str(path), "--out", f"{folder}/out", "--threads", str(options.threads), "--no-report", "--json"]
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)
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
