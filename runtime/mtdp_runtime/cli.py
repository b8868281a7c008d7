"""mtdp-extract: slides in, features out."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtdp_runtime.console import printable, run_app
from mtdp_runtime.errors import UsageError
from mtdp_runtime.formats import check_formats

if TYPE_CHECKING:
    from mtdp_runtime.backends import Backend
    from mtdp_runtime.bundle import Bundle
    from mtdp_runtime.extract import ExtractSettings, Outcome, Plan
    from mtdp_runtime.slides import SlideRequest
    from mtdp_runtime.watchdog import Worker

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def extract(
    slides: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="SLIDE...", help="Slides, folders of slides, or CSV manifests with the columns slide[,mpp]."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for <slide>.h5, report/<slide>.html and run.jsonl.")] = Path(
        "features"
    ),
    model: Annotated[
        Path | None, typer.Option(help="Model bundle; the packaged one if left out.", metavar="BUNDLE")
    ] = None,
    mpp: Annotated[
        float | None, typer.Option(help="Scale of the tiles in µm per pixel; the model's own if left out.")
    ] = None,
    stride_px: Annotated[
        int | None, typer.Option(help="Pixels between tiles, at that scale; the tile size if left out.")
    ] = None,
    min_tissue: Annotated[float, typer.Option(help="Part of a tile's area that must be tissue.", min=0, max=1)] = 0.25,
    slide_mpp: Annotated[
        float | None, typer.Option(help="µm per level-0 pixel, for slides that do not say it or say it wrongly.")
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, openvino or onnxruntime.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, or one that the backend runs: bf16, fp32.")] = "auto",
    batch: Annotated[int, typer.Option(help="Tiles in a batch.", min=1)] = 16,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; the cores of this machine if left out.", min=1)
    ] = None,
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
    heads: Annotated[bool, typer.Option("--heads", help="Also store the model's task probabilities.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of other settings.")] = False,
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Find tissue and count tiles; compute nothing.")] = False,
    demo: Annotated[
        bool, typer.Option("--demo", help="Make a synthetic slide in the output folder and run on it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a slide on stdout.")] = False,
) -> None:
    """Extract features of whole-slide images: find tissue, lay a grid at a physical scale, run the model on each tile.

    A run that was stopped goes on where it was; a file that is complete is left alone. Exit code 0: all done;
    1: some slide failed, the others are done; 2: wrong usage.
    """
    from mtdp_runtime.watchdog import supervise

    named = list(slides or [])
    if not named and not demo:
        raise UsageError("no slide was named", hint="mtdp-extract SLIDE, or mtdp-extract --demo to try it without one.")
    if on_bad_tile not in ("nan", "drop", "fail"):
        raise UsageError(f"--on-bad-tile {on_bad_tile!r}: unknown", hint="One of nan, drop, fail.")
    part, parts = _part(shard)
    formats = check_formats(format_ or [])
    # From here on a worker: what crashes or hangs it costs one slide. Nothing heavy may be imported above.
    worker = supervise(stall_limit, partial(_lost, out, as_json))

    from mtdp_runtime.bundle import default_bundle_path, load_bundle
    from mtdp_runtime.extract import writable_folder
    from mtdp_runtime.slides import list_slides, shard_of

    bundle = load_bundle(model if model is not None else default_bundle_path())
    requests = list_slides(named, slide_mpp)
    requests = [r for r in requests if shard_of(r, parts) == part] if parts > 1 else requests
    settings = _settings(bundle, mpp, stride_px, min_tissue, on_bad_tile, heads)
    if dry_run and not demo:
        _dry_run(requests, bundle, settings, as_json)
        return
    writable_folder(out)
    if demo:
        requests += list_slides([_demo_slide(out, as_json)])
    if not requests:
        print(f"no slide of the list belongs to part {shard}", file=sys.stderr)
        return
    cores = threads or len(os.sched_getaffinity(0))
    with _load(bundle, backend, precision, batch, cores, as_json) as engine:
        failures = _run(
            requests,
            out,
            bundle,
            engine,
            settings,
            cores,
            overwrite,
            not no_report,
            as_json,
            retry_failed,
            worker,
            formats,
        )
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


def _lost(out: Path, as_json: bool, line: dict[str, Any]) -> None:
    """Record and say that a slide ended the process that worked on it. Runs in the parent, which stays small."""
    from mtdp_runtime import runlog

    runlog.append(out, line)
    if as_json:
        print(json.dumps(line), flush=True)
    else:
        print(f"failed: {printable(line['message'])}\n  hint: {printable(line['hint'])}", file=sys.stderr)


def _settings(
    bundle: Bundle, mpp: float | None, stride_px: int | None, min_tissue: float, on_bad_tile: str, heads: bool
) -> ExtractSettings:
    from mtdp_runtime.extract import ExtractSettings

    if heads and not bundle.manifest.heads:
        raise UsageError(
            f"--heads: {bundle.manifest.name} has none", hint="Export the model without --no-heads, or leave it out."
        )
    return ExtractSettings(
        mpp=mpp if mpp is not None else bundle.manifest.mpp,
        stride_px=stride_px if stride_px is not None else bundle.manifest.tile_px,
        min_tissue=min_tissue,
        on_bad_tile=on_bad_tile,  # type: ignore[arg-type]  # checked by the caller
        heads=heads,
    )


def _load(bundle: Bundle, name: str, precision: str, batch: int, threads: int, quiet: bool) -> Backend:
    from mtdp_runtime.backends import choose

    backend, reason = choose(name)
    engine = backend.load(bundle, precision, batch, threads)
    if not quiet:
        manifest = bundle.manifest
        name = printable(f"{manifest.name} ({manifest.arch}, {manifest.features_dim} features)")
        print(f"model: {name}, digest {bundle.digest[:16]}")
        print(f"engine: {engine.name}, {engine.precision}; {engine.note or reason}")
    return engine


def _demo_slide(out: Path, quiet: bool) -> Path:
    from mtdp_runtime.demo import write_demo_slide

    path = out / "demo-slide.tiff"
    write_demo_slide(path)
    if not quiet:
        print(f"demo: a synthetic slide was written to {printable(path)}")
    return path


def _run(
    requests: list[SlideRequest],
    out: Path,
    bundle: Bundle,
    engine: Backend,
    settings: ExtractSettings,
    threads: int,
    overwrite: bool,
    report: bool,
    as_json: bool,
    retry_failed: bool,
    worker: Worker,
    formats: tuple[str, ...],
) -> int:
    """Extract all slides; return how many failed."""
    from mtdp_runtime.cohort import Listeners, extract_slides
    from mtdp_runtime.console import tile_progress

    before = len(worker.settled)  # by the workers before this one
    failures = sum(status == "failed" for status in worker.settled.values())
    elsewhere = 0
    with ExitStack() as bars:
        advance = [lambda tiles: None]

        def on_plan(plan: Plan) -> None:
            advance[0] = bars.enter_context(tile_progress(plan.info.path.name, len(plan.kept), not as_json))

        listeners = Listeners(on_plan, lambda tiles: advance[0](tiles))
        outcomes = extract_slides(
            requests,
            out,
            bundle,
            engine,
            settings,
            threads,
            listeners,
            overwrite,
            report,
            retry_failed,
            worker,
            formats,
        )
        for number, outcome in enumerate(outcomes, start=before + 1):
            bars.close()
            failures += outcome.status == "failed"
            elsewhere += outcome.status == "claimed"
            _say(outcome, f"[{number}/{len(requests)}] " if len(requests) > 1 else "", as_json)
    if len(requests) > 1 and not as_json:
        others = f", {elsewhere} left to another run" if elsewhere else ""
        print(
            f"{len(requests) - failures - elsewhere} of {len(requests)} slides done, {failures} failed{others}; "
            f"see {printable(out / 'run.jsonl')}"
        )
    return failures


def _say(outcome: Outcome, prefix: str, as_json: bool) -> None:
    from mtdp_runtime import cohort

    if as_json:
        print(json.dumps(cohort.as_json(outcome)), flush=True)
    elif outcome.status == "failed":
        print(f"{prefix}failed: {printable(outcome.message)}", file=sys.stderr)
        if outcome.hint:
            print(f"  hint: {printable(outcome.hint)}", file=sys.stderr)
    elif outcome.status == "done" and outcome.times is not None:
        times = outcome.times
        bad = f", {outcome.bad_tiles} bad (NaN, see status)" if outcome.bad_tiles else ""
        print(
            f"{prefix}{printable(outcome.slide.name)}: {outcome.tiles} tiles{bad} in {outcome.seconds:.1f} s, "
            f"{times.tiles_per_s:.1f} tiles/s, bottleneck {times.bottleneck}, "
            f"the engine waited {times.device_idle:.0%} of the time -> {printable(outcome.output)}",
            flush=True,
        )
    else:
        where = f" -> {printable(outcome.output)}" if outcome.output is not None else ""
        print(
            f"{prefix}{printable(outcome.slide.name)}: {outcome.status}: {printable(outcome.message)}{where}",
            flush=True,
        )


def _dry_run(requests: list[SlideRequest], bundle: Bundle, settings: ExtractSettings, as_json: bool) -> None:
    from mtdp_runtime.cohort import as_json as to_json
    from mtdp_runtime.cohort import plan_slides

    failures = 0
    for outcome, plan in plan_slides(requests, bundle.manifest.tile_px, settings):
        failures += outcome.status == "failed"
        if as_json:
            print(json.dumps(to_json(outcome)), flush=True)
        elif plan is None:
            _say(outcome, "", as_json)
        else:
            info = plan.info
            print(
                f"{printable(info.path.name)}: {len(plan.kept)} tiles of {plan.grid.tile_px} px; "
                f"mpp {info.mpp:.6g} ({printable(info.mpp_source)}) -> {settings.mpp:g}, level {plan.level}, "
                f"x{plan.grid.scale:.4f}; {plan.tissue.area_mm2:.2f} mm² of tissue"
            )
    if failures:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of `mtdp-extract`."""
    run_app(app)
