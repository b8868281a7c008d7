"""mtdp-extract: slides in, features out."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtdp_runtime.commands.console import note, printable, run_app
from mtdp_runtime.commands.options import count_or_auto
from mtdp_runtime.errors import UsageError
from mtdp_runtime.machine import usable_cores

if TYPE_CHECKING:
    from mtdp_runtime.cohort.job import Job
    from mtdp_runtime.cohort.watchdog import Worker

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def extract(
    slides: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="SLIDE...",
            help="Slides, folders of slides, or CSV manifests with the columns "
            "slide[,mpp][,mask][,name]; name is what the output is called.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for <slide>.h5, report/<slide>.html and run.jsonl.")] = Path(
        "features"
    ),
    model: Annotated[
        list[Path] | None,
        typer.Option(
            help="Model bundle; the packaged one if left out. Repeat it, and each tile is read once for all models; "
            "the files go to OUT/<model name>. They must agree in tile size and scale.",
            metavar="BUNDLE",
        ),
    ] = None,
    mpp: Annotated[
        float | None, typer.Option(help="Scale of the tiles in µm per pixel; the model's own if left out.")
    ] = None,
    magnification: Annotated[
        float | None,
        typer.Option(help="Another way to say --mpp: 10 / magnification, so 20 is 0.5 µm per pixel and 40 is 0.25."),
    ] = None,
    stride_px: Annotated[
        int | None, typer.Option(help="Pixels between tiles, at that scale; the tile size if left out.")
    ] = None,
    min_tissue: Annotated[
        float,
        typer.Option(help="Part of a tile's area that must be tissue. 0 takes every tile, glass too.", min=0, max=1),
    ] = 0.25,
    slide_mpp: Annotated[
        float | None, typer.Option(help="µm per level-0 pixel, for slides that do not say it or say it wrongly.")
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            help="Where the tissue is, instead of finding it: QuPath's GeoJSON in level-0 pixels, or an image of the "
            "whole slide whose non-zero pixels are tissue. For many slides: the column mask of a manifest.",
            metavar="GEOJSON|PNG",
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            help="auto, tensorrt, tensorrt-rtx, onnxruntime-cuda, onnxruntime-tensorrt, openvino or onnxruntime."
        ),
    ] = "auto",
    precision: Annotated[str, typer.Option(help="auto (never int8), fp32, fp16, bf16 or int8.")] = "auto",
    trust_engines: Annotated[
        bool,
        typer.Option(
            "--trust-engines", help="Load TensorRT engines that the bundle brings. They are code: know who made them."
        ),
    ] = False,
    batch: Annotated[
        str, typer.Option(help="Tiles in a batch. auto: 64 on a GPU, 4 to 16 on a CPU, by its cores.", metavar="N|auto")
    ] = "auto",
    threads: Annotated[
        str, typer.Option(help="CPU threads. auto: the cores that this process may use.", metavar="N|auto")
    ] = "auto",
    on_bad_tile: Annotated[
        str,
        typer.Option(help="A tile that cannot be read: nan (stored as NaN, with its status), drop, or fail the slide."),
    ] = "nan",
    format_: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="Also write pt (CLAM), npy, csv or geojson (WSInfer, QuPath), or zarr (SpatialData), made from the "
            "HDF5 file, which is always there; repeat for several.",
        ),
    ] = None,
    features_dtype: Annotated[
        str, typer.Option(help="Store features as float32, or as float16 in half the space.", metavar="float32|float16")
    ] = "float32",
    heads: Annotated[bool, typer.Option("--heads", help="Also store the model's task probabilities.")] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace files of other settings and incomplete ones, and try slides again that failed before. What "
            "is already as it would be made now is left alone: delete it to have it computed again.",
        ),
    ] = False,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed",
            help="Try slides again that failed in an earlier run. Without it a slide that is unchanged, with unchanged "
            "settings, is reported as failed and not tried.",
        ),
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Only part I (1 to N) of the slides, for N machines; a slide's part depends on its name alone. "
            "Runs without it may share a folder, too: each takes slides that no other is at.",
        ),
    ] = None,
    stall_limit: Annotated[
        float,
        typer.Option(
            help="Seconds without anything read or computed after which a slide counts as hung and fails. "
            "0: wait for ever.",
            min=0,
        ),
    ] = 600.0,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no HTML report.")] = False,
    stage: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Copy each slide to this folder on a local disk while the one before runs: for slow storage. "
            "Copies are removed.",
        ),
    ] = None,
    check: Annotated[
        int,
        typer.Option(
            help="Recompute this many random tiles of each slide with OpenSlide and ONNX Runtime in fp32, of finished "
            "files, too; print and record the smallest cosine, and warn where the precision promises more.",
            min=0,
        ),
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Find tissue, count tiles, estimate bytes and time; write nothing.")
    ] = False,
    demo: Annotated[
        bool, typer.Option("--demo", help="Make a synthetic slide in the output folder and run on it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a slide on stdout.")] = False,
) -> None:
    """Extract features of whole-slide images: find tissue, lay a grid at a physical scale, run the model on each tile.

    A run that was stopped goes on where it was; a file that is complete is left alone. Exit code 0: all done;
    1: some slide failed, the others are done; 2: wrong usage.
    """
    from mtdp_runtime.cohort.watchdog import supervise

    named = list(slides or [])
    if not named and not demo:
        raise UsageError("no slide was named", hint="mtdp-extract SLIDE, or mtdp-extract --demo to try it without one.")
    part, parts = _part(shard)
    batch_size = count_or_auto("--batch", batch)
    cores = count_or_auto("--threads", threads) or usable_cores()
    target = _target(mpp, magnification)
    # From here on a worker: what crashes or hangs it costs one slide. Nothing heavy may be imported above.
    worker = supervise(stall_limit, partial(_lost, None if dry_run else out, as_json))

    from mtdp_runtime.cohort.job import Job, load_bundles, shared_settings
    from mtdp_runtime.cohort.requests import list_slides, shard_of
    from mtdp_runtime.cohort.run import look_first

    bundles = load_bundles(model or [], trust_engines)
    # What vanishes later, while slides are worked on, fails its slide alone: a new worker does not look again.
    say = note if not (worker.started or worker.settled) else lambda text: None
    requests = list_slides(named, slide_mpp, mask, say, must_exist=not worker.started)
    job = Job(
        slides=tuple(request for request in requests if parts == 1 or shard_of(request, parts) == part),
        out=out,
        bundles=bundles,
        settings=shared_settings(
            bundles,
            mpp=target,
            stride_px=stride_px,
            min_tissue=min_tissue,
            on_bad_tile=on_bad_tile,
            heads=heads,
            features_dtype=features_dtype,
        ),
        threads=cores,
        backend=backend,
        precision=precision,
        batch=batch_size,
        check=check,
        formats=tuple(format_ or ()),
        report=not no_report,
        overwrite=overwrite,
        retry_failed=retry_failed,
        stage=stage,
    )
    look_first(job, worker, writes=not dry_run)
    with ExitStack() as opened:
        if demo:
            folder = Path(opened.enter_context(TemporaryDirectory(prefix="mtdp-demo-"))) if dry_run else out
            made = list_slides([_demo_slide(folder, kept=not dry_run, quiet=as_json)])
            job = replace(job, slides=(*job.slides, *made))
        if not job.slides:
            print(f"no slide of the list belongs to part {shard}", file=sys.stderr)
        elif _dry_run(job, worker, as_json) if dry_run else _run(job, worker, as_json):
            raise typer.Exit(1)


def _part(shard: str | None) -> tuple[int, int]:
    """Return I and N of `--shard I/N`."""
    if shard is None:
        return 1, 1
    part, _, parts = shard.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise UsageError(f"--shard {shard!r}: not a part", hint="I/N with I from 1 to N, for example 1/4.")
    return int(part), int(parts)


def _target(mpp: float | None, magnification: float | None) -> float | None:
    """Return the scale that was asked for, in µm per pixel."""
    from mtdp_runtime.slide.scale import is_scale

    if magnification is not None:
        if mpp is not None:
            raise UsageError("--mpp and --magnification say the same twice", hint="Leave out --magnification.")
        if not (magnification > 0 and is_scale(10 / magnification)):
            raise UsageError(f"--magnification {magnification}: not one", hint="For example 20, which is --mpp 0.5.")
        return 10 / magnification
    if mpp is not None and not is_scale(mpp):
        raise UsageError(f"--mpp {mpp}: not a scale", hint="Micrometres per pixel, for example --mpp 0.5.")
    return mpp


def _lost(out: Path | None, as_json: bool, line: dict[str, Any]) -> None:
    """Say, and record in `out`, that a slide ended its process. Runs in the parent, which stays small."""
    from mtdp_runtime.store import run_log

    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # a slide may be lost while masks are looked at, before any work
        run_log.append(out, line)
    if as_json:
        print(json.dumps(line), flush=True)
    else:
        print(f"failed: {printable(line['message'])}\n  hint: {printable(line['hint'])}", file=sys.stderr)


def _run(job: Job, worker: Worker, as_json: bool) -> int:
    """Extract all slides; return how many failed."""
    from mtdp_runtime.cohort.run import run_job
    from mtdp_runtime.commands.output import bars_of, quiet_model, say_model, say_outcomes

    on_model = quiet_model if as_json else say_model
    with ExitStack() as bars:
        outcomes = run_job(job, listeners=bars_of(bars, not as_json), worker=worker, on_model=on_model, say=note)
        return say_outcomes(outcomes, len(job.slides), worker.settled.values(), bars, job.out, as_json)


def _demo_slide(folder: Path, kept: bool, quiet: bool) -> Path:
    from mtdp_runtime.commands.demo_slide import write_demo_slide

    path = folder / "demo-slide.tiff"
    write_demo_slide(path)
    if not quiet:
        where = f"was written to {printable(path)}" if kept else "for this dry run alone; it is removed at its end"
        print(f"demo: a synthetic slide {where}")
    return path


def _dry_run(job: Job, worker: Worker, as_json: bool) -> int:
    """Plan all slides; return how many failed."""
    from mtdp_runtime.cohort.dry_run import plan_job
    from mtdp_runtime.commands.output import say_plans

    plans = plan_job(job, worker, lambda why: print(f"no estimate of the time: {why}", file=sys.stderr))
    return say_plans(plans, len(job.slides), worker.settled.values(), job.settings.mpp, as_json)


def main() -> None:
    """Entry point of `mtdp-extract`."""
    run_app(app)
