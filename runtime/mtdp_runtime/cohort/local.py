"""Many slides, one after the other: a bad one is recorded and the others go on.

Several processes may work on one list and one folder: each slide is claimed first, and looked at (is it done?) after.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mtdp_runtime.cohort.claims import Claim, Held, claim, seems_held
from mtdp_runtime.cohort.requests import MaskRefused, SlideRequest, mask_of, open_requested
from mtdp_runtime.cohort.staging import Staging
from mtdp_runtime.cohort.watchdog import Worker
from mtdp_runtime.errors import BackendError, ClaimLost, SlideError, StoreError, UsageError
from mtdp_runtime.extraction.extract import extract_targets
from mtdp_runtime.extraction.models import Model, Target, folders
from mtdp_runtime.extraction.outcome import Outcome, failed, log_line, unforeseen
from mtdp_runtime.files import writable_folder
from mtdp_runtime.formats import derive
from mtdp_runtime.report.slide import write_report
from mtdp_runtime.settings import ExtractSettings
from mtdp_runtime.store import run_log
from mtdp_runtime.tiling.plan import Plan


@dataclass(frozen=True, slots=True)
class Listeners:
    """What the caller wants to hear of a run."""

    on_plan: Callable[[Plan, int], None]  # with how many tiles an earlier run did
    on_progress: Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Run:
    """What is the same for all slides of a run."""

    out: Path
    models: Sequence[Model]  # of one tile size: each tile is read once for all
    settings: ExtractSettings
    readers: int  # threads
    listeners: Listeners
    overwrite: bool = False  # replace what differs or is incomplete
    report: bool = True
    retry_failed: bool = False
    worker: Worker | None = None
    formats: Sequence[str] = ()  # to derive from each file
    staging: Staging | None = None


def extract_slides(requests: Sequence[SlideRequest], run: Run) -> Iterator[Outcome]:
    """Extract each slide and yield how it went; run.jsonl gets a line for each that was tried.

    A slide that another process works on is tried once more at the end, and then left to it. A slide that failed
    before, as it is and with the same settings, is not tried again, unless `retry_failed` or `overwrite`.

    Raises:
        BackendError, OutputUnwritable: what would fail for every slide ends the run.
    """
    if len(run.models) > 1:
        for folder in _folders(run):
            writable_folder(folder)
    known = {} if run.retry_failed or run.overwrite else run_log.failures(run.out)
    worker = run.worker
    held: list[SlideRequest] = []
    for last_chance, todo in ((False, requests), (True, held)):
        for number, request in enumerate(todo):
            if worker is not None and request.name in worker.settled:
                continue
            attempt = _attempt(request, run)
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
                outcome = _extract(request, run, mine, following, attempt)
                line = log_line(outcome)
                run_log.append(run.out, line)
                if worker is not None:
                    worker.end(request.name, run_log.counts(line))
            yield outcome


def _failed_before(
    request: SlideRequest, attempt: str, run: Run, known: Mapping[str, dict[str, Any]]
) -> dict[str, Any] | None:
    """Return the line of an earlier run, where it failed and there is no file that could have come since."""
    return None if _all_there(request, run) else known.get(attempt)


def _following(rest: Sequence[SlideRequest], run: Run, known: Mapping[str, dict[str, Any]]) -> SlideRequest | None:
    """Return the slide that will be worked on next, as far as that can be known."""
    for request in rest:
        settled = run.worker is not None and request.name in run.worker.settled
        done = not run.overwrite and _all_there(request, run)
        if settled or done or seems_held(run.out, request.name):
            continue
        if _failed_before(request, _attempt(request, run), run, known) is None:
            return request
    return None


def _extract(request: SlideRequest, run: Run, mine: Claim, following: SlideRequest | None, attempt: str) -> Outcome:
    """Extract a slide. Only what is the slide's own fault is an `attempt` that a later run need not repeat."""

    def beat() -> None:
        if run.worker is not None:
            run.worker.beat()

    def on_progress(tiles: int) -> None:
        beat()
        run.listeners.on_progress(tiles)

    def before_finish() -> None:
        if mine.lost():
            raise ClaimLost(f"{request.path}: another process took it over")

    targets = _targets(request, run)
    local, stored = request.path, False
    try:
        if run.staging is not None:
            local = _stage(request, following, run, run.staging, beat)
        with open_requested(request, local, beat) as slide:
            mask = mask_of(request, slide.info)
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
            )
            stored = True
            for target in targets:
                folder = target.path.parent
                derive(target.path, folder, run.formats)
                if run.report and plan is not None:
                    write_report(folder / "report" / f"{request.name}.html", target.path, plan, outcome)
    except ClaimLost as error:
        return Outcome(request.path, "claimed", message=str(error))
    except MaskRefused as error:
        return failed(request.path, error)
    except (BackendError, UsageError):
        if mine.lost():
            return Outcome(request.path, "claimed", message=f"{request.path}: another process took it over")
        raise
    except (SlideError, StoreError) as error:
        outcome = failed(request.path, error)
        own = attempt if isinstance(error, SlideError) and not stored else ""
        return replace(outcome, message=outcome.message.replace(str(local), str(request.path)), attempt=own)
    except MemoryError as error:
        detail = str(error) or "the machine has no more"
        hint = "A smaller --batch needs less."
        return Outcome(request.path, "failed", message=f"{request.path}: out of memory: {detail}", hint=hint)
    except Exception as error:  # a damaged file finds ways that nobody thought of; it must not end the others
        return unforeseen(request.path, error, "" if stored else attempt)
    return outcome


def _stage(
    request: SlideRequest, following: SlideRequest | None, run: Run, staging: Staging, beat: Callable[[], None]
) -> Path:
    """Return where to read a slide from, and let the next one be copied meanwhile; the others' copies are removed."""
    is_done = not run.overwrite and _all_there(request, run)  # then only its facts are compared
    wanted = {one.path for one in (None if is_done else request, following) if one is not None}
    staging.keep_only(wanted)
    local = request.path
    if not is_done:
        staging.begin(request.path)
        local = staging.wait(request.path, beat)
    if following is not None:
        staging.begin(following.path)
    return local


def _folders(run: Run) -> list[Path]:
    return folders([model.bundle for model in run.models], run.out)


def _targets(request: SlideRequest, run: Run) -> list[Target]:
    places = zip(_folders(run), run.models, strict=True)
    return [Target(folder / f"{request.name}.h5", model) for folder, model in places]


def _all_there(request: SlideRequest, run: Run) -> bool:
    return all(target.path.exists() for target in _targets(request, run))


def _attempt(request: SlideRequest, run: Run) -> str:
    """Return 16 hex digits of what decides whether trying again can end otherwise."""
    mask = None if request.mask is None else [run_log.absolute(request.mask), _size_and_time(request.mask)]
    path = request.path
    facts = [run_log.absolute(path), _size_and_time(path), request.mpp, mask, asdict(run.settings)]
    for model in run.models:
        facts += [model.bundle.digest, model.backend.name, model.backend.precision, model.backend.batch]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _size_and_time(path: Path) -> list[int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]
