"""Many slides, one after the other: a bad one is recorded and the others go on.

Several processes may work on one list and one folder: each slide is claimed first, and looked at (is it done?) after.
"""

from __future__ import annotations

import hashlib
import json
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mtdp_runtime import runlog
from mtdp_runtime.claims import Claim, Held, claim, seems_held
from mtdp_runtime.errors import BackendError, ClaimLost, RuntimeFailure, SlideError, StoreError, UsageError
from mtdp_runtime.estimate import read_seconds
from mtdp_runtime.extraction import ExtractSettings, Outcome, Plan, extract_targets, make_plan, writable_folder
from mtdp_runtime.formats import derive
from mtdp_runtime.mask import GivenMask, check_fits, load_mask
from mtdp_runtime.report import write_report
from mtdp_runtime.slide import SlideInfo
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.slide.watched import WatchedSlide
from mtdp_runtime.slides import SlideRequest
from mtdp_runtime.staging import StagedSlide, Staging
from mtdp_runtime.together import Model, Target, folders
from mtdp_runtime.watchdog import Worker


@dataclass(frozen=True, slots=True)
class Listeners:
    """What the caller wants to hear of a run."""

    on_plan: Callable[[Plan, int], None]  # with how many tiles an earlier run did
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
    run = _Run(out, tuple(places), settings, readers, listeners, overwrite, report, worker, tuple(formats), staging)
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
            mine = claim(out, request.name)
            if isinstance(mine, Held):
                if last_chance:
                    yield Outcome(request.path, "claimed", message=f"{mine.by} works on it")
                else:
                    held.append(request)
                continue
            with mine:
                if worker is not None:
                    line = as_json(Outcome(request.path, "failed", attempt=attempt))
                    worker.begin(request.name, line, str(mine.path))
                following = None if staging is None else _following(todo[number + 1 :], run, known)
                outcome = _extract(request, run, mine, following, attempt)
                line = as_json(outcome)
                runlog.append(out, line)
                if worker is not None:
                    worker.end(request.name, runlog.counts(line))
            yield outcome


@dataclass(frozen=True, slots=True)
class _Run:
    """What is the same for all slides."""

    out: Path
    places: tuple[tuple[Path, Model], ...]  # the folder of each model's files
    settings: ExtractSettings
    readers: int
    listeners: Listeners
    overwrite: bool
    report: bool
    worker: Worker | None
    formats: tuple[str, ...]
    staging: Staging | None = None


def _failed_before(
    request: SlideRequest, attempt: str, run: _Run, known: Mapping[str, dict[str, Any]]
) -> dict[str, Any] | None:
    """Return the line of an earlier run, where it failed and there is no file that could have come since."""
    return None if _all_there(request, run) else known.get(attempt)


def _following(rest: Sequence[SlideRequest], run: _Run, known: Mapping[str, dict[str, Any]]) -> SlideRequest | None:
    """Return the slide that will be worked on next, as far as that can be known."""
    for request in rest:
        settled = run.worker is not None and request.name in run.worker.settled
        done = not run.overwrite and _all_there(request, run)
        if settled or done or seems_held(run.out, request.name):
            continue
        if _failed_before(request, _attempt(request, run), run, known) is None:
            return request
    return None


def _extract(request: SlideRequest, run: _Run, mine: Claim, following: SlideRequest | None, attempt: str) -> Outcome:
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

    targets = [Target(folder / f"{request.name}.h5", model) for folder, model in run.places]
    local, stored = request.path, False
    try:
        if run.staging is not None:
            local = _stage(request, following, run, run.staging, beat)
        with _open(request, local, beat) as slide:
            mask = _mask_of(request, slide.info)
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
    except _MaskRefused as error:
        return failed(request, error)
    except (BackendError, UsageError):
        if mine.lost():
            return Outcome(request.path, "claimed", message=f"{request.path}: another process took it over")
        raise
    except (SlideError, StoreError) as error:
        outcome = failed(request, error)
        own = attempt if isinstance(error, SlideError) and not stored else ""
        return replace(outcome, message=outcome.message.replace(str(local), str(request.path)), attempt=own)
    except MemoryError as error:
        detail = str(error) or "the machine has no more"
        hint = "A smaller --batch needs less."
        return Outcome(request.path, "failed", message=f"{request.path}: out of memory: {detail}", hint=hint)
    except Exception as error:  # a damaged file finds ways that nobody thought of; it must not end the others
        return unforeseen(request, error, "" if stored else attempt)
    return outcome


def _open(request: SlideRequest, local: Path, beat: Callable[[], None]) -> WatchedSlide:
    """Open a slide, where it is or as its copy."""
    slide = open_slide(local, request.mpp, request.given_by)
    return WatchedSlide(StagedSlide(slide, local, request.path) if local != request.path else slide, beat, request.path)


