"""What a slide will cost: bytes, and seconds from a short measurement on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from mtdp_runtime.backends.speed import EngineSpeed
from mtdp_runtime.bundle.manifest import Manifest
from mtdp_runtime.errors import TileUnreadable
from mtdp_runtime.settings import ExtractSettings
from mtdp_runtime.slide import Slide
from mtdp_runtime.store.layout import reserved_bytes
from mtdp_runtime.tiling.plan import Plan

_READ_TILES: Final = 12
_ROW_BYTES: Final = 16 + 1 + 4  # coords, status, tissue_fraction


def read_seconds(slide: Slide, plan: Plan) -> tuple[float, int]:
    """Return the seconds a tile takes one thread to read, and over how many tiles of the slide that was measured."""
    if not len(plan.kept):
        return 0.0, 0
    rows = np.unique(np.linspace(0, len(plan.kept) - 1, _READ_TILES).astype(np.int64))
    tile = np.zeros((plan.grid.tile_px, plan.grid.tile_px, 3), np.uint8)
    start, measured = time.perf_counter(), 0
    for x0, y0 in plan.coords[rows].tolist():
        try:
            slide.read_into(tile, x0, y0, plan.grid.scale, plan.source)
        except TileUnreadable:
            continue
        measured += 1
    return ((time.perf_counter() - start) / measured if measured else 0.0), measured


def output_bytes(tiles: int, manifest: Manifest, settings: ExtractSettings) -> int:
    """Return the bytes of the rows of a model's feature file."""
    features_bytes = manifest.features_dim * (2 if settings.features_dtype == "float16" else 4)
    classes = sum(len(head.class_names) for head in manifest.heads if settings.heads)
    return tiles * (features_bytes + 4 * classes + _ROW_BYTES) + tokens_bytes(tiles, manifest, settings)


def tokens_bytes(tiles: int, manifest: Manifest, settings: ExtractSettings) -> int:
    """Return the bytes of the patch tokens among them: the most of a file that has some."""
    if not settings.tokens or manifest.tokens is None:
        return 0
    return reserved_bytes(tiles, 2 * manifest.tokens.count * manifest.tokens.dim)


def seconds(plan: Plan, speeds: Sequence[EngineSpeed], read_s: float, threads: int) -> float:
    """Return the seconds a slide will take with some models, where all share the cores: their times add up."""
    tile_s = sum(1 / speed.tiles_per_s for speed in speeds) + read_s / threads
    return plan.seconds + len(plan.kept) * tile_s


def costs(
    plan: Plan,
    read_s: float,
    read_tiles: int,
    *,
    manifests: Sequence[Manifest],
    settings: ExtractSettings,
    speeds: Sequence[EngineSpeed],
    threads: int,
) -> dict[str, Any]:
    """Return what a dry run adds to a slide's line: `bytes`; and `estimated_s`, `estimate_from` where speeds are known.

    And `tokens_bytes`, which are among `bytes`, where patch tokens are stored.

    Args:
        plan: of the slide.
        read_s: seconds a tile takes one thread to read, and
        read_tiles: over how many tiles that was measured: `read_seconds`.
        manifests: of the models that share the reading.
        settings: of the run.
        speeds: of the same models; none where an engine could not be measured.
        threads: that read and compute.
    """
    tiles = len(plan.kept)
    size = {"bytes": sum(output_bytes(tiles, manifest, settings) for manifest in manifests)}
    if settings.tokens:
        size["tokens_bytes"] = sum(tokens_bytes(tiles, manifest, settings) for manifest in manifests)
    if not speeds:
        return size
    rates = "; ".join(f"{s.tiles_per_s:.1f} tiles/s of {s.engine} over {s.tiles} tiles" for s in speeds)
    return {
        **size,
        "estimated_s": float(f"{seconds(plan, speeds, read_s, threads):.3g}"),
        "estimate_from": f"{rates}, measured now; "
        f"{1000 * read_s:.1f} ms to read a tile, over {read_tiles} tiles of this slide; {threads} threads",
    }
