"""What is looked at before any work starts: the tissue masks that the user gave."""

from __future__ import annotations

from collections.abc import Sequence

from mtdp_runtime.cohort.requests import SlideRequest
from mtdp_runtime.cohort.watchdog import UNWATCHED, Worker
from mtdp_runtime.extraction.outcome import Outcome, log_line
from mtdp_runtime.slide import SlideInfo
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.tiling.given_mask import check_fits, load_mask


def check_masks(requests: Sequence[SlideRequest], worker: Worker = UNWATCHED) -> None:
    """Read every mask that is given, and look whether it can be its slide's, before any work starts.

    A slide that cannot be opened is left to its turn.

    Raises:
        UsageError: a mask cannot be read, or is another slide's.
    """
    for request in requests:
        if request.mask is None or request.name in worker.settled:
            continue
        begin_look(request, worker)
        mask, info = load_mask(request.mask), _facts(request)
        if info is not None:
            check_fits(mask, info)
        worker.end(request.name)


def begin_look(request: SlideRequest, worker: Worker) -> None:
    """Name a slide that is only looked at: nothing is claimed, and a later run may look again."""
    worker.begin(request.name, log_line(Outcome(request.path, "failed")), "")


def _facts(request: SlideRequest) -> SlideInfo | None:
    try:
        with open_slide(request.path, request.mpp, request.given_by) as slide:
            return slide.info
    except Exception:  # whatever it is, it is said when the slide's turn comes
        return None
