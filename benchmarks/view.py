"""The viewer's four figures: opening a large slide, a warm tile, memory, and the search over a million tiles.

    python benchmarks/view.py [--side 100000] [--rows 1000000] [--dim 1024]

A slide of side x side px is written first (a repeated piece of the demo slide, tiled JPEG, a full pyramid), which takes
a minute. Opening and tiles are measured from outside, over HTTP, as a browser meets them; the server is a process of
its own, and its largest resident memory is read from /proc. The search runs in this process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import cv2
import numpy as np
import tifffile

from mtdp_runtime.commands.demo_slide import demo_image
from mtdp_runtime.view.nearest import Rows, basis_of, bytes_of


def write_large(path: Path, side: int) -> None:
    """Write a pyramid whose levels repeat one picture of 4096 px: its size is large, its making is not."""
    picture = demo_image(4096, 4096)
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        width = side
        while True:
            tiles = [
                np.ascontiguousarray(picture[y : y + 512, x : x + 512])
                for y in range(0, len(picture), 512)
                for x in range(0, len(picture), 512)
            ]
            across = -(-width // 512)
            encoded = [
                cv2.imencode(".jpg", tile[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 60])[1].tobytes() for tile in tiles
            ]
            per_row = max(1, len(picture) // 512)
            tiff.write(
                (
                    encoded[(number // across) % per_row * per_row + number % across % per_row]
                    for number in range(across**2)
                ),
                shape=(width, width, 3),
                dtype=np.uint8,
                tile=(512, 512),
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                resolution=(1e4 / 0.25 * width / side,) * 2,
                resolutionunit="CENTIMETER",
                subfiletype=0 if width == side else 1,
                metadata=None,
            )
            if width <= 1024:
                return
            width //= 2
            if len(picture) > 512:
                picture = cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)


def get(url: str) -> tuple[bytes, float]:
    start = time.perf_counter()
    with urllib.request.urlopen(url, timeout=120) as answer:
        return answer.read(), time.perf_counter() - start


def measure_server(slide: Path) -> dict[str, float]:
    code = "from mtdp_runtime.commands.view import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(slide), "--no-browser"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        address = next(line.strip() for line in process.stdout if line.startswith("http"))
        get(address)  # the process has started
        told, described_s = get(f"{address}api/slides/0")
        facts = json.loads(told)["slide"]
        first, last = facts["first_level"], facts["last_level"]
        _, overview_s = get(f"{address}slides/0_files/{first}/0_0.jpeg")
        screen = [(column, row) for column in range(3) for row in range(2)]
        _, level_s = zip(*[get(f"{address}slides/0_files/{first + 3}/{c}_{r}.jpeg") for c, r in screen], strict=True)
        places = [(level, c, r) for level in range(last - 4, last + 1) for c in range(20, 25) for r in range(20, 24)]
        places = [place for place in places if (facts["width"] >> (last - place[0])) > 26 * facts["tile_px"]]
        cold = [get(f"{address}slides/0_files/{level}/{c}_{r}.jpeg")[1] for level, c, r in places]
        warm = [get(f"{address}slides/0_files/{level}/{c}_{r}.jpeg")[1] for level, c, r in places]
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak_kb = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    finally:
        process.kill()
        process.wait()
    return {
        "open_s": described_s + overview_s + sum(level_s),
        "first_tile_ms": 1e3 * float(np.median(cold)),
        "first_tile_p95_ms": 1e3 * float(np.percentile(cold, 95)),
        "warm_tile_ms": 1e3 * float(np.median(warm)),
        "warm_tile_p95_ms": 1e3 * float(np.percentile(warm, 95)),
        "peak_mb": peak_kb / 1024,
    }


def measure_search(count: int, features_dim: int) -> dict[str, float]:
    """Search rows as networks give them (a falling spectrum, clusters), and rows of noise, which nothing rules out."""
    rng = np.random.default_rng(0)
    spectrum = (np.arange(1, features_dim + 1) ** -0.6).astype(np.float32)
    centres = rng.normal(size=(40, features_dim)).astype(np.float32) * spectrum
    found: dict[str, float] = {"search_gb": bytes_of(count, features_dim) / 1e9}
    for kind in ("features", "noise"):

        def block(size: int, kind: str = kind) -> np.ndarray:
            noise = rng.standard_normal((size, features_dim), np.float32)
            return noise if kind == "noise" else centres[rng.integers(0, 40, size)] + noise * spectrum * np.float32(0.5)

        rows = Rows(count, features_dim, basis_of(block(4096)))
        first = block(2048)
        rows.add(first)
        while len(rows) < count:
            rows.add(block(min(8192, count - len(rows))))
        times = []
        for query in first[:20]:
            start = time.perf_counter()
            rows.nearest(query, 25)
            times.append(time.perf_counter() - start)
        found |= {f"search_{kind}_ms": 1e3 * float(np.median(times)), f"search_{kind}_worst_ms": 1e3 * max(times)}
        del rows
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=1024)
    arguments = parser.parse_args()
    found: dict[str, float] = {}
    if arguments.side:
        with tempfile.TemporaryDirectory() as folder:
            write_large(Path(folder) / "large.tiff", arguments.side)
            found |= measure_server(Path(folder) / "large.tiff")
    if arguments.rows:
        found |= measure_search(arguments.rows, arguments.dim)
    print(json.dumps({name: round(value, 3) for name, value in found.items()}, indent=1))


if __name__ == "__main__":
    main()
