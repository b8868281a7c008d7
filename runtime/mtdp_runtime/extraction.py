"""One slide to one feature file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

import mtdp_runtime
from mtdp_runtime.backends import Backend
from mtdp_runtime.bundle import Bundle
from mtdp_runtime.check import Agreement, check_rows
from mtdp_runtime.errors import FingerprintMismatch, OutputUnwritable, SlideUnreadable
from mtdp_runtime.grid import Grid, make_grid
from mtdp_runtime.mask import GivenMask
from mtdp_runtime.pipeline import BadTiles, RunTimes, run_pipeline
from mtdp_runtime.proof import MIN_COSINE
from mtdp_runtime.slide import Slide, SlideInfo, level_for, reduction_for, resampling_of
from mtdp_runtime.slide.resample import IDENTITY_TOLERANCE
from mtdp_runtime.store import FeatureStore, Layout, TileStatus, differences, remove_leftovers
from mtdp_runtime.tissue import TissueMask, TissueSettings, find_tissue, tissue_fractions
from mtdp_runtime.together import JoinedEngines, JoinedStores, Model, Target

OnBadTile = Literal["nan", "drop", "fail"]
FeaturesDtype = Literal["float32", "float16"]
Status = Literal["done", "skipped", "no-tissue", "planned", "claimed", "failed"]
OnPlan = Callable[["Plan", int], None]  # what will be computed, and how many of its tiles an earlier run did

# A decoder that reduces gives other pixels than the reference's averaging: 0.9997 was measured (benchmarks/RESULTS.md).
_MIN_COSINE_REDUCED: Final = 0.999


@dataclass(frozen=True, slots=True)
class ExtractSettings:
    """What decides which numbers come out."""

    mpp: float  # target scale, micrometres a pixel
    stride_px: int
    min_tissue: float = 0.25  # part of a tile's area that must be tissue
    on_bad_tile: OnBadTile = "nan"
    heads: bool = False  # also store the probabilities of the model's heads
    tissue: TissueSettings = field(default_factory=TissueSettings)
    features_dtype: FeaturesDtype = "float32"  # as stored; a number beyond float16 is an error


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be computed for a slide: known before any inference."""

    info: SlideInfo
    grid: Grid
    tissue: TissueMask
    kept: NDArray[np.int64]  # indices into the grid
    fractions: NDArray[np.float32]  # of the kept tiles
    seconds: float  # what the planning took

    @property
    def coords(self) -> NDArray[np.int64]:
        """int64[N, 2]: level-0 x, y of the kept tiles."""
        return self.grid.origins()[self.kept]

    @property
    def level(self) -> int:
        return level_for(self.info.levels, self.grid.scale)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a slide went: one line of run.jsonl."""

    slide: Path
    status: Status
    output: Path | None = None
    tiles: int = 0  # rows of the file
    bad_tiles: int = 0
    seconds: float = 0.0
    times: RunTimes | None = None
    message: str = ""
    hint: str = ""
    agreement: Agreement | None = None  # with the reference, where that was asked for
    attempt: str = ""  # of what failed: the same again is not tried again unasked
    outputs: tuple[Path, ...] = ()  # the file of each model; `output` is the first
    left_out: int = 0  # bad tiles that the file has no row of, where that was asked for
    reader: str = ""
    reader_reason: str = ""
    warning: str = ""  # what is done, and should be looked at


def make_plan(slide: Slide, tile_px: int, settings: ExtractSettings, mask: GivenMask | None = None) -> Plan:
    """Find the tissue of a slide and the tiles to compute.

    Raises:
        SlideError: the slide has no usable scale, or cannot be decoded.
    """
    start = time.perf_counter()
    grid = make_grid(slide.info, tile_px, settings.mpp, settings.stride_px)
    tissue = find_tissue(slide, settings.tissue, mask)
    fractions = tissue_fractions(tissue, grid)
    kept = np.flatnonzero(fractions >= settings.min_tissue)
    return Plan(slide.info, grid, tissue, kept, fractions[kept], time.perf_counter() - start)


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


def extract_slide(
    slide: Slide,
    path: Path,
    bundle: Bundle,
    backend: Backend,
    settings: ExtractSettings,
    readers: int,
    overwrite: bool = False,
    on_plan: OnPlan | None = None,
    on_progress: Callable[[int], None] | None = None,
    before_finish: Callable[[], None] | None = None,
    mask: GivenMask | None = None,
) -> tuple[Outcome, Plan | None]:
    """Write the features of a slide to a file; a file that is already complete and the same is left alone.

    `overwrite` replaces a file that is incomplete, or of other settings.
    `before_finish` is called when all rows are there, and raises where the file must not get its name.

    Raises:
        SlideError, BackendError, StoreError, OutputUnwritable: nothing stands under `path` then that did not before.
    """
    target = Target(path, Model(bundle, backend))
    return extract_targets(slide, [target], settings, readers, overwrite, on_plan, on_progress, before_finish, mask)


def extract_targets(
    slide: Slide,
    targets: Sequence[Target],
    settings: ExtractSettings,
    readers: int,
    overwrite: bool = False,
    on_plan: OnPlan | None = None,
    on_progress: Callable[[int], None] | None = None,
    before_finish: Callable[[], None] | None = None,
    mask: GivenMask | None = None,
) -> tuple[Outcome, Plan | None]:
    """`extract_slide` for models of one tile size: each tile is read once; files that are complete are left alone.

    Raises:
        SlideError, BackendError, StoreError, OutputUnwritable: as `extract_slide`.
    """
    start = time.perf_counter()
    paths = tuple(target.path for target in targets)
    made = {t.path: made_of(slide.info, t.model.bundle, t.model.backend.precision, settings, mask) for t in targets}
    done = [target for target in targets if _is_done(target.path, made[target.path], overwrite)]
    todo = [target for target in targets if target not in done]
    read_by = Outcome(
        slide.info.path, "skipped", paths[0], outputs=paths,
        reader=slide.info.reader, reader_reason=slide.info.reader_reason,
    )  # fmt: skip
    found = [_checked(target.path, slide.info, target.model, settings, on_progress) for target in done]
    if not todo:
        seconds = time.perf_counter() - start if any(one for one, _ in found) else 0.0
        return _with_checks(replace(read_by, message="already done", seconds=seconds), found), None
    tile_px = todo[0].model.bundle.manifest.tile_px
    assert all(target.model.bundle.manifest.tile_px == tile_px for target in todo)
    plan = make_plan(slide, tile_px, settings, mask)
    with ExitStack() as open_stores:
        stores = [
            open_stores.enter_context(FeatureStore(t.path, _layout(plan, t, settings, made[t.path]))) for t in todo
        ]
        resumed = [store.rows_done for store in stores]
        if on_plan is not None:
            on_plan(plan, min(resumed))
        engines = [target.model.backend for target in todo]
        times, bad = run_pipeline(
            slide,
            plan.coords,
            plan.grid.scale,
            tile_px,
            engines[0] if len(todo) == 1 else JoinedEngines(engines),
            stores[0] if len(todo) == 1 else JoinedStores(stores),
            readers,
            on_progress,
            settings.on_bad_tile == "fail",
        )
        bad_tiles = [int((store.statuses() != TileStatus.GOOD).sum()) for store in stores]  # an earlier run's included
        for target, store, rows, count in zip(todo, stores, resumed, bad_tiles, strict=True):
            if count == len(plan.kept) > 0:
                store.discard()
                raise SlideUnreadable(
                    f"{slide.info.path}: none of its {count} tiles has features; "
                    f"the first: {bad.reasons[0] if bad.reasons else 'the model gives no finite numbers'}",
                    hint="The file is damaged: compare its checksum with the original and copy it again.",
                )
            agreement, warning = _checked(store.partial, slide.info, target.model, settings, on_progress)
            found.append((agreement, warning))
            if before_finish is not None:
                before_finish()
            attrs = _run_attrs(times, bad, plan, rows) | {"bad_tiles": count}
            if agreement is not None:
                attrs |= {"check": asdict(agreement)} | ({"check_warning": warning} if warning else {})
            store.finish(attrs, drop_bad=settings.on_bad_tile == "drop")
    left_out = max(bad_tiles) if settings.on_bad_tile == "drop" else 0
    outcome = replace(
        read_by,
        status="done" if len(plan.kept) else "no-tissue",
        tiles=len(plan.kept) - left_out,
        bad_tiles=max(bad_tiles),
        left_out=left_out,
        seconds=time.perf_counter() - start,
        times=times,
        message="" if len(plan.kept) else _why_empty(plan),
    )
    return _with_checks(outcome, found), plan


def _checked(
    features: Path,
    info: SlideInfo,
    model: Model,
    settings: ExtractSettings,
    on_progress: Callable[[int], None] | None,
) -> tuple[Agreement | None, str]:
    """Recompute some rows of a file, where that is asked for; return also what is wrong with them, if anything."""
    if model.check is None:
        return None, ""
    tile_px, precision = model.bundle.manifest.tile_px, model.backend.precision
    scale = make_grid(info, tile_px, settings.mpp, settings.stride_px).scale
    agreement = check_rows(features, info, scale, tile_px, model.check, on_progress)
    least = MIN_COSINE[precision]
    if reduction_for(info, scale) > 1:
        least = min(least, _MIN_COSINE_REDUCED)
    if agreement is None or agreement.min_cosine >= least:
        return agreement, ""
    return agreement, (
        f"{info.path}: the check of {model.bundle.manifest.name} found a cosine of {agreement.min_cosine:.6f} "
        f"to {agreement.reference}; {precision} has at least {least:g}"
    )


def _with_checks(outcome: Outcome, found: Sequence[tuple[Agreement | None, str]]) -> Outcome:
    """Add the agreement of the model that agrees least, and all warnings."""
    agreements = [agreement for agreement, _ in found if agreement is not None]
    worst = min(agreements, key=lambda agreement: agreement.min_cosine, default=None)
    return replace(outcome, agreement=worst, warning="; ".join(warning for _, warning in found if warning))


def _is_done(path: Path, facts: dict[str, Any], overwrite: bool) -> bool:
    """Say whether the file is there, complete, and what would be made now.

    Raises:
        FingerprintMismatch: something else is there, and may not be overwritten.
    """
    if not path.exists():
        return False
    different = differences(path, facts)
    if different and overwrite:
        return False
    if different:
        raise FingerprintMismatch(
            f"{path}: exists, and is not what would be made now: {different}",
            hint="Use --overwrite to replace it, or another --out.",
        )
    remove_leftovers(path)
    return True


def _layout(plan: Plan, target: Target, settings: ExtractSettings, facts: dict[str, Any]) -> Layout:
    path, bundle, backend = target.path, target.model.bundle, target.model.backend
    info, grid, manifest = plan.info, plan.grid, bundle.manifest
    level = info.levels[plan.level]
    assert info.mpp is not None
    root: dict[str, Any] = {
        "mtdp_version": mtdp_runtime.__version__,
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


def _run_attrs(times: RunTimes, bad: BadTiles, plan: Plan, resumed: int) -> dict[str, Any]:
    return {
        "timing": {
            "wall_s": times.wall_s,
            "plan_s": plan.seconds,
            "device_idle": times.device_idle,
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


def _why_empty(plan: Plan) -> str:
    if not len(plan.grid):
        info = plan.info
        return f"the slide ({info.width} x {info.height} px) is smaller than one tile ({plan.grid.tile0:.0f} px)"
    return f"no tile has enough tissue ({plan.tissue.area_mm2:.3g} mm² found in the whole slide)"


def writable_folder(folder: Path) -> None:
    """Make the folder and prove that it can be written.

    Raises:
        OutputUnwritable: it cannot.
    """
    probe = folder / f".mtdp-{os.getpid()}.probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OutputUnwritable(
            f"{folder}: cannot be written: {error.strerror}", hint="Choose another folder with --out."
        ) from error
