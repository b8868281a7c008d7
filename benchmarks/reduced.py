"""What the decoder's own reduction does to features: their cosine to those of the exact path, on real tissue.

    python benchmarks/reduced.py SLIDE.svs [--reductions 2 4] [--json]

The same tiles are read twice: as mtdp-extract does (JPEG decoded at 1/2, 1/4 or 1/8), and decoded whole and averaged
over areas (OpenSlide). The packaged model runs on both, in fp32. The bar is a smallest cosine of 0.999.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.backends.openvino import OpenVINO
from mtdp_runtime.bundle import default_bundle_path, load_bundle
from mtdp_runtime.slide import Slide, resampling_of
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.slide.openslide import OpenSlideReader

BATCH = 4


def tiles(slide: Slide, origins: list[tuple[int, int]], tile_px: int, scale: float) -> NDArray[np.uint8]:
    out = np.zeros((len(origins), tile_px, tile_px, 3), np.uint8)
    for row, (x0, y0) in enumerate(origins):
        slide.read_into(out[row], x0, y0, scale)
    return out


def features(engine: OpenVINO, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    padded = np.concatenate([images, np.zeros((-len(images) % BATCH, *images.shape[1:]), np.uint8)])
    found = [
        engine.result(engine.submit(np.ascontiguousarray(padded[i : i + BATCH])))["features"]
        for i in range(0, len(padded), BATCH)
    ]
    return np.concatenate(found)[: len(images)].astype(np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path)
    parser.add_argument("--reductions", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    bundle = load_bundle(default_bundle_path())
    tile_px = bundle.manifest.tile_px
    results = []
    engine = OpenVINO.load(bundle, "fp32", BATCH, options.threads)
    with open_slide(options.slide, 0.5, "benchmark") as ours, OpenSlideReader(options.slide, 0.5, "benchmark") as exact:
        for scale in options.reductions:
            side = tile_px * scale
            origins = [
                (x0, y0)
                for y0 in range(0, ours.info.height - side + 1, side // 2)
                for x0 in range(0, ours.info.width - side + 1, side // 2)
            ]
            reduced, whole = tiles(ours, origins, tile_px, scale), tiles(exact, origins, tile_px, scale)
            a, b = features(engine, reduced), features(engine, whole)
            cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
            grey = np.abs(reduced.astype(int) - whole)
            results.append(
                {
                    "slide": options.slide.name,
                    "model": bundle.manifest.name,
                    "resampling": resampling_of(ours.info, scale),
                    "tiles": len(origins),
                    "min_cosine": float(cosine.min()),
                    "median_cosine": float(np.median(cosine)),
                    "mean_grey_difference": float(grey.mean()),
                    "max_grey_difference": int(grey.max()),
                }
            )
            if not options.json:
                print(results[-1], flush=True)
    if options.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
