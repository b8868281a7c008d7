"""The search for tissue against the search by saturation that it replaced: time, on images of three sizes.

    python benchmarks/tissue.py [--slide SLIDE.svs] [--rounds 15]

The image is an overview at the scale of the mask, 8 µm, laid side by side until it has the size; without `--slide` it
is drawn: pale tissue on noisy glass. The two take turns on it, in one process, with the threads that OpenCV takes.
Each figure is the median of the pairs: ours over saturation's (above 1 is slower).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.settings import TissueSettings
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.tiling.pen import odd
from mtdp_runtime.tiling.tissue import find_tissue, tissue_of

Pixels = NDArray[np.uint8]
SIZES = ((500, 400), (1600, 2400), (6000, 3000))  # height, width: a biopsy, a section, a large resection
SETTINGS = TissueSettings()
FLOOR, CEILING = 8.0, 30.0  # of saturation, which Otsu's threshold was kept between


def by_saturation(image: Pixels) -> NDArray[np.bool_]:
    """Segment uint8[H, W, 3] as the first version did: pen, saturation over Otsu's threshold, closing, areas."""
    mpp, settings = SETTINGS.mpp, SETTINGS
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    saturation = cv2.GaussianBlur(hsv[..., 1], (odd(settings.blur_um / mpp),) * 2, 0)
    marks = pen(image)
    dark = (hsv[..., 2] < settings.darkest) | marks
    saturation[dark] = 0
    otsu = cv2.threshold(saturation[~dark].reshape(-1, 1), 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[0]
    raw = ((saturation > min(max(otsu, FLOOR), CEILING)) & ~dark).astype(np.uint8)
    close_px = odd(settings.close_um / mpp)
    closed = cv2.morphologyEx(raw, cv2.MORPH_CLOSE, ellipse(close_px), borderType=cv2.BORDER_REPLICATE)
    pieces = without_small(closed, settings.min_piece_um2 / mpp**2)
    return np.asarray((without_small(1 - pieces, settings.min_hole_um2 / mpp**2) == 0) & ~marks)


def pen(image: Pixels) -> NDArray[np.bool_]:
    """Find pen by the colour of each pixel, bool[H, W]."""
    hsv = cv2.cvtColor(cv2.GaussianBlur(image, (3, 3), 0), cv2.COLOR_RGB2HSV)
    hue, saturation, value = (hsv[..., i].astype(np.int16) for i in range(3))
    green = (hue >= 40) & (hue <= 92) & (saturation > 60)
    blue = (hue > 92) & (hue <= 124) & (saturation > 135)
    red = ((hue <= 5) | (hue >= 176)) & (saturation > 185) & (value > 90)
    black = (value < 85) & (saturation * value < 30 * 255)
    ink = (green | blue | red | black).astype(np.uint8)
    width_px, margin_px = odd(SETTINGS.mark_um / SETTINGS.mpp), odd(2 * SETTINGS.mark_margin_um / SETTINGS.mpp)
    marks = cv2.morphologyEx(ink, cv2.MORPH_OPEN, ellipse(width_px), borderType=cv2.BORDER_REPLICATE)
    return np.asarray(cv2.dilate(marks, ellipse(margin_px)) > 0)


def ellipse(side_px: int) -> Pixels:
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side_px, side_px)), np.uint8)


def without_small(mask: Pixels, least_px: float) -> Pixels:
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask)
    kept = stats[:, cv2.CC_STAT_AREA] >= least_px
    kept[0] = False
    return np.asarray(kept[labels], np.uint8)


def drawn() -> Pixels:
    """Draw pale tissue on noisy glass, uint8[2000, 2000, 3]."""
    rng = np.random.default_rng(0)
    texture = cv2.GaussianBlur(rng.normal(size=(2000, 2000)).astype(np.float32), (0, 0), 60)
    image = np.where((texture > 0.004)[..., None], (205, 150, 190), 240) + rng.normal(0, 4, (2000, 2000, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slide", type=Path, help="a real slide that states its scale")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if options.slide is None:
        source = drawn()
    else:
        with open_slide(options.slide) as slide:
            source = find_tissue(slide, SETTINGS).image
    ways: dict[str, Callable[[Pixels], object]] = {
        "ours": lambda image: tissue_of(image, SETTINGS.mpp, SETTINGS),
        "saturation": by_saturation,
    }
    for high, wide in SIZES:
        image = np.tile(source, (-(-high // source.shape[0]), -(-wide // source.shape[1]), 1))[:high, :wide].copy()
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.rounds + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way(image)
                if turn:  # the first warms up
                    times[name].append(time.perf_counter() - start)
        ratio = statistics.median(a / b for a, b in zip(times["ours"], times["saturation"], strict=True))
        shown = ", ".join(f"{name} {statistics.median(each) * 1e3:.0f} ms" for name, each in times.items())
        print(f"{wide} x {high}: {shown}; {ratio:.2f}")


if __name__ == "__main__":
    main()
