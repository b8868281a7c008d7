"""One slide of a run, from its claim to its line in run.jsonl."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mtdp_runtime.cohort.blame import Evidence, in_words, is_of_one_slide
from mtdp_runtime.cohort.claims import Claim, Held, claim
from mtdp_runtime.cohort.given_files import GivenRefused, given_of
from mtdp_runtime.cohort.refusals import why_refused
from mtdp_runtime.cohort.requests import SlideRequest, open_requested
from mtdp_runtime.cohort.servers import TransferFailed
from mtdp_runtime.cohort.staging import Staging
from mtdp_runtime.cohort.under_way import Run, all_there, attempt_key, failed_before, scales_of, targets_of, who_knows
from mtdp_runtime.cohort.uploads import Uploads
from mtdp_runtime.errors import (
    BackendError,
    ClaimLost,
    ListenerFailed,
    OutputUnwritable,
    RuntimeFailure,
    SlideError,
    SlideTooCoarse,
    StoreError,
    UsageError,
)
from mtdp_runtime.extraction.extract import Listeners
from mtdp_runtime.extraction.models import Target
from mtdp_runtime.extraction.outcome import Outcome, failed, log_line, unforeseen
from mtdp_runtime.extraction.scales import AtScale, extract_at_scales
from mtdp_runtime.formats import derive, without_file
from mtdp_runtime.report.overview import Thumbnail
from mtdp_runtime.report.places import slide_report
from mtdp_runtime.report.slide import report_is_current, write_report
from mtdp_runtime.slide import Slide
from mtdp_runtime.slide.identity import hint_of
from mtdp_runtime.store import run_log
from mtdp_runtime.store.causes import FOUND_EARLIER
from mtdp_runtime.store.writer import remove_leftovers
from mtdp_runtime.tiling.given import Given
from mtdp_runtime.tiling.plan import Plan, make_plan
from mtdp_runtime.urls import SlideUrl


def attempt(request: SlideRequest, run: Run, following: SlideRequest | None = None) -> Outcome | Held:
    """Do all that a run does for one slide: the unit that any scheduler schedules.

    It is claimed, staged, extracted and recorded in run.jsonl, unless another process has it, or it failed before, as
    it is and with the same settings.

    Args:
        request: the slide.
        run: what it shares with the others.
        following: the slide that comes after it here; it is staged meanwhile.

    Returns:
        How it went; or who has it: then nothing was done.

    Raises:
        BackendError, OutputUnwritable: what would fail for every slide.
    """
    before = failed_before(request, run)
    if before is not None:
        message = f"{before.get('message', '')}{FOUND_EARLIER}"
        return Outcome(request.path, "failed", message=message, hint=str(before.get("hint", "")))
    begun_s = time.perf_counter()
    refusal: RuntimeFailure | None
    mine: Claim | Held | None
    try:
        refusal = why_refused(request, run.job)
        mine = claim(run.job.out, request.name) if refusal is None else None
    except OutputUnwritable as error:
        if not is_of_one_slide(error, [run.job.out]):
            raise
        refusal, mine = error, None
    if mine is None:
        assert refusal is not None
        outcome = replace(failed(request.path, refusal), name=request.name)
        run.mark.append(run.job.out, log_line(outcome))
        return outcome
    if isinstance(mine, Held):
        return mine
    with mine:
        key = attempt_key(request, run)
        run.listeners.on_slide(request.path)
        run.worker.begin(request.name, log_line(_begun(request, key)), str(mine.path))
        outcome = replace(_extract(request, run, mine, following, key), name=request.name)
        line = log_line(outcome)
        run.mark.append(run.job.out, line | {"attempt_s": round(time.perf_counter() - begun_s, 3)})
        run.worker.end(request.name, run_log.counts(line))
    return outcome


def _begun(request: SlideRequest, key: str) -> Outcome:
    """Return how a slide went, should this process die at it; who ends it says why."""
    return Outcome(request.path, "failed", attempt=key, name=request.name)


@dataclass(slots=True)
class _Try:
    """One opening of a slide."""

    read_from: Path
    in_place: bool = False  # though it is staged: a copy may be bad
    stored: bool = False  # its feature files are complete: what fails now is what is made of them


def _extract(request: SlideRequest, run: Run, mine: Claim, following: SlideRequest | None, key: str) -> Outcome:
    """Extract a slide. Only what is the slide's own fault gets the `key`: a later run need not try it again."""
    taken = Outcome(request.path, "claimed", message=f"{request.path}: another process took it over")
    evidence, this = Evidence(request.path), _Try(request.path)
    while True:
        try:
            return _extract_once(request, run, mine, following, this)
        except ClaimLost:
            return taken
        except GivenRefused as error:
            return failed(request.path, error)
        except ListenerFailed:
            raise
        except TransferFailed as error:
            if run.uploads is not None and error.refused is not None:
                run.uploads.look_again(error.refused)
            return failed(request.path, error)
        except (BackendError, UsageError) as error:
            if mine.lost():
                return taken
            if not is_of_one_slide(error, run.job.folders):
                raise
            return failed(request.path, error)
        except StoreError as error:
            return failed(request.path, error)
        except Exception as error:  # a damaged file finds ways that nobody thought of; it must not end the others
            if isinstance(request.path, SlideUrl):
                evidence.path = this.read_from
            if not this.stored and evidence.try_again(error, run.worker.beat):
                this = _again(request, run)
                continue
            return _failure(request, error, evidence, this, key)


