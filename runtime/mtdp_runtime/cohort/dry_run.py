"""Slides planned and not computed: their tiles, and what these will cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from mtdp_runtime.backends import load
from mtdp_runtime.backends.speed import EngineSpeed, engine_speed
from mtdp_runtime.cohort.estimate import costs, read_seconds
from mtdp_runtime.cohort.job import Job
from mtdp_runtime.cohort.preflight import begin_look
from mtdp_runtime.cohort.requests import MaskRefused, SlideRequest, mask_of, open_requested
from mtdp_runtime.cohort.watchdog import UNWATCHED, Worker
from mtdp_runtime.errors import BackendError, RuntimeFailure, SlideError
from mtdp_runtime.extraction.outcome import Outcome, failed, log_line, unforeseen
from mtdp_runtime.settings import ExtractSettings
from mtdp_runtime.store import run_log
from mtdp_runtime.tiling.plan import Plan, make_plan


def plan_job(
    job: Job, worker: Worker, no_estimate: Callable[[str], None]
) -> Iterator[tuple[Outcome, Plan | None, dict[str, Any]]]:
    """Plan the slides of a job, and estimate what they cost from the speed of its engines, measured now.

    `no_estimate` is told why the time is not known, where an engine does not run here.
    """
    speeds: list[EngineSpeed] = []
    try:
        for bundle in job.bundles:
            with load(job.backend, bundle, job.precision, job.batch, job.threads)[0] as engine:
                speeds.append(engine_speed(engine, bundle.manifest.tile_px))
    except BackendError as error:
        speeds = []
        no_estimate(str(error))
    manifests = [bundle.manifest for bundle in job.bundles]
    cost = partial(costs, manifests=manifests, settings=job.settings, speeds=speeds, threads=job.threads)
    yield from plan_slides(job.slides, manifests[0].tile_px, job.settings, cost, worker)


def plan_slides(
    requests: Sequence[SlideRequest],
    tile_px: int,
    settings: ExtractSettings,
    cost: Callable[[Plan, float, int], dict[str, Any]],
    worker: Worker = UNWATCHED,
) -> Iterator[tuple[Outcome, Plan | None, dict[str, Any]]]:
    """Find the tissue and the tiles of each slide, and compute nothing.

    Yields the outcome, the plan, and what `cost` makes of the plan and of `read_seconds` (how long a tile takes, and
    over how many that was measured).
    """
    for request in requests:
        if request.name in worker.settled:
            continue
        begin_look(request, worker)
        planned = _plan(request, tile_px, settings, cost, worker)
        worker.end(request.name, run_log.counts(log_line(planned[0])) | planned[2])
        yield planned


def _plan(
    request: SlideRequest,
    tile_px: int,
    settings: ExtractSettings,
    cost: Callable[[Plan, float, int], dict[str, Any]],
    worker: Worker,
) -> tuple[Outcome, Plan | None, dict[str, Any]]:
    try:
        with open_requested(request, request.path, worker.beat) as slide:
            plan = make_plan(slide, tile_px, settings, mask_of(request, slide.info))
            spent = cost(plan, *read_seconds(slide, plan))
    except (SlideError, MaskRefused) as error:
        return failed(request.path, error), None, {}
    except RuntimeFailure:
        raise
    except Exception as error:  # as in `cohort`: it must not end the others
        return unforeseen(request.path, error), None, {}
    return Outcome(request.path, "planned", tiles=len(plan.kept), seconds=plan.seconds), plan, spent
