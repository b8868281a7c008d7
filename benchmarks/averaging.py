"""Averaging a tile of 224 px over fractions of pixels: ours against OpenCV's INTER_AREA and what else could do it.

    python benchmarks/averaging.py [--scales 1.979 2.0 2.035 2.5 4.008 6.3] [--rounds 40]

One thread; the ways take turns on the same pixels. Each figure is INTER_AREA's median time over the way's (above 1 is
faster), and the greatest distance from the exact average in float64, in grey levels: 0.5 is what rounding alone leaves.
INTER_AREA and Pillow's BOX cannot begin within a pixel, so all begin on one here. "AVX2" and "C" are the compiled code
with and without AVX2, "NumPy" is what averages where nothing was compiled; the three give the same bits, or this ends.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mtdp_runtime.slide import compiled, products
from mtdp_runtime.slide.cells import cells
from mtdp_runtime.slide.resample import span_of

TILE_PX = 224
Pixels = NDArray[np.uint8]
Way = Callable[[Pixels, Pixels], None]  # source, out


def exact(source: Pixels, scale: float) -> NDArray[np.float64]:
    """Average by summed areas in float64."""
    found = source.astype(np.float64)
    for axis in (0, 1):
        sums = np.moveaxis(np.cumsum(found, axis=axis), axis, 0)
        sums = np.concatenate([np.zeros_like(sums[:1]), sums])
        edge = np.arange(TILE_PX + 1) * scale
        low = np.minimum(edge.astype(np.int64), len(sums) - 2)
        at = sums[low] + (edge - low)[:, None, None] * (sums[low + 1] - sums[low])
        found = np.moveaxis(np.diff(at, axis=0) / scale, 0, axis)
    return found


def by_area(source: Pixels, out: Pixels) -> None:
    cv2.resize(source, (TILE_PX, TILE_PX), dst=out, interpolation=cv2.INTER_AREA)


def ways_at(scale: float, side: int) -> dict[str, Way]:
    box, axis = (0, 0, TILE_PX * scale, TILE_PX * scale), cells(TILE_PX, side, scale, 0.0)

    def by_library(library: compiled.Compiled) -> Way:
        return lambda source, out: compiled.average(library, out, source, axis, axis)

    def pillow(source: Pixels, out: Pixels) -> None:
        out[...] = Image.fromarray(source).resize((TILE_PX, TILE_PX), Image.Resampling.BOX, box=box)

    ways: dict[str, Way] = {"INTER_AREA": by_area, "Pillow BOX": pillow}
    library = compiled.compiled()
    if not isinstance(library, str):
        levels = {"AVX2": 1, "C": 0} if library.level else {"C": 0}
        ways |= {name: by_library(library._replace(level=level)) for name, level in levels.items()}
    return ways | {"NumPy": lambda source, out: products.average(out, source, axis, axis)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.979, 2.0, 2.035, 2.5, 4.008, 6.3])
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    print(f"averaging: {compiled.described()}")
    for scale in options.scales:
        side = span_of(0, TILE_PX, scale)[1]
        source = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
        out, ways = np.empty((TILE_PX, TILE_PX, 3), np.uint8), ways_at(scale, side)
        times: dict[str, list[float]] = {name: [] for name in ways}
        off, tiles = {}, []
        for turn in range(options.rounds + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way(source, out)
                if turn:  # the first warms up
                    times[name].append(time.perf_counter() - start)
                else:
                    off[name] = float(np.abs(out - exact(source, scale)).max())
                    tiles += [out.copy()] if name in ("AVX2", "C", "NumPy") else []
        if any((tile != tiles[0]).any() for tile in tiles):
            raise SystemExit(f"scale {scale}: the compiled kernel and NumPy differ")
        area = statistics.median(times["INTER_AREA"])
        shown = (f"{name} {area / statistics.median(of):.2f} (off {off[name]:.2f})" for name, of in times.items())
        print(f"scale {scale}: {area * 1e3:.2f} ms; " + ", ".join(shown))


if __name__ == "__main__":
    main()