def _again(request: SlideRequest, run: Run) -> _Try:
    """Return the next opening: in place, for a copy may be bad; what cannot be read in place is fetched again."""
    fetched = isinstance(request.path, SlideUrl)
    if fetched and run.staging is not None:
        run.staging.remove(request.path)
    return _Try(request.path, in_place=not fetched)


def _failure(request: SlideRequest, error: Exception, evidence: Evidence, this: _Try, key: str) -> Outcome:
    own = key if not this.stored and evidence.is_the_slides() else ""
    if isinstance(error, MemoryError):
        detail = str(error) or "the machine has no more"
        hint = "A smaller --batch needs less."
        return Outcome(request.path, "failed", message=f"{request.path}: out of memory: {detail}", hint=hint)
    outcome = (
        failed(request.path, error, own) if isinstance(error, SlideError) else unforeseen(request.path, error, own)
    )
    if evidence.fault is not None and not this.stored:
        message, hint = in_words(outcome.message, outcome.hint, evidence.fault)
        outcome = replace(outcome, message=message, hint=hint)
    return replace(outcome, message=outcome.message.replace(str(this.read_from), str(request.path)))


def _extract_once(request: SlideRequest, run: Run, mine: Claim, following: SlideRequest | None, this: _Try) -> Outcome:
    stated = ""
    if run.staging is not None and not this.in_place:
        run.listeners.on_phase("copying to the local disk")
        staged, stated = _stage(request, following, run, run.staging)
        if staged is None:
            return _as_it_stands(request, run, stated)
        this.read_from = staged
    elif run.uploads is not None:
        stated, is_done = hint_of(request.path), who_knows(request, run)
        if is_done is not None and is_done(stated):
            return _as_it_stands(request, run, stated)
    targets = targets_of(request, run, stated)
    if run.uploads is not None:
        run.uploads.bring_back(targets)
    with open_requested(request, this.read_from, run.worker.beat) as slide:
        given = given_of(request, slide.info, run.models[0].bundle.manifest.tile_px, run.job.settings.mpp)

        def finish(scale: AtScale, plan: Plan | None) -> None:
            this.stored = True
            _derive(run, scale.targets)
            _report(request, run, slide, given, scale, plan)
            this.stored = False  # what comes after is of a scale that the slide does not have

        try:
            outcome = extract_at_scales(
                slide,
                scales_of(request, run, stated),
                readers=run.job.threads_each,
                overwrite=run.job.overwrite,
                given=given,
                listeners=_listeners(request, run, mine),
                finish=finish,
            )
        except SlideTooCoarse:
            made = [target for target in targets if target.path.exists()]
            if run.uploads is not None and made:  # the other scales
                run.uploads.put(made, run.job.kinds)
            raise
    missing = without_file(run.job.formats) if outcome.status == "no-tissue" else []
    if run.uploads is not None:
        outcome = _put_up(outcome, targets, run, run.uploads)
    if missing:
        what = f"no .{' and no .'.join(missing)} file is written, since it would hold no tiles"
        outcome = replace(outcome, message=f"{outcome.message}; {what}")
    return outcome


