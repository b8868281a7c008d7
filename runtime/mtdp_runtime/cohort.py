"""Many slides, one after the other: a bad one is recorded and the others go on.

Several processes may work on one list and one folder: each slide is claimed first, and looked at (is it done?) after.
"""

from __future__ import annotations

import hashlib
import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mtdp_runtime import runlog
from mtdp_runtime.check import Check
from mtdp_runtime.claims import Claim, Held, claim
from mtdp_runtime.errors import BackendError, ClaimLost, RuntimeFailure, SlideError, StoreError, UsageError
from mtdp_runtime.estimate import read_seconds
from mtdp_runtime.extraction import ExtractSettings, Outcome, Plan, extract_targets, make_plan, writable_folder
from mtdp_runtime.formats import derive
from mtdp_runtime.mask import GivenMask, check_fits, load_mask
from mtdp_runtime.report import write_report
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.slide.watched import WatchedSlide
from mtdp_runtime.slides import SlideRequest
from mtdp_runtime.staging import Staging
from mtdp_runtime.together import Model, Target, folders
from mtdp_runtime.watchdog import Worker


@dataclass(frozen=True, slots=True)
class Listeners:
    """What the caller wants to hear of a run."""

    on_plan: Callable[[Plan], None]
    on_progress: Callable[[int], None]


def extract_slides(
    requests: Sequence[SlideRequest],
    out: Path,
    models: Sequence[Model],
    settings: ExtractSettings,
    readers: int,
    listeners: Listeners,
    overwrite: bool = False,
    report: bool = True,
    retry_failed: bool = False,
    worker: Worker | None = None,
    formats: Sequence[str] = (),
    check: Check | None = None,
    staging: Staging | None = None,
) -> Iterator[Outcome]:
    """Extract each slide and yield how it went; out/run.jsonl gets a line for each that was tried.

    Several models must have one tile size; each tile is read once, and the files go to out/<model name>.

    A slide that another process works on is tried once more at the end, and then left to it. A slide that failed
    before, as it is and with the same settings, is not tried again, unless `retry_failed` or `overwrite`.

    Raises:
        BackendError, OutputUnwritable: what would fail for every slide ends the run.
    """
    places = list(zip(folders([model.bundle for model in models], out), models, strict=True))
    if len(places) > 1:
        for folder, _ in places:
            writable_folder(folder)
    known = {} if retry_failed or overwrite else runlog.failures(out)
    run = _Run(tuple(places), settings, readers, listeners, overwrite, report, worker, tuple(formats), check, staging)
    held: list[SlideRequest] = []
    for last_chance, todo in ((False, requests), (True, held)):
        for number, request in enumerate(todo):
            if worker is not None and str(request.path) in worker.settled:
                continue
            attempt = _attempt(request, run)
            before = known.get((str(request.path), attempt))
            if before is not None:
                message = f"{before.get('message', '')} (an earlier run found this; --retry-failed tries it again)"
                yield Outcome(request.path, "failed", message=message, hint=str(before.get("hint", "")))
                continue
            mine = claim(out, request.name)
            if isinstance(mine, Held):
                if last_chance:
                    yield Outcome(request.path, "claimed", message=f"{mine.by} works on it")
                else:
                    held.append(request)
                continue
            with mine:
                if worker is not None:
                    worker.begin(
                        str(request.path), as_json(Outcome(request.path, "failed", attempt=attempt)), str(mine.path)
                    )
                outcome = _extract(request, run, mine, next(iter(todo[number + 1 :]), None))
                if outcome.status == "failed":
                    outcome = replace(outcome, attempt=attempt)
                runlog.append(out, as_json(outcome))
                if worker is not None:
                    worker.end(str(request.path), outcome.status)
            yield outcome


@dataclass(frozen=True, slots=True)
class _Run:
    """What is the same for all slides."""

    places: tuple[tuple[Path, Model], ...]  # the folder of each model's files
    settings: ExtractSettings
    readers: int
    listeners: Listeners
    overwrite: bool
    report: bool
    worker: Worker | None
    formats: tuple[str, ...]
    check: Check | None = None
    staging: Staging | None = None


