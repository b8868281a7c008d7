"""Many slides in this process, one after the other: a bad one is recorded and the others go on.

Several processes may work on one list and one folder: each slide is claimed first, and looked at (is it done?) after.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mtdp_runtime.cohort.attempt import Run, all_there, attempt_key, extract_request, run_folders
from mtdp_runtime.cohort.claims import Held, claim, seems_held
from mtdp_runtime.cohort.requests import SlideRequest
from mtdp_runtime.extraction.outcome import Outcome, log_line
from mtdp_runtime.files import writable_folder
from mtdp_runtime.store import run_log


def extract_slides(requests: Sequence[SlideRequest], run: Run) -> Iterator[Outcome]:
    """Extract each slide and yield how it went; run.jsonl gets a line for each that was tried.

    A slide that another process works on is tried once more at the end, and then left to it. A slide that failed
    before, as it is and with the same settings, is not tried again, unless `retry_failed` or `overwrite`.

    Raises:
        BackendError, OutputUnwritable: what would fail for every slide ends the run.
    """
    if len(run.models) > 1:
        for folder in run_folders(run):
            writable_folder(folder)
    known = {} if run.retry_failed or run.overwrite else run_log.failures(run.out)
    worker = run.worker
    held: list[SlideRequest] = []
    for last_chance, todo in ((False, requests), (True, held)):
        for number, request in enumerate(todo):
            if worker is not None and request.name in worker.settled:
                continue
            attempt = attempt_key(request, run)
            before = _failed_before(request, attempt, run, known)
            if before is not None:
                message = f"{before.get('message', '')} (an earlier run found this; --retry-failed tries it again)"
                yield Outcome(request.path, "failed", message=message, hint=str(before.get("hint", "")))
                continue
            mine = claim(run.out, request.name)
            if isinstance(mine, Held):
                if last_chance:
                    yield Outcome(request.path, "claimed", message=f"{mine.by} works on it")
                else:
                    held.append(request)
                continue
            with mine:
                if worker is not None:
                    line = log_line(Outcome(request.path, "failed", attempt=attempt))
                    worker.begin(request.name, line, str(mine.path))
                following = None if run.staging is None else _following(todo[number + 1 :], run, known)
                outcome = extract_request(request, run, mine, following, attempt)
                line = log_line(outcome)
                run_log.append(run.out, line)
                if worker is not None:
                    worker.end(request.name, run_log.counts(line))
            yield outcome


def _failed_before(
    request: SlideRequest, attempt: str, run: Run, known: Mapping[str, dict[str, Any]]
) -> dict[str, Any] | None:
    """Return the line of an earlier run, where it failed and there is no file that could have come since."""
    return None if all_there(request, run) else known.get(attempt)


def _following(rest: Sequence[SlideRequest], run: Run, known: Mapping[str, dict[str, Any]]) -> SlideRequest | None:
    """Return the slide that will be worked on next, as far as that can be known."""
    for request in rest:
        settled = run.worker is not None and request.name in run.worker.settled
        done = not run.overwrite and all_there(request, run)
        if settled or done or seems_held(run.out, request.name):
            continue
        if _failed_before(request, attempt_key(request, run), run, known) is None:
            return request
    return None
