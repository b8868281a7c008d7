"""mtdp-extract: slides in, features out."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import typer

from mtdp_runtime.commands import exit_codes, options, run_file
from mtdp_runtime.commands.app import GroupedCommand, Quiet, Verbose, Version, new_app
from mtdp_runtime.commands.console import hint, note, result_json, run_app, say, trouble, work_begins
from mtdp_runtime.errors import UsageError
from mtdp_runtime.files import working_folder
from mtdp_runtime.machine import usable_cores
from mtdp_runtime.settings import MIN_TISSUE

if TYPE_CHECKING:
    from mtdp_runtime.bundle import Bundle
    from mtdp_runtime.cohort.folder_search import PassedOver
    from mtdp_runtime.cohort.job import Job
    from mtdp_runtime.cohort.requests import SlideRequest
    from mtdp_runtime.cohort.run import Engine
    from mtdp_runtime.cohort.watchdog import Worker
    from mtdp_runtime.store.run_log import RunMark
    from mtdp_runtime.urls import SlideUrl

app = new_app()

# Options that a job has by the same names
_AS_THEY_ARE: Final = (
    "backend",
    "precision",
    "check",
    "overwrite",
    "retry_failed",
    "stage",
    "scheduler",
    "ray_address",
)


# The same of `shared_settings`
_OF_THE_SETTINGS: Final = ("on_bad_tile", "heads", "pool", "features_dtype", "tokens")


@app.command(cls=GroupedCommand, epilog=exit_codes.HELP)
def extract(
    ctx: typer.Context,
    slides: options.Slides = None,
    *,
    config: run_file.Config = None,
    out: options.Out = Path("features"),
    model: options.Models = None,
    mpp: options.Scales = None,
    magnification: options.Magnification = None,
    stride_px: options.StridePx = None,
    min_tissue: options.MinTissue = MIN_TISSUE,
    slide_mpp: options.SlideMpp = None,
    mask: options.Mask = None,
    coords: options.Coords = None,
    classes: options.Classes = None,
    backend: options.EngineName = "auto",
    precision: options.Precision = "auto",
    trust_engines: options.TrustEngines = False,
    batch: options.BatchSize = "auto",
    threads: options.Threads = "auto",
    workers: options.Workers = None,
    devices: options.Devices = None,
    scheduler: options.Scheduler = "local",
    ray_address: options.RayAddress = None,
    on_bad_tile: options.BadTile = "nan",
    format_: options.Formats = None,
    features_dtype: options.Dtype = "float32",
    heads: options.Heads = False,
    pool: options.Pooling = "none",
    tokens: options.Tokens = False,
    overwrite: options.Overwrite = False,
    retry_failed: options.RetryFailed = False,
    shard: options.Shard = None,
    stall_limit: options.StallLimit = 600.0,
    no_report: options.NoReport = False,
    stage: options.Stage = None,
    check: options.Check = 0,
    dry_run: options.DryRun = False,
    demo: options.Demo = False,
    verify: options.Verify = None,
    as_json: options.AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    version: Version = False,
) -> None:
    """Extract features of whole-slide images: find tissue, lay a grid at a physical scale, run the model on each tile.

    A run that was stopped goes on where it was; a file that is complete is left alone.
    """
    from mtdp_runtime.cohort.watchdog import supervise
    from mtdp_runtime.store.run_log import RunMark

    named = list(slides or run_file.slides_of(ctx))
    if verify is not None:
        raise typer.Exit(_verify(verify, as_json, alone=not (named or demo or dry_run)))
    if not named and not demo:
        raise UsageError("no slide was named", hint="mtdp-extract SLIDE, or mtdp-extract --demo to try it without one.")
    part, batch_size = options.part_of(shard), options.count_or_auto("--batch", batch)
    cores = options.count_or_auto("--threads", threads) or usable_cores()
    # From here on a worker: what crashes or hangs it costs one slide. Nothing heavy may be imported above.
    where = (out, None) if dry_run else working_folder(out, stage)
    said = run_file.effective(ctx) | {"slides": [str(path) for path in named], "threads": cores}
    mark = RunMark(["mtdp-extract", *sys.argv[1:]], said)
    worker = supervise(stall_limit, partial(_lost, None if dry_run else where[0], mark, as_json))
    _read_early(ctx.params, batch_size, cores)
    from mtdp_runtime.cohort.job import load_bundles, shared_settings

    bundles = load_bundles(model or [], trust_engines, tokens)
    scales = options.target_mpp(*run_file.stated(ctx, "mpp", "magnification"))
    settings = shared_settings(
        bundles,
        mpp=scales[0] if scales else None,
        stride_px=stride_px,
        min_tissue=min_tissue if run_file.is_said(ctx, "min_tissue") else None,
        coords=coords,
        **{name: ctx.params[name] for name in _OF_THE_SETTINGS},
    )
    passed: list[PassedOver] = []
    work = _requests(named, slide_mpp, mask, (coords, classes), part, worker, passed)
    found = {"scales": scales if len(scales) > 1 else (), "threads": cores, "batch": batch_size}
    job = _job(ctx, where, slides=work, passed_over=passed, bundles=bundles, settings=settings, **found)
    raise typer.Exit(_carry_out(job, worker, mark, dry_run, demo, as_json))


def _job(
    ctx: typer.Context, where: tuple[Path, SlideUrl | None], *, passed_over: Sequence[PassedOver], **found: Any
) -> Job:
    """Return the job: where its files are made and go, what was found out, and the options that it takes as is."""
    from mtdp_runtime.cohort.job import Job

    asked = ctx.params
    far = options.check_scheduler(asked["scheduler"], asked["ray_address"], asked["devices"])
    workers, devices = options.crew_of(asked["workers"], asked["devices"], None if far else found["threads"])
    return Job(
        out=where[0],
        upload=where[1],
        workers=workers,
        devices=devices,
        stall_limit_s=asked["stall_limit"],
        passed_over=tuple(passed_over),
        formats=tuple(asked["format_"] or ()),
        report=not asked["no_report"],
        **found,
        **{name: asked[name] for name in _AS_THEY_ARE},
    )


def _read_early(asked: Mapping[str, Any], batch: int | None, threads: int) -> None:
    """Let the one model of a run here be read from what OpenVINO's last start kept, while all else is imported."""
    models = asked["model"] or []
    elsewhere = asked["dry_run"] or asked["scheduler"] != "local" or asked["workers"] is not None
    if elsewhere or asked["tokens"] or asked["backend"] not in ("auto", "openvino") or len(models) > 1:
        return
    from mtdp_runtime.backends.openvino import OpenVINO
    from mtdp_runtime.bundle import default_bundle_path

    folder = Path(models[0]) if models else default_bundle_path()
    OpenVINO.read_early(folder, asked["precision"], batch, threads)


