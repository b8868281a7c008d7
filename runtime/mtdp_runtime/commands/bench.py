"""mtdp-bench: tiles per second of each stage alone and of the whole way, and what the ceiling is."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtdp_runtime.commands import bench_output, exit_codes, options
from mtdp_runtime.commands.app import GroupedCommand, Quiet, Verbose, Version, new_app
from mtdp_runtime.commands.console import detail, result, result_json, run_app
from mtdp_runtime.errors import OutputUnwritable, UsageError
from mtdp_runtime.machine import usable_cores
from mtdp_runtime.urls import refuse_url

if TYPE_CHECKING:
    from mtdp_runtime.backends import Backend
    from mtdp_runtime.bundle import Bundle
    from mtdp_runtime.settings import ExtractSettings
    from mtdp_runtime.slide import Slide
    from mtdp_runtime.tiling.plan import Plan

_FROM_SHARED = "reading and inferring on the same cores"
_FROM_APART = "the slower of reading on the cores and inferring on the GPU"

app = new_app()


class What(StrEnum):
    """What is measured: a stage alone, or the whole way with its stages beside it; or two recorded runs."""

    READ = "read"
    INFER = "infer"
    EXTRACT = "extract"
    COMPARE = "compare"


@app.command(cls=GroupedCommand, epilog=exit_codes.HELP)
def bench(
    what: Annotated[
        What,
        typer.Argument(
            metavar="read|infer|extract|compare",
            help="read: tiles from the slide; infer: the model; extract: all, and both alone; "
            "compare: two recorded runs.",
        ),
    ],
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="SLIDE | A.json B.json",
            help="A slide; a synthetic one if left out. For compare, two files that --json wrote.",
        ),
    ] = None,
    *,
    model: options.Model = None,
    backend: options.EngineName = "auto",
    precision: options.Precision = "auto",
    batch: options.BatchSize = "auto",
    threads: options.Threads = "auto",
    slide_mpp: options.SlideMpp = None,
    repeats: Annotated[
        int,
        typer.Option(
            help="Each figure is the median of this many runs.", min=1, metavar="N", rich_help_panel=options.MEASURE
        ),
    ] = 3,
    cold: Annotated[
        bool,
        typer.Option(
            "--cold",
            help="Ask the system to forget the slide's pages before each run (Linux).",
            rich_help_panel=options.MEASURE,
        ),
    ] = False,
    as_json: options.OneJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    version: Version = False,
) -> None:
    """Measure tiles per second on this machine. Stages are measured in turn, so that drift hits all of them alike."""
    named = list(paths or [])
    if what is What.COMPARE:
        _compare(named, as_json)
        return
    from mtdp_runtime.bundle import default_bundle_path
    from mtdp_runtime.bundle.hub import bundle_of
    from mtdp_runtime.commands.demo_slide import write_demo_slide
    from mtdp_runtime.settings import ExtractSettings
    from mtdp_runtime.slide.open import open_slide

    if len(named) > 1:
        raise UsageError(f"{len(named)} slides, one is measured", hint=f"mtdp-bench {what} {named[0]}")
    bundle = bundle_of(model if model is not None else default_bundle_path())
    settings = ExtractSettings(mpp=bundle.manifest.mpp, stride_px=bundle.manifest.tile_px)
    batch_size = options.count_or_auto("--batch", batch)
    cores = options.count_or_auto("--threads", threads) or usable_cores()
    with tempfile.TemporaryDirectory(prefix="mtdp-bench-") as folder:
        path = named[0] if named else Path(folder) / "demo-slide.tiff"
        refuse_url(path)
        if not named:
            write_demo_slide(path)
        with open_slide(path, slide_mpp, "--slide-mpp") as opened:
            rates = measure(
                opened,
                bundle,
                settings,
                what,
                backend=backend,
                precision=precision,
                batch=batch_size,
                threads=cores,
                repeats=repeats,
                folder=Path(folder),
                cold=cold,
            )
    result_json(rates, indent=1) if as_json else bench_output.show(rates)


def _compare(paths: list[Path], as_json: bool) -> None:
    """Say how two recorded runs stand to each other."""
    if len(paths) != 2:
        raise UsageError(f"compare takes two files, not {len(paths)}", hint="mtdp-bench compare A.json B.json")
    found = bench_output.comparison(paths[0], paths[1])
    if as_json:
        result_json(found, indent=1)
        return
    for line in bench_output.comparison_lines(found):
        result(line)


def measure(
    slide: Slide,
    bundle: Bundle,
    settings: ExtractSettings,
    what: What,
    *,
    backend: str,
    precision: str,
    batch: int | None,
    threads: int,
    repeats: int,
    folder: Path,
    cold: bool = False,
) -> dict[str, Any]:
    """Return the median tiles/s of each stage asked for, with what they were measured on."""
    from mtdp_runtime.backends import load
    from mtdp_runtime.backends.speed import infer_rate
    from mtdp_runtime.tiling.plan import make_plan

    plan = make_plan(slide, bundle.manifest.tile_px, settings)
    if not len(plan.kept):
        raise UsageError(
            f"{slide.info.path}: no tile of it has enough tissue: nothing to measure",
            hint="Name a slide with tissue, or none for a synthetic one.",
        )
    found: dict[str, Any] = {
        "slide": slide.info.path.name,
        "reader": slide.info.reader,
        "tiles": len(plan.kept),
        "scale": plan.grid.scale,
        "model": bundle.manifest.name,
        "threads": threads,
        "repeats": repeats,
        "file_cache": "cold" if cold else "warm",
    }
    path = slide.info.path
    prepare: Callable[[], None] = (lambda: _forget(path)) if cold else (lambda: None)
    stages: dict[str, Callable[[], float]] = {}
    if what in (What.READ, What.EXTRACT):
        stages["read"] = lambda: read_rate(slide, plan, threads)
    if what is What.READ:
        return found | _medians(stages, repeats, prepare)
    engine, reason = load(backend, bundle, precision, batch, threads)
    with engine:
        for why in filter(None, (reason, engine.note)):
            detail(f"engine {engine.name}: {why}")
        if backend == "auto":
            found |= _what_auto_takes(bundle, engine, threads)
        found |= {"engine": engine.name, "precision": engine.precision, "batch": engine.batch}
        stages["infer"] = lambda: infer_rate(engine, len(plan.kept), bundle.manifest.tile_px)
        last: dict[str, Any] = {}
        if what is What.EXTRACT:
            stages["extract"] = lambda: _extract_rate(slide, plan, bundle, engine, settings, threads, folder, last)
        found |= _medians(stages, repeats, prepare)
    if what is What.EXTRACT:
        ceiling = _ceiling(found["read_tiles_per_s"], found["infer_tiles_per_s"], engine.on_cores)
        found |= {
            "ceiling_tiles_per_s": ceiling,
            "ceiling_from": _FROM_SHARED if engine.on_cores else _FROM_APART,
            "extract_of_ceiling": found["extract_tiles_per_s"] / ceiling,
            "extract_of_infer": found["extract_tiles_per_s"] / found["infer_tiles_per_s"],
            **last,
        }
    return found


def _what_auto_takes(bundle: Bundle, engine: Backend, threads: int) -> dict[str, Any]:
    """Find out which engine is the faster on these cores in fp32, and keep it for `auto`: once for a model."""
    from mtdp_runtime.backends import preferred

    if not (engine.name.startswith(preferred.FIRST) and engine.precision == "fp32"):
        return {}
    taken, why = preferred.decide(bundle, engine, threads)
    return {"auto_takes": taken, "auto_reason": why} if taken else {}


def _ceiling(read_per_s: float, infer_per_s: float, on_cores: bool) -> float:
    """Return the tiles/s that no overlap of the two stages can exceed; `on_cores`: both share the cores.

    >>> _ceiling(300.0, 100.0, on_cores=True), _ceiling(300.0, 100.0, on_cores=False)
    (75.0, 100.0)
    """
    if on_cores:  # a tile costs what reading and inferring cost together
        return 1 / (1 / read_per_s + 1 / infer_per_s)
    return min(read_per_s, infer_per_s)


def _forget(path: Path) -> None:
    """Drop the file's clean pages from the system's cache: advice, which Linux follows for pages that nobody maps."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _medians(stages: dict[str, Callable[[], float]], repeats: int, prepare: Callable[[], None]) -> dict[str, Any]:
    runs: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(repeats):
        for name, stage in stages.items():
            prepare()
            runs[name].append(stage())
    rates: dict[str, Any] = {f"{name}_tiles_per_s": statistics.median(rates) for name, rates in runs.items()}
    return rates | {f"{name}_runs": [round(rate, 2) for rate in rates] for name, rates in runs.items()}