def _stage(
    request: SlideRequest, following: SlideRequest | None, run: _Run, staging: Staging, beat: Callable[[], None]
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


def _all_there(request: SlideRequest, run: _Run) -> bool:
    return all((folder / f"{request.name}.h5").exists() for folder, _ in run.places)


def check_masks(requests: Sequence[SlideRequest], worker: Worker | None = None) -> None:
    """Read every mask that is given, and look whether it can be its slide's, before any work starts.

    A slide that cannot be opened is left to its turn.

    Raises:
        UsageError: a mask cannot be read, or is another slide's.
    """
    for request in requests:
        if request.mask is None or (worker is not None and request.name in worker.settled):
            continue
        _begin(request, worker)
        mask, info = load_mask(request.mask), _facts(request)
        if info is not None:
            check_fits(mask, info)
        if worker is not None:
            worker.end(request.name)


def _begin(request: SlideRequest, worker: Worker | None) -> None:
    """Name a slide that is only looked at: nothing is claimed, and a later run may look again."""
    if worker is not None:
        worker.begin(request.name, as_json(Outcome(request.path, "failed")), "")


def _facts(request: SlideRequest) -> SlideInfo | None:
    try:
        with open_slide(request.path, request.mpp, request.given_by) as slide:
            return slide.info
    except Exception:  # whatever it is, it is said when the slide's turn comes
        return None


class _MaskRefused(RuntimeFailure):
    """A mask is gone or another one since all were looked at: that fails its slide, and no other."""


def _mask_of(request: SlideRequest, info: SlideInfo) -> GivenMask | None:
    """Read the mask of a slide, where it has one.

    Raises:
        _MaskRefused: it cannot be read, or is another slide's.
    """
    if request.mask is None:
        return None
    try:
        mask = load_mask(request.mask)
        check_fits(mask, info)
    except UsageError as error:
        raise _MaskRefused(str(error), error.hint) from error
    return mask


def _attempt(request: SlideRequest, run: _Run) -> str:
    """Return 16 hex digits of what decides whether trying again can end otherwise."""
    mask = None if request.mask is None else [runlog.absolute(request.mask), _size_and_time(request.mask)]
    path = request.path
    facts = [runlog.absolute(path), _size_and_time(path), request.mpp, mask, asdict(run.settings)]
    for _, model in run.places:
        facts += [model.bundle.digest, model.backend.name, model.backend.precision, model.backend.batch]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _size_and_time(path: Path) -> list[int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def plan_slides(
    requests: Sequence[SlideRequest],
    tile_px: int,
    settings: ExtractSettings,
    cost: Callable[[Plan, float, int], dict[str, Any]],
    worker: Worker | None = None,
) -> Iterator[tuple[Outcome, Plan | None, dict[str, Any]]]:
    """Find the tissue and the tiles of each slide, and compute nothing.

    Yields the outcome, the plan, and what `cost` makes of the plan and of `read_seconds` (how long a tile takes, and
    over how many that was measured).
    """
    for request in requests:
        if worker is not None and request.name in worker.settled:
            continue
        _begin(request, worker)
        planned = _plan(request, tile_px, settings, cost, worker)
        if worker is not None:
            worker.end(request.name, runlog.counts(as_json(planned[0])) | planned[2])
        yield planned


def _plan(
    request: SlideRequest,
    tile_px: int,
    settings: ExtractSettings,
    cost: Callable[[Plan, float, int], dict[str, Any]],
    worker: Worker | None,
) -> tuple[Outcome, Plan | None, dict[str, Any]]:
    def beat() -> None:
        if worker is not None:
            worker.beat()

    try:
        with _open(request, request.path, beat) as slide:
            plan = make_plan(slide, tile_px, settings, _mask_of(request, slide.info))
            costs = cost(plan, *read_seconds(slide, plan))
    except (SlideError, _MaskRefused) as error:
        return failed(request, error), None, {}
    except RuntimeFailure:
        raise
    except Exception as error:  # see `_extract`
        return unforeseen(request, error), None, {}
    return Outcome(request.path, "planned", tiles=len(plan.kept), seconds=plan.seconds), plan, costs


def failed(request: SlideRequest, error: RuntimeFailure) -> Outcome:
    return Outcome(request.path, "failed", message=str(error), hint=error.hint)


def unforeseen(request: SlideRequest, error: Exception, attempt: str = "") -> Outcome:
    where = traceback.extract_tb(error.__traceback__)[-1]
    message = f"{request.path}: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    hint = "The file is damaged in a way that was not foreseen, or this is an error of mtdp: please report it."
    return Outcome(request.path, "failed", message=" ".join(message.split()), hint=hint, attempt=attempt)


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
    if outcome.left_out:
        line["left_out"] = outcome.left_out
    if outcome.reader:
        line |= {"reader": outcome.reader, "reader_reason": outcome.reader_reason}
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
    if outcome.warning:
        line["warning"] = outcome.warning
    if outcome.message:
        line |= {"message": outcome.message, "hint": outcome.hint}
    if outcome.attempt:
        line["attempt"] = outcome.attempt
    return line
