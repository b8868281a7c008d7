"""One slide of a run: staged, opened, extracted, and what became of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mtdp_runtime.cohort.claims import Claim
from mtdp_runtime.cohort.requests import MaskRefused, SlideRequest, mask_of, open_requested
from mtdp_runtime.cohort.staging import Staging
from mtdp_runtime.cohort.watchdog import Worker
from mtdp_runtime.errors import BackendError, ClaimLost, SlideError, StoreError, UsageError
from mtdp_runtime.extraction.extract import extract_targets
from mtdp_runtime.extraction.models import Model, Target, folders
from mtdp_runtime.extraction.outcome import Outcome, failed, unforeseen
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


def extract_request(
    request: SlideRequest, run: Run, mine: Claim, following: SlideRequest | None, attempt: str
) -> Outcome:
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
    is_done = not run.overwrite and all_there(request, run)  # then only its facts are compared
    wanted = {one.path for one in (None if is_done else request, following) if one is not None}
    staging.keep_only(wanted)
    local = request.path
    if not is_done:
        staging.begin(request.path)
        local = staging.wait(request.path, beat)
    if following is not None:
        staging.begin(following.path)
    return local


def run_folders(run: Run) -> list[Path]:
    return folders([model.bundle for model in run.models], run.out)


def _targets(request: SlideRequest, run: Run) -> list[Target]:
    places = zip(run_folders(run), run.models, strict=True)
    return [Target(folder / f"{request.name}.h5", model) for folder, model in places]


def all_there(request: SlideRequest, run: Run) -> bool:
    return all(target.path.exists() for target in _targets(request, run))


def attempt_key(request: SlideRequest, run: Run) -> str:
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
