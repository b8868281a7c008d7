"""Slides planned and not computed: their tiles, and what these will cost. What is done already costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mtdp_runtime.backends import load
from mtdp_runtime.backends.speed import EngineSpeed, engine_speed
from mtdp_runtime.cohort.blame import as_said
from mtdp_runtime.cohort.estimate import costs, read_seconds
from mtdp_runtime.cohort.given_files import GivenRefused, given_of
from mtdp_runtime.cohort.job import Job, Pass
from mtdp_runtime.cohort.preflight import begin_look
from mtdp_runtime.cohort.requests import SlideRequest, open_requested
from mtdp_runtime.cohort.under_way import targets_in
from mtdp_runtime.cohort.watchdog import UNWATCHED, Worker
from mtdp_runtime.errors import BackendError, RuntimeFailure, SlideError, SlideTooCoarse, StoreError
from mtdp_runtime.extraction.extract import standing
from mtdp_runtime.extraction.models import Model
from mtdp_runtime.extraction.outcome import Outcome, failed, log_line, unforeseen
from mtdp_runtime.store import run_log
from mtdp_runtime.tiling.plan import Plan, make_plan, why_empty
from mtdp_runtime.tiling.tissue import TissueMask

Costs = Callable[[Plan, float, int], dict[str, Any]]
Planned = tuple[Outcome, list[tuple[float, Plan]], dict[str, Any]]  # scale, µm per pixel, and what is planned at it


def plan_job(
    job: Job,
    worker: Worker,
    *,
    no_estimate: Callable[[str], None],
    on_speeds: Callable[[Sequence[EngineSpeed]], None] = lambda speeds: None,
) -> Iterator[Planned]:
    """Plan the slides of a job, and estimate what they cost from the speed of its engines, measured now.

    `no_estimate` is told why the time is not known, where an engine does not run here; `on_speeds` hears the speeds.
    """
    speeds: list[EngineSpeed] = []
    models: list[Model] = []
    try:
        for bundle in job.bundles:
            worker.load(str(bundle.path))
            with load(job.backend, bundle, job.precision, job.batch, job.threads)[0] as engine:
                speeds.append(engine_speed(engine, bundle.manifest.tile_px))
                models.append(Model(bundle, engine))
    except BackendError as error:
        speeds, models = [], []  # then no precision is known either, so no file can be said to be what would be made
        no_estimate(str(error))
    worker.load("")
    on_speeds(speeds)
    manifests = [bundle.manifest for bundle in job.bundles]
    cost = partial(costs, manifests=manifests, settings=job.settings, speeds=speeds, threads=job.threads)
    yield from plan_slides(
        job.slides, manifests[0].tile_px, job.passes, cost, worker, models=models, overwrite=job.overwrite
    )


def plan_slides(
    requests: Sequence[SlideRequest],
    tile_px: int,
    passes: Sequence[Pass],
    cost: Costs,
    worker: Worker = UNWATCHED,
    *,
    models: Sequence[Model] = (),
    overwrite: bool = False,
) -> Iterator[Planned]:
    """Find the tissue and the tiles of each slide, and compute nothing.

    Args:
        requests: the slides.
        tile_px: side of a tile.
        passes: the scales of the run.
        cost: of a plan and of `read_seconds`: how long a tile takes, and over how many that was measured.
        worker: is told where this is.
        models: where they are known, a slide whose files are there as they would be made is left out.
        overwrite: files of other settings would be replaced.

    Yields the outcome, the plan of each scale where there is one, and what `cost` makes of them.
    """
    for request in requests:
        if request.name in worker.settled:
            continue
        begin_look(request, worker)
        planned = _plan(request, tile_px, passes, cost, worker, models=models, overwrite=overwrite)
        worker.end(request.name, run_log.counts(log_line(planned[0])) | planned[2])
        yield planned


def _plan(
    request: SlideRequest,
    tile_px: int,
    passes: Sequence[Pass],
    cost: Costs,
    worker: Worker,
    *,
    models: Sequence[Model],
    overwrite: bool,
) -> Planned:
    plans: list[tuple[float, Plan]] = []
    spent: list[dict[str, Any]] = []
    paths: list[Path] = []
    tissue: TissueMask | None = None
    refusal: SlideTooCoarse | None = None  # of a scale: it leaves the others to be done, and then fails the slide
    try:
        with open_requested(request, request.path, worker.beat) as slide:
            given = given_of(request, slide.info, tile_px, passes[0].settings.mpp)
            for one in passes:
                targets = targets_in(one, models, request) if models else []
                paths += [target.path for target in targets]
                try:
                    if targets and standing(slide, targets, one.settings, overwrite=overwrite, given=given):
                        continue
                    plan = make_plan(slide, tile_px, one.settings, given, tissue)
                except SlideTooCoarse as error:
                    refusal = refusal or error
                    continue
                tissue = plan.tissue
                plans.append((one.settings.mpp, plan))
                spent.append(cost(plan, *read_seconds(slide, plan)))
    except (GivenRefused, StoreError) as error:
        return failed(request.path, error), [], {}
    except SlideError as error:
        return as_said(failed(request.path, error), error, request.path), [], {}
    except RuntimeFailure:
        raise
    except Exception as error:  # as in `cohort`: it must not end the others
        return as_said(unforeseen(request.path, error), error, request.path), [], {}
    if refusal is not None and not plans:
        return failed(request.path, refusal), [], {}
    if not plans:
        return Outcome(request.path, "skipped", paths[0], message="already done", outputs=tuple(paths)), [], {}
    tiles, warnings = sum(len(plan.kept) for _, plan in plans), [plan.remarks for _, plan in plans if plan.remarks]
    outcome = Outcome(
        request.path,
        "planned",
        tiles=tiles,
        seconds=sum(plan.seconds for _, plan in plans),
        warning="; ".join(warnings),
    )
    if refusal is not None:
        outcome = replace(outcome, status="failed", message=str(refusal), hint=refusal.hint)
    elif not tiles:
        outcome = replace(outcome, message=why_empty(plans[0][1]))
    return outcome, plans, _sum(plans, spent, by_scale=len(passes) > 1)


def _sum(plans: Sequence[tuple[float, Plan]], spent: Sequence[dict[str, Any]], *, by_scale: bool) -> dict[str, Any]:
    """Add up what all scales of a slide cost; `scales` says it of each, where there are several."""
    total = dict(spent[0])
    for more in spent[1:]:
        total |= {key: total[key] + more[key] for key in ("bytes", "tokens_bytes", "estimated_s") if key in total}
    if by_scale:
        total["scales"] = [
            {"mpp": mpp, "tiles": len(plan.kept), **{key: one[key] for key in ("bytes", "tokens_bytes") if key in one}}
            for (mpp, plan), one in zip(plans, spent, strict=True)
        ]
    return total