def read_rate(slide: Slide, plan: Plan, threads: int) -> float:
    """Read every tile once, nothing else, from a slide opened anew so that no decoded tile is left in its cache."""
    import numpy as np

    from mtdp_runtime.pipeline.buffers import RUN_TILES
    from mtdp_runtime.pipeline.read import read_tile
    from mtdp_runtime.slide.open import open_slide

    coords = plan.coords
    buffers = np.empty((threads, plan.grid.tile_px, plan.grid.tile_px, 3), np.uint8)
    with open_slide(slide.info.path, slide.info.mpp, slide.info.mpp_source) as fresh:

        def work(thread: int) -> None:
            for begin in range(thread * RUN_TILES, len(coords), threads * RUN_TILES):
                for x0, y0 in coords[begin : begin + RUN_TILES].tolist():
                    read_tile(fresh, buffers[thread], x0, y0, plan.grid.scale, plan.source)

        start = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))
    return len(coords) / (time.perf_counter() - start)


def _extract_rate(
    slide: Slide,
    plan: Plan,
    bundle: Bundle,
    engine: Backend,
    settings: ExtractSettings,
    threads: int,
    folder: Path,
    last: dict[str, Any],
) -> float:
    """Run the pipeline, the file included; the tissue search is left out, as it is no stage of it."""
    from mtdp_runtime.extraction.extract import extract_slide
    from mtdp_runtime.extraction.models import Model, Target
    from mtdp_runtime.slide.open import open_slide

    path = folder / "bench.h5"
    path.unlink(missing_ok=True)  # a file that is there would be left alone
    with open_slide(slide.info.path, slide.info.mpp, slide.info.mpp_source) as fresh:
        try:
            outcome, _ = extract_slide(fresh, [Target(path, Model(bundle, engine))], settings, readers=threads)
        except OutputUnwritable as error:
            raise OutputUnwritable(str(error), hint="Free space, or set TMPDIR to a folder that has more.") from error
    assert outcome.times is not None
    last.update(bottleneck=outcome.times.bottleneck, device_idle=round(outcome.times.device_idle, 3))
    return outcome.times.tiles_per_s


def main() -> None:
    """Entry point of `mtdp-bench`."""
    from mtdp_runtime.cohort.watchdog import supervise

    supervise(0, lambda line: None)  # what hangs in native code hears no signal: another process has to end it
    run_app(app, "mtdp-bench")
