"""What a feature file says of itself: what decides its rows, what made them, and what the run took."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

from mtdp_runtime.bundle import Bundle
from mtdp_runtime.extraction.models import Target
from mtdp_runtime.pipeline.timing import BadTiles, RunTimes
from mtdp_runtime.settings import ExtractSettings
from mtdp_runtime.slide import SlideInfo, resampling_of
from mtdp_runtime.slide.resample import IDENTITY_TOLERANCE
from mtdp_runtime.store.layout import Layout
from mtdp_runtime.tiling.given_mask import GivenMask
from mtdp_runtime.tiling.plan import Plan
from mtdp_runtime.version import __version__


def made_of(
    info: SlideInfo, bundle: Bundle, precision: str, settings: ExtractSettings, mask: GivenMask | None = None
) -> dict[str, Any]:
    """Return what decides the rows of a feature file: slide, model, grid, tissue rule and precision."""
    return {
        "slide": info.quickhash or info.path.name,
        "slide_bytes": info.size_bytes,
        "slide_mpp": info.mpp,
        "model": bundle.digest,
        "precision": precision,
        "tile_px": bundle.manifest.tile_px,
        "resampling": resampling_of(info, settings.mpp / info.mpp) if info.mpp else "unknown",
        **{key: value for key, value in asdict(settings).items() if (key, value) != ("features_dtype", "float32")},
        **({"tiles": "all"} if settings.min_tissue == 0 else {}),
        **({"tissue": json.dumps(asdict(settings.tissue))} if mask is None else {"mask": mask.digest}),
    }


def layout_of(plan: Plan, target: Target, settings: ExtractSettings, facts: dict[str, Any]) -> Layout:
    path, bundle, backend = target.path, target.model.bundle, target.model.backend
    info, grid, manifest = plan.info, plan.grid, bundle.manifest
    level = info.levels[plan.level]
    assert info.mpp is not None
    root: dict[str, Any] = {
        "mtdp_version": __version__,
        "model": manifest.name,
        "bundle_digest": bundle.digest,
        "backend": backend.name,
        "precision": backend.precision,
        "batch": backend.batch,
        "slide": info.path.name,
        "slide_bytes": info.size_bytes,
        "slide_vendor": info.vendor,
        "quickhash": info.quickhash,
        "mpp_level0": info.mpp,
        "mpp_source": info.mpp_source,
        "mpp": settings.mpp,
        "scale": grid.scale,
        "level": plan.level,
        "level_downsample": level.downsample,
        "resampling": resampling_of(info, grid.scale),
        "reader": info.reader,
        "reader_reason": info.reader_reason,
        "grid": asdict(grid),
        "min_tissue": settings.min_tissue,
        "tissue": asdict(settings.tissue),
        "tissue_source": plan.tissue.source,
        "tissue_threshold": plan.tissue.threshold,
        "tissue_mm2": plan.tissue.area_mm2,
    }
    coords: dict[str, Any] = {
        # TRIDENT's names. Magnification is 10 / mpp there; ours is exact where TRIDENT's is rounded to a class.
        "patch_size": grid.tile_px,
        "patch_size_level0": round(grid.tile0),
        "level0_magnification": 10 / info.mpp,
        "target_magnification": 10 / settings.mpp,
        "overlap": grid.tile_px - settings.stride_px,
        "name": path.stem,
        "savetodir": str(path.parent),
        "level0_width": info.width,
        "level0_height": info.height,
    }
    if abs(grid.scale / level.downsample - 1) < IDENTITY_TOLERANCE:  # patch_size is what CLAM means by it, too
        coords["patch_level"] = plan.level
    outputs = {"features": manifest.features_dim}
    heads = manifest.heads if settings.heads else ()
    outputs |= {head.output: len(head.class_names) for head in heads}
    resume_key = json.dumps([backend.name, backend.batch])
    classes = {head.output: {"class_names": head.class_names} for head in heads}
    tissue = plan.tissue
    place = {"scale": tissue.scale, "x0": tissue.x0, "y0": tissue.y0, "mpp": tissue.mpp}
    dtype = settings.features_dtype
    return Layout(
        plan.coords, plan.fractions, outputs, coords, root, facts, resume_key, classes, tissue.mask, place, dtype
    )


def run_attrs(times: RunTimes, bad: BadTiles, plan: Plan, resumed: int) -> dict[str, Any]:
    return {
        "timing": {
            "wall_s": times.wall_s,
            "plan_s": plan.seconds,
            "device_idle": times.device_idle,
            "readers": times.readers,
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
