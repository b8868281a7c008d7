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
from mtdp_runtime.cohort.job import Job
from mtdp_runtime.cohort.preflight import begin_look
from mtdp_runtime.cohort.requests import SlideRequest, open_requested
from mtdp_runtime.cohort.watchdog import UNWATCHED, Worker
from mtdp_runtime.errors import BackendError, RuntimeFailure, SlideError, StoreError
from mtdp_runtime.extraction.extract import standing
from mtdp_runtime.extraction.models import Model, Target
from mtdp_runtime.extraction.outcome import Outcome, failed, log_line, unforeseen
from mtdp_runtime.settings import ExtractSettings
from mtdp_runtime.store import run_log
from mtdp_runtime.tiling.plan import Plan, make_plan, why_empty

Costs = Callable[[Plan, float, int], dict[str, Any]]
Planned = tuple[Outcome, Plan | None, dict[str, Any]]


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
    places = list(zip(job.folders, models, strict=True)) if models else []
    yield from plan_slides(
        job.slides, manifests[0].tile_px, job.settings, cost, worker, places=places, overwrite=job.overwrite
    )


def plan_slides(
    requests: Sequence[SlideRequest],
    tile_px: int,
    settings: ExtractSettings,
    cost: Costs,
    worker: Worker = UNWATCHED,
    *,
    places: Sequence[tuple[Path, Model]] = (),
    overwrite: bool = False,
) -> Iterator[Planned]:
    """Find the tissue and the tiles of each slide, and compute nothing.

    Args:
        requests: the slides.
        tile_px: side of a tile.
        settings: of the run.
        cost: of a plan and of `read_seconds`: how long a tile takes, and over how many that was measured.
        worker: is told where this is.
        places: the folder of each model's files; a slide whose files are there as they would be made is left out.
        overwrite: files of other settings would be replaced.

    Yields the outcome, the plan where there is one, and what `cost` makes of it.
    """
    for request in requests:
        if request.name in worker.settled:
            continue
        begin_look(request, worker)
        targets = [Target(folder / f"{request.name}.h5", model) for folder, model in places]
        planned = _plan(request, tile_px, settings, cost, worker, targets=targets, overwrite=overwrite)
        worker.end(request.name, run_log.counts(log_line(planned[0])) | planned[2])
        yield planned


def _plan(
    request: SlideRequest,
    tile_px: int,
    settings: ExtractSettings,
    cost: Costs,
    worker: Worker,
    *,
    targets: Sequence[Target],
    overwrite: bool,
) -> Planned:
    try:
        with open_requested(request, request.path, worker.beat) as slide:
            given = given_of(request, slide.info, tile_px, settings.mpp)
            if targets and standing(slide, targets, settings, overwrite=overwrite, given=given):
                paths = tuple(target.path for target in targets)
                return Outcome(request.path, "skipped", paths[0], message="already done", outputs=paths), None, {}
            plan = make_plan(slide, tile_px, settings, given)
            spent = cost(plan, *read_seconds(slide, plan))
    except (GivenRefused, StoreError) as error:
        return failed(request.path, error), None, {}
    except SlideError as error:
        return as_said(failed(request.path, error), error, request.path), None, {}
    except RuntimeFailure:
        raise
    except Exception as error:  # as in `cohort`: it must not end the others
        return as_said(unforeseen(request.path, error), error, request.path), None, {}
    outcome = Outcome(request.path, "planned", tiles=len(plan.kept), seconds=plan.seconds, warning=plan.remarks)
    if not len(plan.kept):
        outcome = replace(outcome, message=why_empty(plan))
    return outcome, plan, spent
