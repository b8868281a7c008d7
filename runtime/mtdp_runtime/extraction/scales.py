"""One slide at several scales: it is opened, and its tissue found, once; each scale has a grid and files of its own.

So the file of a scale is what a run of that scale alone would have written, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mtdp_runtime.errors import SlideTooCoarse
from mtdp_runtime.extraction.extract import SILENT, Listeners, extract_slide
from mtdp_runtime.extraction.models import Target
from mtdp_runtime.extraction.outcome import Outcome, Status
from mtdp_runtime.pipeline.timing import joined
from mtdp_runtime.settings import ExtractSettings
from mtdp_runtime.slide import Slide
from mtdp_runtime.tiling.given import NOTHING, Given
from mtdp_runtime.tiling.plan import Plan


@dataclass(frozen=True, slots=True)
class AtScale:
    """A scale of a slide: what decides its numbers, and the file of each model."""

    settings: ExtractSettings
    targets: Sequence[Target]


Computed = tuple[AtScale, Plan | None]


def extract_at_scales(
    slide: Slide,
    scales: Sequence[AtScale],
    *,
    readers: int,
    overwrite: bool = False,
    given: Given = NOTHING,
    listeners: Listeners = SILENT,
    finish: Callable[[AtScale, Plan | None], None] = lambda scale, plan: None,
) -> Outcome:
    """Do what `extract_slide` does for each scale, and `finish` each once all of them are stored.

    A scale that is finer than the slide keeps none of the others from being done, and fails the slide after them.

    Raises:
        SlideTooCoarse: a scale is finer than the slide.
        SlideError, BackendError, StoreError, OutputUnwritable: as `extract_slide`; scales before are kept.
    """
    found: list[tuple[AtScale, Outcome, Plan | None]] = []
    refusal: SlideTooCoarse | None = None
    tissue = None
    for scale in scales:
        try:
            outcome, plan = extract_slide(
                slide,
                scale.targets,
                scale.settings,
                readers=readers,
                overwrite=overwrite,
                given=given,
                listeners=listeners,
                tissue=tissue,
            )
        except SlideTooCoarse as error:
            refusal = refusal or error
            continue
        tissue = plan.tissue if plan is not None else tissue
        found.append((scale, outcome, plan))
    for scale, _, plan in found:
        finish(scale, plan)
    if refusal is not None:
        raise refusal
    return _of_all([(scale.settings.mpp, outcome) for scale, outcome, _ in found])


def _of_all(found: Sequence[tuple[float, Outcome]]) -> Outcome:
    """Return how a slide went at all of its scales: numbers add up, what is said names its scale."""
    outcomes = [outcome for _, outcome in found]
    first = outcomes[0]
    if len(outcomes) == 1:
        return first
    statuses: list[Status] = [outcome.status for outcome in outcomes]
    status: Status = next((one for one in ("done", "no-tissue") if one in statuses), "skipped")
    times = [outcome.times for outcome in outcomes if outcome.times is not None]
    agreements = [outcome.agreement for outcome in outcomes if outcome.agreement is not None]
    said = [(f"{mpp:g} µm/px: ", outcome) for mpp, outcome in found]
    differs = len(set(statuses)) > 1  # then a scale without a tile is worth a look, though the slide is done
    warnings = [
        f"{where}{text}"
        for where, outcome in said
        for text in (outcome.warning, outcome.message if differs and outcome.status == "no-tissue" else "")
        if text
    ]
    message = "; ".join(f"{where}{outcome.message}" for where, outcome in said if outcome.message)
    return replace(
        first,
        status=status,
        outputs=tuple(path for outcome in outcomes for path in outcome.outputs),
        tiles=sum(outcome.tiles for outcome in outcomes),
        bad_tiles=sum(outcome.bad_tiles for outcome in outcomes),
        left_out=sum(outcome.left_out for outcome in outcomes),
        tiles_before=sum(outcome.tiles_before for outcome in outcomes),
        seconds=sum(outcome.seconds for outcome in outcomes),
        times=joined(times) if times else None,
        message="already done" if status == "skipped" else "" if status == "done" else message,
        agreement=min(agreements, key=lambda one: one.min_cosine, default=None),
        warning="; ".join(warnings),
    )
