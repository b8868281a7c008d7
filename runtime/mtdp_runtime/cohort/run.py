"""Carries out a job in this process: looks first, loads the models once, then goes from slide to slide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from mtdp_runtime.backends import Backend, load
from mtdp_runtime.bundle import Bundle
from mtdp_runtime.cohort.failures import update_after
from mtdp_runtime.cohort.job import Job
from mtdp_runtime.cohort.local import extract_slides
from mtdp_runtime.cohort.preflight import refused
from mtdp_runtime.cohort.servers import TransferFailed, look_for_library
from mtdp_runtime.cohort.staging import Staging
from mtdp_runtime.cohort.under_way import Run
from mtdp_runtime.cohort.uploads import Uploads
from mtdp_runtime.cohort.watchdog import UNWATCHED, Worker
from mtdp_runtime.errors import RuntimeFailure, UsageError
from mtdp_runtime.extraction.extract import SILENT, Listeners
from mtdp_runtime.extraction.models import load_models, with_references
from mtdp_runtime.extraction.outcome import Outcome, log_line
from mtdp_runtime.files import writable_folder
from mtdp_runtime.report.run import write_run_page
from mtdp_runtime.store import run_log
from mtdp_runtime.store.run_log import RunMark
from mtdp_runtime.urls import SlideUrl, is_url, without_secrets

if TYPE_CHECKING:
    from mtdp_runtime.cohort.member import LoadedModel
    from mtdp_runtime.cohort.pool import Crew

_SAID: Final = 10  # of what is wrong with single slides


class Engine(Protocol):
    """What an engine says of itself; see `backends.Backend`."""

    @property
    def name(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def batch(self) -> int: ...
    @property
    def note(self) -> str: ...


OnModel = Callable[[Bundle, Engine, str], None]  # a model was loaded, on this engine, for this reason


def look_first(
    job: Job,
    worker: Worker = UNWATCHED,
    writes: bool = True,
    say: Callable[[str], None] = lambda text: None,
    mark: RunMark | None = None,
) -> None:
    """Look at what a run needs before any work: names, masks, and the folder, where it is written.

    `say` takes what will fail single slides; `mark` is the run's in run.jsonl.

    Raises:
        UsageError: no slide can be done, or the folder cannot be written.
    """
    far = next((request.path for request in job.slides if isinstance(request.path, SlideUrl)), None)
    if is_url(job.out):
        raise UsageError(
            f"--out {without_secrets(str(job.out))}: only a run of mtdp-extract writes to a bucket",
            hint="Name a folder.",
        )
    if job.upload is not None:
        look_for_library(job.upload)
    if job.upload is not None and job.ray_address is not None:
        raise UsageError(
            f"--out {job.upload}: the machines of --ray-address share a folder",
            hint="Run the command on each machine with its part of the slides: --shard.",
        )
    if far is not None and not (writes and job.stage):
        what = "is fetched to a local disk" if writes else "is fetched by a run alone: it cannot be planned from here"
        raise UsageError(f"{far}: {what}", hint="Name a folder there: --stage DIR." if writes else "Plan a local copy.")
    if not worker.started:
        found = refused(job, worker)
        if found and len(found) == len(job.slides):
            first = found[0]
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise UsageError(f"{first}{more}", hint=first.hint)
        for refusal in found[:_SAID]:
            say(f"will fail, the others are done: {refusal}")
        if len(found) > _SAID:
            say(f"{len(found) - _SAID} more slides will fail for such reasons")
    if writes:
        writable_folder(job.out)
        run_log.check(job.out)
    if writes and job.upload is not None and not worker.started:
        Uploads(job.upload, job.out).look()
    if writes and not worker.started:
        mark = mark or RunMark()
        for one in job.passed_over:
            mark.append(job.out, log_line(Outcome(one.path, "passed-over", message=one.why)))
    if not worker.started:
        worker.start()


def load_engine(job: Job, bundle: Bundle, batch: int | None, on_model: OnModel, worker: Worker = UNWATCHED) -> Backend:
    """Load a model of a job, and say on which engine; the worker is told.

    Raises:
        UsageError, BackendError: it cannot be had here.
    """
    worker.load(str(bundle.path))
    engine, reason = load(job.backend, bundle, job.precision, batch, job.threads_each, batch_threads=job.threads)
    on_model(bundle, engine, reason)
    return engine


@contextmanager
def under_way(
    job: Job,
    listeners: Listeners,
    worker: Worker,
    on_loaded: OnModel,
    say: Callable[[str], None],
    mark: RunMark,
    begins: Callable[[], None],
) -> Iterator[Run]:
    """Load what the slides of a job share in this process; `begins` is called once its models are there.

    Raises:
        BackendError, UsageError: a model cannot be run here.
    """
    with ExitStack() as opened:
        load_one = partial(load_engine, job, on_model=on_loaded, worker=worker)
        models = opened.enter_context(load_models(job.bundles, load_one, job.batch))
        checked = opened.enter_context(with_references(models, job.check, job.threads_each))
        worker.load("")
        begins()
        yield Run(
            job,
            checked,
            listeners,
            worker,
            None if job.stage is None else opened.enter_context(Staging(job.stage, say)),
            None if job.upload is None else Uploads(job.upload, job.out, lambda count: worker.beat()),
            {} if job.retry_failed or job.overwrite else run_log.failures(job.out),
            mark,
        )


def run_job(
    job: Job,
    *,
    listeners: Callable[[int], Listeners] = lambda number: SILENT,
    worker: Worker = UNWATCHED,
    on_model: OnModel = lambda bundle, engine, reason: None,
    say: Callable[[str], None] = lambda text: None,
    mark: RunMark | None = None,
) -> Iterator[Outcome]:
    """Extract the slides of a job, and yield how each went; at the end `failed.csv` says what is left to mend.

    Args:
        job: of which `look_first` found nothing wrong.
        listeners: of each worker, by its number; they hear of each slide while it is worked on.
        worker: is told where the run is.
        on_model: hears which engine each model got.
        say: takes what is no error: a slide that cannot be staged, failures that cannot be listed.
        mark: the run's in run.jsonl.

    Raises:
        BackendError, OutputUnwritable: what would fail for every slide ends the run.
    """
    mark = mark or RunMark()
    work = _extract_by_many if job.workers > 1 or job.scheduler != "local" else _extract_here
    lines: dict[str, Mapping[str, Any]] = dict(worker.settled)
    for outcome in work(job, listeners, worker, on_model, say, mark):
        lines[outcome.name] = run_log.counts(log_line(outcome))
        yield outcome
    update_after(job.out, job.slides, lines, say)
    if job.upload is not None:
        try:
            Uploads(job.upload, job.out).put_logs()
        except TransferFailed as error:
            say(f"{error}; {job.out} has the run's log, and the next run from here puts it up")
    elif job.report:
        _show(job.out, say)


def _extract_here(
    job: Job,
    listeners: Callable[[int], Listeners],
    worker: Worker,
    on_model: OnModel,
    say: Callable[[str], None],
    mark: RunMark,
) -> Iterator[Outcome]:
    """Extract one slide after the other in this process."""
    loaded: dict[str, dict[str, Any]] = {}  # by digest: a model that is loaded again, for fewer tiles, counts once

    def on_loaded(bundle: Bundle, engine: Engine, reason: str) -> None:
        loaded[bundle.digest] = _facts(bundle, engine, reason)
        on_model(bundle, engine, reason)

    def begins() -> None:
        if not worker.follows:
            mark.begin(job.out, list(loaded.values()))

    with under_way(job, listeners(0), worker, on_loaded, say, mark, begins) as run:
        yield from extract_slides(job.slides, run)


def _extract_by_many(
    job: Job,
    listeners: Callable[[int], Listeners],
    worker: Worker,
    on_model: OnModel,
    say: Callable[[str], None],
    mark: RunMark,
) -> Iterator[Outcome]:
    """Extract slides by several workers at once."""
    from mtdp_runtime.cohort.pool import Pool

    said: list[Sequence[Engine]] = []

    def on_ready(models: Sequence[LoadedModel]) -> None:
        if not said:
            mark.begin(job.out, [_facts(job.bundles[one.number], one, one.reason) for one in models])
        if models not in said:  # machines may differ in their engines
            said.append(models)
            for one in models:
                on_model(job.bundles[one.number], one, one.reason)

    pool = Pool(job, _crew(job, mark), mark, listeners, on_ready, say)
    for outcome in pool.extract(worker.settled):
        worker.end(outcome.name, run_log.counts(log_line(outcome)))
        yield outcome


def _crew(job: Job, mark: RunMark) -> Crew:
    """Return the workers of a job, not started yet: processes here, or actors. Each slide is given to them later."""
    job = replace(job, slides=(), passed_over=())  # thousands would fill the pipe of a worker that does not read yet
    if job.scheduler == "ray":
        from mtdp_runtime.cohort.ray import RayCrew

        return RayCrew(job, mark, job.ray_address)
    from mtdp_runtime.cohort.processes import Processes

    return Processes(job, mark)


def _show(out: Path, say: Callable[[str], None]) -> None:
    """Make the page of the folder anew; one that cannot be made is no reason for a run to fail."""
    try:
        write_run_page(out)
    except RuntimeFailure as error:
        say(f"{error}; run.jsonl has what it would show")


def _facts(bundle: Bundle, engine: Engine, reason: str) -> dict[str, Any]:
    """Return what run.jsonl says of a model."""
    return {
        "name": bundle.manifest.name,
        "digest": bundle.digest,
        **({"source": bundle.source} if bundle.source else {}),
        "backend": engine.name,
        "precision": engine.precision,
        "batch": engine.batch,
        "reason": reason,
        "note": engine.note,
    }
