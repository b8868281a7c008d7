"""Many slides in this process, one after the other: a bad one is recorded and the others go on.

Several processes may work on one list and one folder: each slide is claimed first, and looked at (is it done?) after.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from mtdp_runtime.cohort.attempt import attempt
from mtdp_runtime.cohort.claims import BEAT_S, EXPIRES_S, Held, seems_held
from mtdp_runtime.cohort.requests import SlideRequest
from mtdp_runtime.cohort.under_way import Run, all_there, failed_before
from mtdp_runtime.extraction.outcome import Outcome
from mtdp_runtime.files import writable_folder

_LOOK_EVERY_S: Final = 2.0


def extract_slides(requests: Sequence[SlideRequest], run: Run) -> Iterator[Outcome]:
    """Attempt each slide and yield how it went; what a worker before this one settled is left out.

    A slide that another process works on is tried once more at the end, and then left to it. Where nothing shows that
    the process lives, its claim is waited for.

    Raises:
        BackendError, OutputUnwritable: what would fail for every slide ends the run.
    """
    if len(run.job.folders) > 1:
        for folder in run.job.folders:
            writable_folder(folder)
    held: dict[SlideRequest, Held] = {}
    for number, request in enumerate(requests):
        if request.name in run.worker.settled:
            continue
        following = None if run.staging is None else _following(requests[number + 1 :], run)
        outcome = attempt(request, run, following)
        if isinstance(outcome, Held):
            held[request] = outcome
        else:
            yield replace(outcome, name=request.name)
    yield from _wait_for(held, run)


def _wait_for(held: Mapping[SlideRequest, Held], run: Run) -> Iterator[Outcome]:
    """Attempt slides that others had; wait for those whose owner gives no sign, until it does or its claim expires."""
    left, give_up_s = dict(held), time.monotonic() + EXPIRES_S + BEAT_S
    while left:
        for request, first in list(left.items()):
            outcome = attempt(request, run)
            if isinstance(outcome, Held) and outcome.beat == first.beat != "" and time.monotonic() < give_up_s:
                continue
            del left[request]
            if isinstance(outcome, Held):
                outcome = Outcome(request.path, "claimed", message=f"{outcome.by} works on it")
            yield replace(outcome, name=request.name)
        if left:
            time.sleep(_LOOK_EVERY_S)


def _following(rest: Sequence[SlideRequest], run: Run) -> SlideRequest | None:
    """Return the slide that will be worked on next, as far as that can be known."""
    for request in rest:
        settled = request.name in run.worker.settled
        done = not run.job.overwrite and all_there(request, run)
        if settled or done or seems_held(run.job.out, request.name):
            continue
        if failed_before(request, run) is None:
            return request
    return None
