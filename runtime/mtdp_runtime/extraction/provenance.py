"""What a feature file says of itself: what decides its rows, what made them, and what the run took."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any, Final

from mtdp_runtime.bundle import Bundle
from mtdp_runtime.extraction.models import Target
from mtdp_runtime.extraction.unchanged import HINT, KEY, SAMPLE, read_here
from mtdp_runtime.pipeline.timing import BadTiles, RunTimes
from mtdp_runtime.settings import ExtractSettings
from mtdp_runtime.slide import SlideInfo
from mtdp_runtime.slide.identity import hint_of, sample_of
from mtdp_runtime.slide.resample import is_still
from mtdp_runtime.slide.source import resampling_of
from mtdp_runtime.store.layout import TOKENS, Layout
from mtdp_runtime.store.run_log import absolute
from mtdp_runtime.tiling.given import NOTHING, Given
from mtdp_runtime.tiling.given_classes import RULE
from mtdp_runtime.tiling.given_tiles import TileList
from mtdp_runtime.tiling.plan import Plan
from mtdp_runtime.version import __version__

# Files of versions without them are the same
_AS_BEFORE: Final = (("features_dtype", "float32"), ("pool", "none"), ("tokens", False))
_OF_A_GRID: Final = ("stride_px", "min_tissue")  # which decide nothing of tiles that are given


def made_of(
    info: SlideInfo, bundle: Bundle, precision: str, settings: ExtractSettings, given: Given = NOTHING
) -> dict[str, Any]:
    """Return what decides the rows of a feature file: slide, model, tiles, tissue rule and precision."""
    mask, tile_px = given.mask, bundle.manifest.tile_px
    resampling = "unknown"
    if info.mpp:
        resampling = resampling_of(info, settings.mpp / info.mpp, tile_px, is_aligned(info, settings, tile_px, given))
    facts = {
        "slide": info.quickhash or info.path.name,
        "slide_bytes": info.size_bytes,
        "slide_mpp": info.mpp,
        "model": bundle.digest,
        "precision": precision,
        "tile_px": tile_px,
        "resampling": resampling,
        **{key: value for key, value in asdict(settings).items() if (key, value) not in _AS_BEFORE},
        **({"tiles": "all"} if settings.min_tissue == 0 else {}),
        **({"tissue": json.dumps(asdict(settings.tissue))} if mask is None else {"mask": mask.digest}),
    }
    if given.tiles is not None:
        facts = {key: value for key, value in facts.items() if key not in _OF_A_GRID}
        facts |= {"tiles": "given", "coords": given.tiles.digest}
    if given.classes is not None:
        facts |= {"classes": given.classes.digest, "class_rule": RULE}
    return facts


def is_aligned(info: SlideInfo, settings: ExtractSettings, tile_px: int, given: Given) -> bool:
    """Say whether all tiles lie on the pixels of a level that is coarser by just the scale, as those of a grid do."""
    return given.tiles is None or info.mpp is None or given.tiles.aligned(settings.mpp / info.mpp, tile_px)


def layout_of(plan: Plan, target: Target, settings: ExtractSettings, facts: dict[str, Any]) -> Layout:
    """Return what a feature file will hold; `facts` are those of `made_of`."""
    path, bundle, backend = target.path, target.model.bundle, target.model.backend
    info, grid, manifest = plan.info, plan.grid, bundle.manifest
    level = info.levels[plan.level]
    assert info.mpp is not None
    root: dict[str, Any] = {
        "mtdp_version": __version__,
        "model": manifest.name,
        "bundle_digest": bundle.digest,
        **({"model_source": bundle.source} if bundle.source else {}),
        "backend": backend.name,
        "precision": backend.precision,
        "batch": backend.batch,
        "slide": info.path.name,
        "slide_path": absolute(info.path),
        "slide_bytes": info.size_bytes,
        "slide_vendor": info.vendor,
        "quickhash": info.quickhash,
        "mpp_level0": info.mpp,
        "mpp_source": info.mpp_source,
        "mpp": settings.mpp,
        "scale": grid.scale,
        "level": plan.level,
        "level_downsample": level.downsample,
        "resampling": resampling_of(info, grid.scale, grid.tile_px, grid.aligned),
        "reader": info.reader,
        "reader_reason": info.reader_reason,
        "grid": grid.facts(),
        "bounds": info.bounds,
        "min_tissue": 0.0 if isinstance(grid, TileList) else settings.min_tissue,
        "tissue": asdict(settings.tissue),
        "tissue_source": plan.tissue.source,
        "tissue_threshold": plan.tissue.threshold,
        "tissue_glass": "not told" if plan.tissue.glass is None else plan.tissue.glass,
        "tissue_mm2": plan.tissue.area_mm2,
    }
    coords: dict[str, Any] = {
        # TRIDENT's names. Magnification is 10 / mpp there; ours is exact where TRIDENT's is rounded to a class.
        "patch_size": grid.tile_px,
        "patch_size_level0": round(grid.tile0),
        "level0_magnification": 10 / info.mpp,
        "target_magnification": 10 / settings.mpp,
        "overlap": grid.given.stated.overlap_px if isinstance(grid, TileList) else grid.tile_px - settings.stride_px,
        "name": path.stem,
        "savetodir": str(path.parent),
        "level0_width": info.width,
        "level0_height": info.height,
    }
    if is_still(grid.scale / level.downsample, grid.tile_px):  # patch_size is what CLAM means by it, too
        coords["patch_level"] = plan.level
    outputs = {"features": manifest.features_dim}
    heads = manifest.heads if settings.heads else ()
    outputs |= {head.output: len(head.class_names) for head in heads}
    hint, sample = hint_of(info.path), sample_of(read_here(info))
    root |= {HINT: hint, SAMPLE: sample} | ({KEY: target.key} if target.key else {})
    resume_key = json.dumps([backend.name, backend.batch, sample])
    attrs: dict[str, dict[str, Any]] = {head.output: {"class_names": head.class_names} for head in heads}
    tokens = manifest.tokens if settings.tokens else None
    attrs |= {TOKENS: {"grid": tokens.grid}} if tokens is not None else {}
    tissue = plan.tissue
    place = {"scale": tissue.scale, "x0": tissue.x0, "y0": tissue.y0, "mpp": tissue.mpp}
    dtype = settings.features_dtype
    return Layout(
        plan.coords,
        plan.fractions,
        outputs,
        coords,
        root,
        facts,
        resume_key,
        attrs,
        mask=tissue.mask,
        mask_attrs=place,
        features_dtype=dtype,
        slide_hint=hint,
        classes=plan.classes,
        class_names=plan.class_names,
        pooled=settings.pool == "mean",
        tokens=None if tokens is None else (tokens.count, tokens.dim),
    )


def run_attrs(times: RunTimes, bad: BadTiles, plan: Plan, resumed: int) -> dict[str, Any]:
    """Return the attributes that only the end of a run knows; `resumed` rows are of an earlier run."""
    return {
        "timing": {
            "wall_s": times.wall_s,
            "plan_s": plan.seconds,
            "device_idle": times.device_idle,
            "readers": times.readers,  # that kept the engine fed, of
            "read_threads": times.read.threads,
            **{
                f"{stage.name}_{what}": getattr(stage, what)
                for stage in (times.read, times.infer, times.store)
                for what in ("busy_s", "starved_s", "blocked_s")
            },
        },
        "tiles_per_s": times.tiles_per_s,
        "bottleneck": times.bottleneck,
        "bad_tile_reasons": bad.reasons,
        "rows_from_an_earlier_run": resumed,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