def _verify(out: Path, as_json: bool, *, alone: bool) -> int:
    """Look at every file of a folder; return the exit code."""
    from mtdp_runtime.commands.verify import say_verdicts
    from mtdp_runtime.urls import refuse_url

    refuse_url(out, "--verify")
    if not alone:
        raise UsageError("--verify takes a folder and no slides", hint=f"mtdp-extract --verify {out}")
    return exit_codes.of_run(say_verdicts(out, as_json), 0)


def _requests(
    named: list[Path],
    slide_mpp: float | None,
    mask: Path | None,
    more: tuple[Path | None, Path | None],
    part: tuple[int, int],
    worker: Worker,
    passed: list[PassedOver],
) -> tuple[SlideRequest, ...]:
    """Return the slides of one part of all that are named."""
    from mtdp_runtime.cohort.requests import list_slides, shard_of

    # What vanishes later, while slides are worked on, fails its slide alone: a new worker does not look again.
    say = note if not (worker.started or worker.settled) else lambda text: None
    coords, classes = more
    requests = list_slides(
        named, slide_mpp, mask, say, must_exist=not worker.started, passed_over=passed, coords=coords, classes=classes
    )
    own, parts = part
    chosen = tuple(request for request in requests if parts == 1 or shard_of(request, parts) == own)
    if requests and not chosen:
        note(f"no slide of the list belongs to part {own}/{parts}")
    return chosen