def _extract(request: SlideRequest, run: _Run, mine: Claim, following: SlideRequest | None) -> Outcome:
    def beat() -> None:
        if run.worker is not None:
            run.worker.beat()

    def on_progress(tiles: int) -> None:
        beat()
        run.listeners.on_progress(tiles)

    def before_finish() -> None:
        if mine.lost():
            raise ClaimLost(f"{request.path}: another process took it over")

    targets = [Target(folder / f"{request.name}.h5", model) for folder, model in run.places]
    local = request.path
    try:
        if run.staging is not None:
            local = _stage(request, following, run, run.staging, beat)
        mask = _mask(request)
        with WatchedSlide(open_slide(local, request.mpp, request.given_by), beat, request.path) as slide:
            outcome, plan = extract_targets(
                slide,
                targets,
                run.settings,
                run.readers,
                run.overwrite,
                run.listeners.on_plan,
                on_progress,
                before_finish,
                mask,
                run.check,
            )
            for target in targets:
                folder = target.path.parent
                derive(target.path, folder, run.formats)
                if run.report and plan is not None:
                    write_report(folder / "report" / f"{request.name}.html", target.path, plan, outcome)
    except ClaimLost as error:
        return Outcome(request.path, "claimed", message=str(error))
    except (BackendError, UsageError):
        if mine.lost():
            return Outcome(request.path, "claimed", message=f"{request.path}: another process took it over")
        raise
    except (SlideError, StoreError) as error:
        outcome = failed(request, error)
        return replace(outcome, message=outcome.message.replace(str(local), str(request.path)))
    except MemoryError as error:
        detail = str(error) or "the machine has no more"
        hint = "A smaller --batch needs less."
        return Outcome(request.path, "failed", message=f"{request.path}: out of memory: {detail}", hint=hint)
    except Exception as error:  # a damaged file finds ways that nobody thought of; it must not end the others
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{request.path}: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        hint = "The file is damaged in a way that was not foreseen, or this is an error of mtdp: please report it."
        return Outcome(request.path, "failed", message=" ".join(message.split()), hint=hint)
    return outcome


def _stage(
    request: SlideRequest, following: SlideRequest | None, run: _Run, staging: Staging, beat: Callable[[], None]
) -> Path:
    """Return where to read a slide from, and let the next one be copied meanwhile; the others' copies are removed."""
    wanted = [one for one in (request, following) if one is not None and (run.overwrite or not _all_there(one, run))]
    staging.keep_only({one.path for one in wanted})
    if request not in wanted:  # it is done: only its facts are compared
        local = request.path
    else:
        staging.begin(request.path)
        local = staging.wait(request.path, beat)
    if following in wanted and following is not None:
        staging.begin(following.path)
    return local


def _all_there(request: SlideRequest, run: _Run) -> bool:
    return all((folder / f"{request.name}.h5").exists() for folder, _ in run.places)


def check_masks(requests: Sequence[SlideRequest]) -> None:
    """Read every mask that is given, and look whether it can be its slide's, before any work starts.

    A slide that cannot be opened is left to its turn.

    Raises:
        UsageError: a mask cannot be read, or is another slide's.
    """
    for request in requests:
        mask = _mask(request)
        if mask is None:
            continue
        try:
            with open_slide(request.path, request.mpp, request.given_by) as slide:
                check_fits(mask, slide.info)
        except SlideError:
            continue


def _mask(request: SlideRequest) -> GivenMask | None:
    return None if request.mask is None else load_mask(request.mask)


def _attempt(request: SlideRequest, run: _Run) -> str:
    """Return 16 hex digits of what decides whether trying again can end otherwise."""
    try:
        stat = request.path.stat()
        file: list[int] | None = [stat.st_size, stat.st_mtime_ns]
    except OSError:
        file = None
    facts = [str(request.path), file, request.mpp, str(request.mask), asdict(run.settings)]
    for _, model in run.places:
        facts += [model.bundle.digest, model.backend.name, model.backend.precision, model.backend.batch]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def plan_slides(
    requests: Sequence[SlideRequest], tile_px: int, settings: ExtractSettings
) -> Iterator[tuple[Outcome, Plan | None, float, int]]:
    """Find the tissue and the tiles of each slide, and compute nothing.

    Yields the outcome, the plan, and of `read_seconds` how long a tile takes and over how many that was measured.
    """
    for request in requests:
        try:
            with open_slide(request.path, request.mpp, request.given_by) as slide:
                plan = make_plan(slide, tile_px, settings, _mask(request))
                read_s, measured = read_seconds(slide, plan)
            yield Outcome(request.path, "planned", tiles=len(plan.kept), seconds=plan.seconds), plan, read_s, measured
        except SlideError as error:
            yield failed(request, error), None, 0.0, 0


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
    if len(outcome.outputs) > 1:
        line["outputs"] = [str(path) for path in outcome.outputs]
    if outcome.times is not None:
        line |= {
            "tiles_per_s": round(outcome.times.tiles_per_s, 1),
            "bottleneck": outcome.times.bottleneck,
            "device_idle": round(outcome.times.device_idle, 3),
        }
    if outcome.agreement is not None:
        line["check"] = asdict(outcome.agreement)
    if outcome.message:
        line |= {"message": outcome.message, "hint": outcome.hint}
    if outcome.attempt:
        line["attempt"] = outcome.attempt
    return line