def _listeners(request: SlideRequest, run: Run, mine: Claim) -> Listeners:
    """Return the run's own listeners, and let the worker beat; a file gets its name only while the claim is ours."""

    def on_progress(tiles: int) -> None:
        run.worker.beat()
        with _the_callers():
            run.listeners.on_progress(tiles)

    def on_plan(tiles: int, done: int) -> None:
        with _the_callers():
            run.listeners.on_plan(tiles, done)

    def before_commit() -> None:
        run.listeners.before_commit()
        if mine.lost():
            raise ClaimLost(f"{request.path}: another process took it over")

    return replace(run.listeners, on_plan=on_plan, on_progress=on_progress, before_commit=before_commit)


@contextmanager
def _the_callers() -> Iterator[None]:
    """Tell what a caller's function raises from what is wrong with a slide."""
    try:
        yield
    except Exception as error:
        raise ListenerFailed(f"on_progress raised {type(error).__name__}: {error}") from error


def _as_it_stands(request: SlideRequest, run: Run, stated: str) -> Outcome:
    """Return the outcome of a slide whose files are known to be done, without a look into it."""
    targets = targets_of(request, run, stated)
    paths = tuple(target.path for target in targets)
    for path in paths:
        remove_leftovers(path)
    outcome = Outcome(request.path, "skipped", paths[0], message="already done", outputs=paths)
    if run.uploads is not None and run.uploads.are_done(targets, run.job.kinds):
        run.uploads.clear(targets)
        return run.uploads.named(outcome)
    _derive(run, targets)
    return outcome if run.uploads is None else _put_up(outcome, targets, run, run.uploads)


def _put_up(outcome: Outcome, targets: Sequence[Target], run: Run, uploads: Uploads) -> Outcome:
    run.listeners.on_phase("uploading")
    uploads.put(targets, run.job.kinds)
    return uploads.named(outcome)


def _derive(run: Run, targets: Sequence[Target]) -> None:
    """Make from each finished file what was asked for, where it is missing or was made of another content."""
    for target in targets:
        if run.job.formats:
            run.listeners.on_phase(f"writing {', '.join(run.job.formats)}")
        derive(target.path, target.path.parent, run.job.formats)


def _report(request: SlideRequest, run: Run, slide: Slide, given: Given, scale: AtScale, plan: Plan | None) -> None:
    """Make the report of each finished file, where it is asked for and was not made of what the file holds."""
    for target in scale.targets:
        report = slide_report(target.path.parent, request.name)
        if run.job.report and (plan is not None or not report_is_current(report, target.path)):
            # A report that an earlier run could not write costs a plan now, for its thumbnail, and no inference.
            run.listeners.on_phase("writing the report")
            plan = plan or make_plan(slide, target.model.bundle.manifest.tile_px, scale.settings, given)
            tissue = plan.tissue
            write_report(report, target.path, Thumbnail(tissue.image, tissue.scale, tissue.x0, tissue.y0), slide)


def _stage(
    request: SlideRequest, following: SlideRequest | None, run: Run, staging: Staging
) -> tuple[Path | None, str]:
    """Return where to read a slide from, and what is stated of it; let the next one be copied meanwhile.

    The others' copies are removed. There is nothing to read where the slide is known to be done.
    """
    is_done = not run.job.overwrite and all_there(request, run)  # then only its facts are compared
    is_done = is_done and not isinstance(request.path, SlideUrl)  # whose facts are in its copy
    wanted = {one.path for one in (None if is_done else request, following) if one is not None}
    staging.keep_only(wanted)
    local: Path | None = request.path
    stated = "" if run.uploads is None else hint_of(request.path)
    if not is_done:
        staging.begin(request.path, who_knows(request, run))
        local = staging.wait(request.path, run.worker.beat)
        stated = staging.stated(request.path) if isinstance(request.path, SlideUrl) else stated
    if following is not None:
        staging.begin(following.path, who_knows(following, run))
    return local, stated