def _carry_out(job: Job, worker: Worker, mark: RunMark, dry_run: bool, demo: bool, as_json: bool) -> int:
    """Do a job, or plan it; return the exit code."""
    from mtdp_runtime.cohort.requests import list_slides
    from mtdp_runtime.cohort.run import look_first

    look_first(job, worker, writes=not dry_run, say=note, mark=mark)
    with ExitStack() as opened:
        if demo:
            work_begins()
            folder = Path(opened.enter_context(TemporaryDirectory(prefix="mtdp-demo-"))) if dry_run else job.out
            made = list_slides([_demo_slide(folder, kept=not dry_run, quiet=as_json)])
            job = replace(job, slides=(*job.slides, *made))
        if not job.slides:
            return 0
        if dry_run:
            return _dry_run(job, worker, as_json)
        code = _run(job, worker, mark, as_json)
        if demo and not as_json:
            _say_where_to_look(job)
        return code


def _lost(out: Path | None, mark: RunMark, as_json: bool, line: dict[str, Any]) -> None:
    """Say, and record in `out`, that a slide ended its process. Runs in the parent, which stays small."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # a slide may be lost while masks are looked at, before any work
        mark.append(out, line)
    if as_json:
        result_json(line)
    else:
        trouble("failed: ", line["message"])
        hint(line["hint"], "  ")


def _run(job: Job, worker: Worker, mark: RunMark, as_json: bool) -> int:
    """Extract all slides; return the exit code."""
    from mtdp_runtime.cohort.run import run_job
    from mtdp_runtime.commands.output import quiet_model, say_model, say_outcomes
    from mtdp_runtime.commands.progress import Progress

    def on_model(bundle: Bundle, engine: Engine, reason: str) -> None:
        work_begins()
        (quiet_model if as_json else say_model)(bundle, engine, reason)

    settled = worker.settled
    with Progress(len(job.slides), len(settled), shown=not as_json) as progress:
        outcomes = run_job(job, listeners=progress.listeners, worker=worker, on_model=on_model, say=note, mark=mark)
        return say_outcomes(outcomes, job.slides, settled, progress, job.out, as_json, len(job.passed_over))


def _say_where_to_look(job: Job) -> None:
    """End the demo with what one does next."""
    import shlex

    from mtdp_runtime.report import places

    if job.upload is not None:
        return
    if job.report:
        say(f"report: {places.run_page(job.out)}")
    say(f"look at the slide and its features: mtdp-view {shlex.quote(str(job.out))}")


def _demo_slide(folder: Path, kept: bool, quiet: bool) -> Path:
    from mtdp_runtime.commands.demo_slide import write_demo_slide

    path = folder / "demo-slide.tiff"
    write_demo_slide(path)
    if not quiet:
        where = f"was written to {path}" if kept else "for this dry run alone; it is removed at its end"
        say(f"demo: a synthetic slide {where}")
    return path


def _dry_run(job: Job, worker: Worker, as_json: bool) -> int:
    """Plan all slides; return the exit code."""
    from mtdp_runtime.cohort.dry_run import plan_job
    from mtdp_runtime.commands.output import say_plans, say_speeds

    plans = plan_job(
        job,
        worker,
        no_estimate=lambda why: note(f"no estimate of the time: {why}"),
        on_speeds=(lambda speeds: None) if as_json else say_speeds,
    )
    return say_plans(plans, len(job.slides), worker.settled.values(), as_json)


def main() -> None:
    """Entry point of `mtdp-extract`."""
    run_app(app, "mtdp-extract", begins_itself=True)
