"""What is looked at before any work starts: the names of the slides, and what the user gave with them."""

from __future__ import annotations

from mtdp_runtime.cohort.given_files import GivenRefused, fit_given, read_given
from mtdp_runtime.cohort.job import Job
from mtdp_runtime.cohort.refusals import why_refused
from mtdp_runtime.cohort.requests import SlideRequest
from mtdp_runtime.cohort.watchdog import UNWATCHED, Worker
from mtdp_runtime.errors import RuntimeFailure, SlideError
from mtdp_runtime.extraction.outcome import Outcome, log_line
from mtdp_runtime.slide import SlideInfo
from mtdp_runtime.slide.open import open_slide


def refused(job: Job, worker: Worker = UNWATCHED) -> list[RuntimeFailure]:
    """Return what keeps slides from being done, as far as it can be known now: their names, masks and tiles.

    Every mask and list of tiles that is given is read, and it is looked whether it can be its slide's. A slide that
    cannot be opened is left to its turn.
    """
    found = []
    for request in job.slides:
        if request.name in worker.settled:
            continue
        refusal = why_refused(request, job)
        if refusal is None and (request.mask or request.coords or request.classes):
            begin_look(request, worker)
            refusal = _given_refused(request, job)
            worker.end(request.name)
        if refusal is not None:
            found.append(refusal)
    return found


def _given_refused(request: SlideRequest, job: Job) -> RuntimeFailure | None:
    try:
        given, info = read_given(request), _facts(request)
        if info is not None:
            fit_given(given, info, job.bundles[0].manifest.tile_px, job.settings.mpp)
    except GivenRefused as refusal:
        return refusal
    except SlideError:  # its scale: that is said at its turn
        return None
    return None


def begin_look(request: SlideRequest, worker: Worker) -> None:
    """Name a slide that is only looked at: nothing is claimed, and a later run may look again."""
    worker.begin(request.name, log_line(Outcome(request.path, "failed")), "")


def _facts(request: SlideRequest) -> SlideInfo | None:
    try:
        with open_slide(request.path, request.mpp, request.given_by) as slide:
            return slide.info
    except Exception:  # whatever it is, it is said when the slide's turn comes
        return None
