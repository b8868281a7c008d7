"""Many slides in this process, one after the other: a bad one is recorded and the others go on.

Several processes may work on one list and one folder: each slide is claimed first, and looked at (is it done?) after.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mtdp_runtime.cohort.attempt import Run, all_there, attempt, failed_before
from mtdp_runtime.cohort.claims import Held, seems_held
from mtdp_runtime.cohort.requests import SlideRequest
from mtdp_runtime.extraction.outcome import Outcome
from mtdp_runtime.files import writable_folder


def extract_slides(requests: Sequence[SlideRequest], run: Run) -> Iterator[Outcome]:
    """Attempt each slide and yield how it went; what a worker before this one settled is left out.

    A slide that another process works on is tried once more at the end, and then left to it.

    Raises:
        BackendError, OutputUnwritable: what would fail for every slide ends the run.
    """
    if len(run.models) > 1:
        for folder in run.job.folders:
            writable_folder(folder)
    held: list[SlideRequest] = []
    for last_chance, todo in ((False, requests), (True, held)):
        for number, request in enumerate(todo):
            if request.name in run.worker.settled:
                continue
            following = None if run.staging is None else _following(todo[number + 1 :], run)
            outcome = attempt(request, run, following)
            if not isinstance(outcome, Held):
                yield outcome
            elif last_chance:
                yield Outcome(request.path, "claimed", message=f"{outcome.by} works on it")
            else:
                held.append(request)


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
