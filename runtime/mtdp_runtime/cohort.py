"""Many slides, one after the other: a bad one is recorded and the others go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mtdp_runtime.backends import Backend
from mtdp_runtime.bundle import Bundle
from mtdp_runtime.errors import OutputUnwritable, RuntimeFailure, SlideError, StoreError
from mtdp_runtime.extract import ExtractSettings, Outcome, Plan, extract_slide, make_plan
from mtdp_runtime.report import write_report
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.slides import SlideRequest


@dataclass(frozen=True, slots=True)
class Listeners:
    """What the caller wants to hear of a run."""

    on_plan: Callable[[Plan], None]
    on_progress: Callable[[int], None]


def extract_slides(
    requests: Sequence[SlideRequest],
    out: Path,
    bundle: Bundle,
    backend: Backend,
    settings: ExtractSettings,
    readers: int,
    listeners: Listeners,
    overwrite: bool = False,
    report: bool = True,
) -> Iterator[Outcome]:
    """Extract each slide and yield how it went; out/run.jsonl gets a line each.

    Raises:
        BackendError, OutputUnwritable: what would fail for every slide ends the run.
    """
    with (out / "run.jsonl").open("a", encoding="utf-8") as log:
        for request in requests:
            try:
                with open_slide(request.path, request.mpp, request.given_by) as slide:
                    path = out / f"{request.name}.h5"
                    outcome, plan = extract_slide(
                        slide,
                        path,
                        bundle,
                        backend,
                        settings,
                        readers,
                        overwrite,
                        listeners.on_plan,
                        listeners.on_progress,
                    )
                    if report and plan is not None:
                        write_report(out / "report" / f"{request.name}.html", path, plan, outcome)
            except OutputUnwritable:
                raise
            except (SlideError, StoreError) as error:
                outcome = failed(request, error)
            _record(log, outcome)
            yield outcome


def plan_slides(
    requests: Sequence[SlideRequest], tile_px: int, settings: ExtractSettings
) -> Iterator[tuple[Outcome, Plan | None]]:
    """Find the tissue and the tiles of each slide, and compute nothing."""
    for request in requests:
        try:
            with open_slide(request.path, request.mpp, request.given_by) as slide:
                plan = make_plan(slide, tile_px, settings)
            yield Outcome(request.path, "planned", tiles=len(plan.kept), seconds=plan.seconds), plan
        except SlideError as error:
            yield failed(request, error), None


def failed(request: SlideRequest, error: RuntimeFailure) -> Outcome:
    return Outcome(request.path, "failed", message=str(error), hint=error.hint)


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Return a line of run.jsonl."""
    line: dict[str, Any] = {
        "slide": str(outcome.slide),
        "status": outcome.status,
        "output": str(outcome.output) if outcome.output else None,
        "tiles": outcome.tiles,
        "bad_tiles": outcome.bad_tiles,
        "seconds": round(outcome.seconds, 3),
    }
    if outcome.times is not None:
        line |= {
            "tiles_per_s": round(outcome.times.tiles_per_s, 1),
            "bottleneck": outcome.times.bottleneck,
            "device_idle": round(outcome.times.device_idle, 3),
        }
    if outcome.message:
        line |= {"message": outcome.message, "hint": outcome.hint}
    return line


def _record(log: IO[str], outcome: Outcome) -> None:
    log.write(json.dumps(as_json(outcome), ensure_ascii=False) + "\n")
    log.flush()
