"""One slide to one feature file."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from mtdp_runtime.backends.checked import CheckedEngine
from mtdp_runtime.bundle.tolerance import least_cosine
from mtdp_runtime.errors import FingerprintMismatch, NothingFinite, SlideError, SlideUnreadable
from mtdp_runtime.extraction.check import Agreement, check_rows
from mtdp_runtime.extraction.models import Model, Target
from mtdp_runtime.extraction.outcome import Outcome
from mtdp_runtime.extraction.provenance import is_aligned, layout_of, made_of, run_attrs
from mtdp_runtime.extraction.unchanged import what_changed
from mtdp_runtime.pipeline.fan_out import JoinedEngines, JoinedStores
from mtdp_runtime.pipeline.run import run_pipeline
from mtdp_runtime.pipeline.timing import BadTiles, RunTimes
from mtdp_runtime.settings import ExtractSettings
from mtdp_runtime.slide import Slide, SlideInfo
from mtdp_runtime.slide.source import tiles_source
from mtdp_runtime.store.layout import TileStatus
from mtdp_runtime.store.writer import FeatureStore, differences, remove_leftovers
from mtdp_runtime.tiling.given import NOTHING, Given
from mtdp_runtime.tiling.grid import known_mpp
from mtdp_runtime.tiling.plan import Plan, make_plan, why_empty
from mtdp_runtime.tiling.tissue import TissueMask

# A decoder that reduces gives other pixels than the reference's averaging: 0.9997 was measured (benchmarks/RESULTS.md).


TISSUE: Final = "finding tissue"
TILES: Final = "tiles"
CHECK: Final = "checking tiles with the reference"
_BEYOND_FLOAT16: Final = "have a patch token that float16, in which they are stored, does not hold (beyond 65504)"
_QUEUED: Final = 8  # batches that may wait for the disk
_QUEUED_TOKENS: Final = 2  # which take up to hundreds of megabytes each


@dataclass(frozen=True, slots=True)
class Listeners:
    """Who wants to hear of a slide while it is worked on."""

    on_plan: Callable[[int, int], None] = lambda tiles, done: None  # of all tiles, those of an earlier run
    on_progress: Callable[[int], None] = lambda tiles: None  # from a thread of the run, after each batch
    before_commit: Callable[[], None] = lambda: None  # and at the end; raises where the slide is another process's
    on_slide: Callable[[Path], None] = lambda path: None  # it is begun
    on_phase: Callable[[str], None] = lambda phase: None  # what is done with it now, in words


SILENT: Final = Listeners()


def extract_slide(
    slide: Slide,
    targets: Sequence[Target],
    settings: ExtractSettings,
    *,
    readers: int,
    overwrite: bool = False,
    given: Given = NOTHING,
    listeners: Listeners = SILENT,
    tissue: TissueMask | None = None,
) -> tuple[Outcome, Plan | None]:
    """Write the features of a slide, a file for each model; a file that is already complete and the same is left alone.

    The models are of one tile size: each tile is read once for all of them. `overwrite` replaces a file that is
    incomplete, or of other settings; `tissue` is the slide's, where it was found already.

    Raises:
        SlideError, BackendError, StoreError, OutputUnwritable: nothing stands under a target's path then that did not
            before.
    """
    start = time.perf_counter()
    info, paths = slide.info, tuple(target.path for target in targets)
    made = {t.path: made_of(info, t.model.bundle, t.model.backend.precision, settings, given) for t in targets}
    done = [target for target in targets if _is_done(target, made[target.path], overwrite, slide, settings)]
    todo = [target for target in targets if target not in done]
    read_by = Outcome(
        info.path,
        "skipped",
        paths[0],
        outputs=paths,
        reader=info.reader,
        reader_reason=info.reader_reason,
        own_decoder=info.own_decoder,
    )
    tile_px = targets[0].model.bundle.manifest.tile_px
    aligned = is_aligned(info, settings, tile_px, given)
    found = [_check(target.path, info, target.model, settings, listeners, aligned) for target in done]
    if not todo:
        seconds = time.perf_counter() - start if any(one for one, _ in found) else 0.0
        return _with_checks(replace(read_by, message="already done", seconds=seconds), found), None
    assert all(target.model.bundle.manifest.tile_px == tile_px for target in todo)
    listeners.on_phase(TISSUE)
    plan = make_plan(slide, tile_px, settings, given, tissue)
    with ExitStack() as open_stores:
        stores = [
            open_stores.enter_context(
                FeatureStore(t.path, layout_of(plan, t, settings, made[t.path]), listeners.before_commit)
            )
            for t in todo
        ]
        resumed = [store.rows_done for store in stores]
        listeners.on_phase(TILES)
        listeners.on_plan(len(plan.kept), min(resumed))
        engines = [CheckedEngine(target.model.backend, target.model.bundle) for target in todo]
        times, bad = run_pipeline(
            slide,
            plan.coords,
            plan.grid.scale,
            tile_px,
            engines[0] if len(todo) == 1 else JoinedEngines(engines),
            stores[0] if len(todo) == 1 else JoinedStores(stores),
            readers=readers,
            on_progress=listeners.on_progress,
            fail_on_bad_tile=settings.on_bad_tile == "fail",
            source=plan.source,
            queued=_QUEUED_TOKENS if settings.tokens else _QUEUED,
        )
        bad_tiles = [int((store.statuses() != TileStatus.GOOD).sum()) for store in stores]  # an earlier run's included
        for target, store, rows, count in zip(todo, stores, resumed, bad_tiles, strict=True):
            if count == len(plan.kept) > 0:
                refusal = _nothing_good(info, store, bad)
                store.discard()
                raise refusal
            agreement, warning = _check(store.partial, info, target.model, settings, listeners, aligned)
            found += [(agreement, warning), (None, _lost_tokens(store))]
            attrs = run_attrs(times, bad, plan, rows) | {"bad_tiles": count}
            if agreement is not None:
                attrs |= {"check": asdict(agreement)} | ({"check_warning": warning} if warning else {})
            store.finish(attrs, drop_bad=settings.on_bad_tile == "drop")
    outcome = _computed(read_by, plan, times, max(bad_tiles), dropped=settings.on_bad_tile == "drop")
    return _with_checks(replace(outcome, seconds=time.perf_counter() - start), found), plan


def _computed(read_by: Outcome, plan: Plan, times: RunTimes, bad_tiles: int, *, dropped: bool) -> Outcome:
    """Return the outcome of a slide whose tiles were computed now; `dropped` bad tiles have no row."""
    left_out = bad_tiles if dropped else 0
    return replace(
        read_by,
        status="done" if len(plan.kept) else "no-tissue",
        tiles=len(plan.kept) - left_out,
        bad_tiles=bad_tiles,
        left_out=left_out,
        tiles_before=len(plan.kept) - times.tiles,
        times=times,
        message="" if len(plan.kept) else why_empty(plan),
        warning=plan.remarks,
    )


def _lost_tokens(store: FeatureStore) -> str:
    if not store.tokens_lost:
        return ""
    return f"{store.path}: {store.tokens_lost} tiles {_BEYOND_FLOAT16}: their rows are NaN, with the status NOT_FINITE"


def _nothing_good(info: SlideInfo, store: FeatureStore, bad: BadTiles) -> SlideError:
    statuses = store.statuses()
    what = f"{info.path}: none of its {len(statuses)} tiles has features; "
    if store.tokens_lost:
        return NothingFinite(f"{what}all {_BEYOND_FLOAT16}", hint="Run it without --tokens.")
    if (statuses == TileStatus.NOT_FINITE).any():
        return NothingFinite(
            f"{what}the model gives no finite numbers",
            hint="The slide can be read: try --precision fp32 or another --backend; mtdp-doctor tries the engines.",
        )
    return SlideUnreadable(
        f"{what}the first: {bad.reasons[0] if bad.reasons else 'no tile can be read'}",
        hint="The file is damaged: compare its checksum with the original and copy it again.",
    )


def _check(
    features: Path,
    info: SlideInfo,
    model: Model,
    settings: ExtractSettings,
    listeners: Listeners,
    aligned: bool,
) -> tuple[Agreement | None, str]:
    """Recompute some rows of a file, where that is asked for; return also what is wrong with them, if anything."""
    if model.check is None:
        return None, ""
    listeners.on_phase(CHECK)
    precision, scale, tile_px = model.backend.precision, settings.mpp / known_mpp(info), model.bundle.manifest.tile_px
    source = tiles_source(info, scale, tile_px, aligned)
    agreement = check_rows(features, info, scale, tile_px, model.check, listeners.on_progress, source)
    least = least_cosine(model.bundle.manifest, precision)
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
    warnings = [outcome.warning, *(warning for _, warning in found)]
    return replace(outcome, agreement=worst, warning="; ".join(filter(None, warnings)))


def standing(
    slide: Slide,
    targets: Sequence[Target],
    settings: ExtractSettings,
    *,
    overwrite: bool = False,
    given: Given = NOTHING,
) -> bool:
    """Say whether the file of each model is there as it would be made now. Nothing is written or removed.

    Raises:
        FingerprintMismatch: something else is there, and may not be overwritten.
        StoreError: a file there cannot be read.
    """
    made = [made_of(slide.info, t.model.bundle, t.model.backend.precision, settings, given) for t in targets]
    return all(_stands(t, facts, overwrite, slide, settings) for t, facts in zip(targets, made, strict=True))


def _is_done(target: Target, facts: dict[str, Any], overwrite: bool, slide: Slide, settings: ExtractSettings) -> bool:
    """Do what `_stands` does, and remove what an earlier run left beside a file that is done."""
    done = _stands(target, facts, overwrite, slide, settings)
    if done:
        remove_leftovers(target.path)
    return done


def _stands(target: Target, facts: dict[str, Any], overwrite: bool, slide: Slide, settings: ExtractSettings) -> bool:
    """Say whether the file is there, complete, and what would be made now.

    Raises:
        FingerprintMismatch: something else is there, and may not be overwritten.
    """
    path, tile_px = target.path, target.model.bundle.manifest.tile_px
    if not path.exists():
        return False
    different = differences(path, facts)
    different = different or what_changed(path, slide, tile_px, settings.mpp / known_mpp(slide.info))
    if different and overwrite:
        return False
    if different:
        raise FingerprintMismatch(
            f"{path}: exists, and is not what would be made now: {different}",
            hint="Use --overwrite to replace it, or another --out.",
        )
    return True
