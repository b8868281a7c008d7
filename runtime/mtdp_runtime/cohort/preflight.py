"""A slide as the user named it, opened; and its tissue mask, looked at before any work starts."""

from __future__ import annotations

from collections.abc import Sequence

from mtdp_runtime.cohort.requests import SlideRequest
from mtdp_runtime.cohort.watchdog import Worker
from mtdp_runtime.extraction.outcome import Outcome, log_line
from mtdp_runtime.slide import SlideInfo
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.tiling.given_mask import check_fits, load_mask


def check_masks(requests: Sequence[SlideRequest], worker: Worker | None = None) -> None:
    """Read every mask that is given, and look whether it can be its slide's, before any work starts.

    A slide that cannot be opened is left to its turn.

    Raises:
        UsageError: a mask cannot be read, or is another slide's.
    """
    for request in requests:
        if request.mask is None or (worker is not None and request.name in worker.settled):
            continue
        begin_look(request, worker)
        mask, info = load_mask(request.mask), _facts(request)
        if info is not None:
            check_fits(mask, info)
        if worker is not None:
            worker.end(request.name)


def begin_look(request: SlideRequest, worker: Worker | None) -> None:
    """Name a slide that is only looked at: nothing is claimed, and a later run may look again."""
    if worker is not None:
        worker.begin(request.name, log_line(Outcome(request.path, "failed")), "")


def _facts(request: SlideRequest) -> SlideInfo | None:
    try:
        with open_slide(request.path, request.mpp, request.given_by) as slide:
            return slide.info
    except Exception:  # whatever it is, it is said when the slide's turn comes
        return None
