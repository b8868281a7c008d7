"""What a coarser source does to features: their cosine to those of the exact average of level 0, on real tissue.

    python benchmarks/reduced.py SLIDE.svs [--model BUNDLE] [--reductions 2 4 8] [--left 2 3 4 5 6 8] [--json]

The bounds of the law of resampling (mtdp_runtime.slide.source) come from here. Two kinds of tiles are read twice:
- reductions: on whole scales, reduced by the JPEG decoder, and decoded whole and averaged.
- left: at drawn places, from level 0 and from its exact half, with so much left to resample.

The bars: smallest cosine 0.999, mean 0.9999, smallest part of the sharpness (variance of the Laplacian) 0.93.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.backends.openvino import OpenVINO
from mtdp_runtime.bundle import default_bundle_path, load_bundle
from mtdp_runtime.slide import Slide, Source
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.slide.resample import resample_into, span_of

BATCH = 4
DRAWN = 24  # places
FLAT = 8.0  # standard deviation below which a tile is glass


def features(engine: OpenVINO, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    padded = np.concatenate([images, np.zeros((-len(images) % BATCH, *images.shape[1:]), np.uint8)])
    found = [
        engine.result(engine.submit(np.ascontiguousarray(padded[i : i + BATCH])))["features"].copy()
        for i in range(0, len(padded), BATCH)
    ]
    return np.concatenate(found)[: len(images)].astype(np.float64)


def sharpness(tile: NDArray[np.uint8]) -> float:
    return float(cv2.Laplacian(tile.astype(np.float64).mean(axis=2), cv2.CV_64F).var())


def compared(engine: OpenVINO, exact: NDArray[np.uint8], other: NDArray[np.uint8]) -> dict[str, Any]:
    kept = [i for i, tile in enumerate(exact) if tile.std() > FLAT]
    a, b = features(engine, exact[kept]), features(engine, other[kept])
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return {
        "tiles": len(kept),
        "min_cosine": float(cosine.min()),
        "mean_cosine": float(cosine.mean()),
        "mean_grey_difference": float(np.abs(exact[kept].astype(int) - other[kept]).mean()),
        "min_sharpness": min(sharpness(other[i]) / sharpness(exact[i]) for i in kept),
    }


def of_slide(slide: Slide, source: Source, tile_px: int, scale: int) -> NDArray[np.uint8]:
    step = tile_px * scale // 2 // scale * scale
    side = tile_px * scale
    origins = [
        (x0, y0)
        for y0 in range(0, slide.info.height - side + 1, step)
        for x0 in range(0, slide.info.width - side + 1, step)
    ]
    out = np.zeros((len(origins), tile_px, tile_px, 3), np.uint8)
    for tile, (x0, y0) in zip(out, origins, strict=True):
        slide.read_into(tile, x0, y0, scale, source)
    return out


def of_image(image: NDArray[np.uint8], x: float, y: float, tile_px: int, scale: float) -> NDArray[np.uint8]:
    (left, right, phase_x), (top, bottom, phase_y) = span_of(x, tile_px, scale), span_of(y, tile_px, scale)
    out = np.zeros((tile_px, tile_px, 3), np.uint8)
    resample_into(out, np.ascontiguousarray(image[top:bottom, left:right]), scale, phase_x, phase_y)
    return out


def with_left(image: NDArray[np.uint8], left: float, tile_px: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Tiles from an image, mirrored so that they fit, and from its exact half."""
    across = np.concatenate([image, image[:, ::-1]], axis=1)
    mirrored = np.concatenate([across, across[::-1]])
    half = cv2.resize(mirrored, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    rng, exact, other = np.random.default_rng(1), [], []
    for number in range(DRAWN):
        scale = 2 * left * (1 + 0.02 * (number % 3))
        x, y = (int(rng.integers(0, side - tile_px * scale - 2)) for side in mirrored.shape[1::-1])
        exact.append(of_image(mirrored, x, y, tile_px, scale))
        other.append(of_image(half, x / 2, y / 2, tile_px, scale / 2))
    return np.stack(exact), np.stack(other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path)
    parser.add_argument("--model", type=Path, default=default_bundle_path())
    parser.add_argument("--reductions", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--left", type=float, nargs="*", default=[2, 3, 4, 5, 6, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    bundle = load_bundle(options.model)
    tile_px = bundle.manifest.tile_px
    engine = OpenVINO.load(bundle, "fp32", BATCH, options.threads)
    results: list[dict[str, Any]] = []

    def note(what: str, exact: NDArray[np.uint8], other: NDArray[np.uint8]) -> None:
        about = {"slide": options.slide.name, "model": bundle.manifest.name, "source": what}
        results.append(about | compared(engine, exact, other))
        if not options.json:
            print(results[-1], flush=True)

    with open_slide(options.slide, 0.5, "benchmark") as slide:
        for scale in options.reductions:
            exact, other = (of_slide(slide, Source(0, reduction), tile_px, scale) for reduction in (1, scale))
            note(f"level 0 at jpeg 1/{scale}, as it is", exact, other)
        if options.left:
            image = np.zeros((slide.info.height // 2 * 2, slide.info.width // 2 * 2, 3), np.uint8)
            slide.read_into(image, 0, 0, 1.0)
            for left in options.left:
                note(f"an exact half, {left:g} left", *with_left(image, left, tile_px))
    if options.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
