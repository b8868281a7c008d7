"""mtdp-extract: slides in, features out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtdp_runtime.commands.console import note, printable, run_app
from mtdp_runtime.commands.options import count_or_auto
from mtdp_runtime.errors import UsageError
from mtdp_runtime.formats import check_formats
from mtdp_runtime.machine import usable_cores

if TYPE_CHECKING:
    from mtdp_runtime.backends import Backend
    from mtdp_runtime.bundle import Bundle
    from mtdp_runtime.cohort.requests import SlideRequest
    from mtdp_runtime.cohort.watchdog import Worker
    from mtdp_runtime.settings import ExtractSettings

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
    formats = check_formats(format_ or [])
    batch_size = count_or_auto("--batch", batch)
    cores = count_or_auto("--threads", threads) or usable_cores()
    # From here on a worker: what crashes or hangs it costs one slide. Nothing heavy may be imported above.
    worker = supervise(stall_limit, partial(_lost, None if dry_run else out, as_json))

    from tempfile import TemporaryDirectory

    from mtdp_runtime.api import shared_settings
    from mtdp_runtime.bundle import default_bundle_path, load_bundle
    from mtdp_runtime.cohort.attempt import Run
    from mtdp_runtime.cohort.local import extract_slides
    from mtdp_runtime.cohort.preflight import check_masks
    from mtdp_runtime.cohort.requests import list_slides, shard_of
    from mtdp_runtime.cohort.staging import Staging
    from mtdp_runtime.commands.output import bars_of, say_outcomes
    from mtdp_runtime.extraction.models import checked, folders, load_models
    from mtdp_runtime.files import writable_folder

    bundles = [load_bundle(path, trust_engines) for path in model or [default_bundle_path()]]
    # What vanishes later, while slides are worked on, fails its slide alone: a new worker does not look again.
    say = note if not (worker.started or worker.settled) else lambda text: None
    requests = list_slides(named, slide_mpp, mask, say, must_exist=not worker.started)
    requests = [r for r in requests if shard_of(r, parts) == part] if parts > 1 else requests
    folders(bundles, out)
    target = _target(mpp, magnification)
    settings = shared_settings(bundles, target, stride_px, min_tissue, on_bad_tile, heads, features_dtype)
    if not worker.started:
        check_masks(requests, worker)
        worker.start()
    load = partial(_load, name=backend, precision=precision, threads=cores, quiet=dry_run or as_json)
    if not dry_run:
        writable_folder(out)
    with ExitStack() as opened, ExitStack() as bars:
        if demo:
            folder = Path(opened.enter_context(TemporaryDirectory(prefix="mtdp-demo-"))) if dry_run else out
            requests += list_slides([_demo_slide(folder, kept=not dry_run, quiet=as_json)])
        if not requests:
            print(f"no slide of the list belongs to part {shard}", file=sys.stderr)
            return
        if dry_run:
            failures = _dry_run(requests, bundles, settings, as_json, partial(load, batch=batch_size), cores, worker)
        else:
            models = opened.enter_context(load_models(bundles, load, batch_size))
            run = Run(
                out,
                opened.enter_context(checked(models, check, cores)),
                settings,
                cores,
                bars_of(bars, shown=not as_json),
                overwrite=overwrite,
                report=not no_report,
                retry_failed=retry_failed,
                worker=worker,
                formats=formats,
                staging=None if stage is None else opened.enter_context(Staging(stage, note)),
            )
            outcomes = extract_slides(requests, run)
            failures = say_outcomes(outcomes, len(requests), worker.settled.values(), bars, out, as_json)
    if failures:
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


def _load(bundle: Bundle, batch: int | None, *, name: str, precision: str, threads: int, quiet: bool) -> Backend:
    from mtdp_runtime.backends import load
    from mtdp_runtime.commands.output import say_model

    engine, reason = load(name, bundle, precision, batch, threads)
    if not quiet:
        say_model(bundle, engine, reason)
    return engine


def _demo_slide(folder: Path, kept: bool, quiet: bool) -> Path:
    from mtdp_runtime.commands.demo_slide import write_demo_slide

    path = folder / "demo-slide.tiff"
    write_demo_slide(path)
    if not quiet:
        where = f"was written to {printable(path)}" if kept else "for this dry run alone; it is removed at its end"
        print(f"demo: a synthetic slide {where}")
    return path


def _dry_run(
    requests: Sequence[SlideRequest],
    bundles: Sequence[Bundle],
    settings: ExtractSettings,
    as_json: bool,
    load: Callable[[Bundle], Backend],
    threads: int,
    worker: Worker,
) -> int:
    """Plan all slides; return how many failed."""
    from mtdp_runtime.backends.speed import EngineSpeed, engine_speed
    from mtdp_runtime.cohort import estimate
    from mtdp_runtime.cohort.dry_run import plan_slides
    from mtdp_runtime.commands.output import say_plans
    from mtdp_runtime.errors import BackendError

    speeds: list[EngineSpeed] = []
    try:
        for bundle in bundles:
            with load(bundle) as engine:
                speeds.append(engine_speed(engine, bundle.manifest.tile_px))
    except BackendError as error:
        speeds = []
        print(f"no estimate of the time: {error}", file=sys.stderr)
    manifests = [bundle.manifest for bundle in bundles]
    cost = partial(estimate.costs, manifests=manifests, settings=settings, speeds=speeds, threads=threads)
    plans = plan_slides(requests, manifests[0].tile_px, settings, cost, worker)
    return say_plans(plans, len(requests), worker.settled.values(), settings.mpp, as_json)


def main() -> None:
    """Entry point of `mtdp-extract`."""
    run_app(app)
