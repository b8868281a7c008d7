"""Recomputes some tiles of a finished slide the slow and plain way: OpenSlide reads, ONNX Runtime computes in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from mtdp_runtime.backends import Backend
from mtdp_runtime.backends.proof import run_backend
from mtdp_runtime.bundle.golden import FEATURES, shown
from mtdp_runtime.bundle.tolerance import cosines
from mtdp_runtime.errors import BackendError, SlideUnreadable
from mtdp_runtime.slide import Slide, SlideInfo, Source
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.slide.openslide import OpenSlideReader
from mtdp_runtime.slide.source import grid_source
from mtdp_runtime.store.reader import open_features

_SEED: Final = 2020  # the same tiles each time


@dataclass(frozen=True, slots=True)
class Check:
    """What is asked for."""

    tiles: int
    reference: Backend


@dataclass(frozen=True, slots=True)
class Agreement:
    """How near the stored features are to the reference's."""

    tiles: int
    min_cosine: float
    reference: str  # the reader and the engine


def check_rows(
    features: Path,
    info: SlideInfo,
    scale: float,
    tile_px: int,
    check: Check,
    beat: Callable[[int], None] | None = None,
    source: Source | None = None,
) -> Agreement | None:
    """Recompute random good tiles of a feature file; None where it has none.

    Args:
        features: the file, finished or still partial, with all rows in it.
        info: its slide.
        scale: level-0 pixels per pixel of a tile.
        tile_px: side of a tile.
        check: how many, and with what.
        beat: called with 0 after each batch.
        source: what the run resampled all tiles from, also where this reader has another choice; a grid's where None.

    Raises:
        SlideError: a tile cannot be read now.
        BackendError: the reference engine fails.
    """
    with open_features(features) as file:
        good = np.flatnonzero(file.good)
        if not len(good):
            return None
        chosen = np.sort(np.random.default_rng(_SEED).choice(good, min(check.tiles, len(good)), replace=False))
        stored = np.stack([file.features[int(row)] for row in chosen]).astype(np.float32)
        coords = file.coords[chosen]
    smallest, source = 1.0, source or grid_source(info, scale, tile_px)
    with _reference(info) as slide:
        for start in range(0, len(chosen), check.reference.batch):
            rows = slice(start, start + check.reference.batch)
            tiles = np.zeros((len(coords[rows]), tile_px, tile_px, 3), np.uint8)
            for tile, (x0, y0) in zip(tiles, coords[rows].tolist(), strict=True):
                slide.read_into(tile, x0, y0, scale, source)
            again = run_backend(check.reference, tiles)[FEATURES]
            if again.shape != stored[rows].shape or not np.isfinite(again).all():
                raise BackendError(
                    f"{features}: the reference of --check ({check.reference.name}, fp32) gives "
                    f"{'numbers that are not finite' if again.shape == stored[rows].shape else shown(again)}, "
                    f"{shown(stored[rows])} is in the file",
                    "The model file is damaged or cannot be computed in fp32: export the bundle again.",
                )
            smallest = min(smallest, float(cosines(stored[rows], again).min()))
            if beat is not None:
                beat(0)
        return Agreement(len(chosen), smallest, f"{slide.info.reader}; {check.reference.name}, fp32")


def _reference(info: SlideInfo) -> Slide:
    """Open the slide with OpenSlide where that reads it; else with a fresh reader of its own."""
    path = info.read_from or info.path
    try:
        return OpenSlideReader(path, info.mpp, info.mpp_source)
    except SlideUnreadable:
        return open_slide(path, info.mpp, info.mpp_source)
