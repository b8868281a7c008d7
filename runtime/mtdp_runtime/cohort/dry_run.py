"""Slides planned and not computed: their tiles, and what these will cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mtdp_runtime.cohort.estimate import read_seconds
from mtdp_runtime.cohort.preflight import begin_look
from mtdp_runtime.cohort.requests import MaskRefused, SlideRequest, mask_of, open_requested
from mtdp_runtime.cohort.watchdog import Worker
from mtdp_runtime.errors import RuntimeFailure, SlideError
from mtdp_runtime.extraction.outcome import Outcome, failed, log_line, unforeseen
from mtdp_runtime.settings import ExtractSettings
from mtdp_runtime.store import run_log
from mtdp_runtime.tiling.plan import Plan, make_plan


def plan_slides(
    requests: Sequence[SlideRequest],
    tile_px: int,
    settings: ExtractSettings,
    cost: Callable[[Plan, float, int], dict[str, Any]],
    worker: Worker | None = None,
) -> Iterator[tuple[Outcome, Plan | None, dict[str, Any]]]:
    """Find the tissue and the tiles of each slide, and compute nothing.

    Yields the outcome, the plan, and what `cost` makes of the plan and of `read_seconds` (how long a tile takes, and
    over how many that was measured).
    """
    for request in requests:
        if worker is not None and request.name in worker.settled:
            continue
        begin_look(request, worker)
        planned = _plan(request, tile_px, settings, cost, worker)
        if worker is not None:
            worker.end(request.name, run_log.counts(log_line(planned[0])) | planned[2])
        yield planned


def _plan(
    request: SlideRequest,
    tile_px: int,
    settings: ExtractSettings,
    cost: Callable[[Plan, float, int], dict[str, Any]],
    worker: Worker | None,
) -> tuple[Outcome, Plan | None, dict[str, Any]]:
    def beat() -> None:
        if worker is not None:
            worker.beat()

    try:
        with open_requested(request, request.path, beat) as slide:
            plan = make_plan(slide, tile_px, settings, mask_of(request, slide.info))
            costs = cost(plan, *read_seconds(slide, plan))
    except (SlideError, MaskRefused) as error:
        return failed(request.path, error), None, {}
    except RuntimeFailure:
        raise
    except Exception as error:  # as in `cohort`: it must not end the others
        return unforeseen(request.path, error), None, {}
    return Outcome(request.path, "planned", tiles=len(plan.kept), seconds=plan.seconds), plan, costs
