"""Averaging a tile of 224 px over fractions of pixels: ours against OpenCV's INTER_AREA and what else could do it.

    python benchmarks/averaging.py [--scales 1.979 2.035 2.5 4.008 6.3] [--rounds 40]

One thread; the ways take turns on the same pixels. Each figure is INTER_AREA's median time over the way's (above 1 is
faster), and the greatest distance from the exact average in float64, in grey levels: 0.5 is what rounding alone leaves.
INTER_AREA and Pillow's BOX cannot begin within a pixel, so all begin on one here. "numba" is fixed point in two passes,
16 bits between them, as a kernel in C would do it; it is measured where numba is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mtdp_runtime.slide.resample import resample_into, span_of

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


def taps(scale: float) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return int32[TILE_PX], each output's first pixel, and int32[TILE_PX, n], weights of 14 bits that sum to 2**14."""
    low = np.arange(TILE_PX) * scale
    first = np.floor(low + 1e-6).astype(np.int32)
    pixel = first[:, None] + np.arange(int(np.ceil(scale)) + 1)
    weights = np.clip(np.minimum(low[:, None] + scale, pixel + 1) - np.maximum(low[:, None], pixel), 0, None) / scale
    whole = np.rint(np.cumsum(weights, axis=1) * 2**14).astype(np.int32)
    return first, np.diff(whole, axis=1, prepend=0).astype(np.int32)


def by_numba(scale: float) -> Way:
    import numba

    first, weights = taps(scale)

    @numba.njit(nogil=True, boundscheck=False)
    def kernel(source: Pixels, out: Pixels, first: NDArray[np.int32], weights: NDArray[np.int32]) -> None:
        across, seen = source.shape[1], weights.shape[1]
        rows = source.shape[0]
        sums = np.empty(across, np.int32)
        for y in range(out.shape[0]):
            for x in range(across):
                sums[x] = 1 << 6
            for tap in range(seen):
                weight, line = weights[y, tap], source[min(first[y] + tap, rows - 1)]
                if weight:
                    for x in range(across):
                        sums[x] += weight * line[x]
            for x in range(across):
                sums[x] >>= 7
            for x in range(first.shape[0]):
                red, green, blue = 1 << 20, 1 << 20, 1 << 20
                for tap in range(seen):
                    weight, at = weights[x, tap], 3 * first[x] + 3 * tap
                    if weight:
                        red += weight * sums[at]
                        green += weight * sums[at + 1]
                        blue += weight * sums[at + 2]
                out[y, 3 * x], out[y, 3 * x + 1], out[y, 3 * x + 2] = red >> 21, green >> 21, blue >> 21

    def way(source: Pixels, out: Pixels) -> None:
        kernel(source.reshape(len(source), -1), out.reshape(len(out), -1), first, weights)

    return way


def by_area(source: Pixels, out: Pixels) -> None:
    cv2.resize(source, (TILE_PX, TILE_PX), dst=out, interpolation=cv2.INTER_AREA)


def ways_at(scale: float) -> dict[str, Way]:
    box = (0, 0, TILE_PX * scale, TILE_PX * scale)

    def ours(source: Pixels, out: Pixels) -> None:
        resample_into(out, source, scale)

    def pillow(source: Pixels, out: Pixels) -> None:
        out[...] = Image.fromarray(source).resize((TILE_PX, TILE_PX), Image.Resampling.BOX, box=box)

    ways: dict[str, Way] = {"INTER_AREA": by_area, "ours": ours, "Pillow BOX": pillow}
    if importlib.util.find_spec("numba"):
        ways["numba"] = by_numba(scale)
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.979, 2.035, 2.5, 4.008, 6.3])
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    for scale in options.scales:
        side = span_of(0, TILE_PX, scale)[1]
        source = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
        out, ways = np.empty((TILE_PX, TILE_PX, 3), np.uint8), ways_at(scale)
        times: dict[str, list[float]] = {name: [] for name in ways}
        off = {}
        for turn in range(options.rounds + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way(source, out)
                if turn:  # the first warms up
                    times[name].append(time.perf_counter() - start)
                else:
                    off[name] = float(np.abs(out - exact(source, scale)).max())
        area = statistics.median(times["INTER_AREA"])
        shown = (f"{name} {area / statistics.median(of):.2f} (off {off[name]:.2f})" for name, of in times.items())
        print(f"scale {scale}: {area * 1e3:.2f} ms; " + ", ".join(shown))


if __name__ == "__main__":
    main()
