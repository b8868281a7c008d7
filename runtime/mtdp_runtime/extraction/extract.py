"""One slide to one feature file."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from mtdp_runtime.backends import Backend
from mtdp_runtime.bundle import Bundle
from mtdp_runtime.bundle.tolerance import MIN_COSINE
from mtdp_runtime.errors import FingerprintMismatch, SlideUnreadable
from mtdp_runtime.extraction.check import Agreement, check_rows
from mtdp_runtime.extraction.models import Model, Target
from mtdp_runtime.extraction.outcome import Outcome
from mtdp_runtime.extraction.provenance import layout_of, made_of, run_attrs
from mtdp_runtime.pipeline.fan_out import JoinedEngines, JoinedStores
from mtdp_runtime.pipeline.run import run_pipeline
from mtdp_runtime.settings import ExtractSettings
from mtdp_runtime.slide import Slide, SlideInfo, reduction_for
from mtdp_runtime.store.layout import TileStatus
from mtdp_runtime.store.writer import FeatureStore, differences, remove_leftovers
from mtdp_runtime.tiling.given_mask import GivenMask
from mtdp_runtime.tiling.grid import known_mpp
from mtdp_runtime.tiling.plan import Plan, make_plan, why_empty

OnPlan = Callable[[Plan, int], None]  # what will be computed, and how many of its tiles an earlier run did

# A decoder that reduces gives other pixels than the reference's averaging: 0.9997 was measured (benchmarks/RESULTS.md).
_MIN_COSINE_REDUCED: Final = 0.999


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
    info, paths = slide.info, tuple(target.path for target in targets)
    made = {t.path: made_of(info, t.model.bundle, t.model.backend.precision, settings, mask) for t in targets}
    done = [target for target in targets if _is_done(target.path, made[target.path], overwrite)]
    todo = [target for target in targets if target not in done]
    read_by = Outcome(
        info.path, "skipped", paths[0], outputs=paths, reader=info.reader, reader_reason=info.reader_reason
    )
    found = [_checked(target.path, info, target.model, settings, on_progress) for target in done]
    if not todo:
        seconds = time.perf_counter() - start if any(one for one, _ in found) else 0.0
        return _with_checks(replace(read_by, message="already done", seconds=seconds), found), None
    tile_px = todo[0].model.bundle.manifest.tile_px
    assert all(target.model.bundle.manifest.tile_px == tile_px for target in todo)
    plan = make_plan(slide, tile_px, settings, mask)
    with ExitStack() as open_stores:
        stores = [
            open_stores.enter_context(FeatureStore(t.path, layout_of(plan, t, settings, made[t.path]))) for t in todo
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
                    f"{info.path}: none of its {count} tiles has features; "
                    f"the first: {bad.reasons[0] if bad.reasons else 'the model gives no finite numbers'}",
                    hint="The file is damaged: compare its checksum with the original and copy it again.",
                )
            agreement, warning = _checked(store.partial, info, target.model, settings, on_progress)
            found.append((agreement, warning))
            if before_finish is not None:
                before_finish()
            attrs = run_attrs(times, bad, plan, rows) | {"bad_tiles": count}
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
        message="" if len(plan.kept) else why_empty(plan),
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
    precision, scale = model.backend.precision, settings.mpp / known_mpp(info)
    agreement = check_rows(features, info, scale, model.bundle.manifest.tile_px, model.check, on_progress)
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
