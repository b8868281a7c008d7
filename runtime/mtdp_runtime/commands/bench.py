"""mtdp-bench: tiles a second of each stage alone and of the whole way, and what the ceiling is."""

from __future__ import annotations

import json
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

from mtdp_runtime.commands.console import printable, run_app
from mtdp_runtime.commands.options import count_or_auto
from mtdp_runtime.errors import UsageError
from mtdp_runtime.machine import usable_cores

if TYPE_CHECKING:
    from mtdp_runtime.backends import Backend
    from mtdp_runtime.bundle import Bundle
    from mtdp_runtime.settings import ExtractSettings
    from mtdp_runtime.slide import Slide
    from mtdp_runtime.tiling.plan import Plan

_FROM_SHARED = "reading and inferring on the same cores"
_FROM_APART = "the slower of reading on the cores and inferring on the GPU"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class What(StrEnum):
    """What is measured: a stage alone, or the whole way with its stages beside it."""

    READ = "read"
    INFER = "infer"
    EXTRACT = "extract"


@app.command()
def bench(
    what: Annotated[
        What, typer.Argument(help="read: tiles from the slide; infer: the model; extract: all, and both alone.")
    ],
    slide: Annotated[Path | None, typer.Argument(metavar="SLIDE", help="A slide; a synthetic one if left out.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Model bundle; the packaged one if left out.", metavar="BUNDLE")
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, or one of mtdp-doctor's list.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, or one that the backend runs.")] = "auto",
    batch: Annotated[
        str, typer.Option(help="Tiles in a batch. auto: 64 on a GPU, 4 to 16 on a CPU, by its cores.", metavar="N|auto")
    ] = "auto",
    threads: Annotated[
        str, typer.Option(help="CPU threads. auto: the cores that this process may use.", metavar="N|auto")
    ] = "auto",
    slide_mpp: Annotated[
        float | None, typer.Option(help="µm per level-0 pixel, where the slide does not say it.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Each figure is the median of so many runs.", min=1)] = 3,
    cold: Annotated[
        bool, typer.Option("--cold", help="Ask the system to forget the slide's pages before each run (Linux).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Measure tiles a second on this machine. The stages are measured in turn, so that drift hits all of them alike."""
    from mtdp_runtime.bundle import default_bundle_path, load_bundle
    from mtdp_runtime.commands.demo_slide import write_demo_slide
    from mtdp_runtime.settings import ExtractSettings
    from mtdp_runtime.slide.open import open_slide

    bundle = load_bundle(model if model is not None else default_bundle_path())
    settings = ExtractSettings(mpp=bundle.manifest.mpp, stride_px=bundle.manifest.tile_px)
    batch_size = count_or_auto("--batch", batch)
    cores = count_or_auto("--threads", threads) or usable_cores()
    with tempfile.TemporaryDirectory(prefix="mtdp-bench-") as folder:
        path = slide
        if path is None:
            path = Path(folder) / "demo-slide.tiff"
            write_demo_slide(path)
        with open_slide(path, slide_mpp, "--slide-mpp") as opened:
            rates = measure(
                opened, bundle, settings, what, backend, precision, batch_size, cores, repeats, Path(folder), cold
            )
    print(json.dumps(rates, indent=1)) if as_json else _print(rates)


def measure(
    slide: Slide,
    bundle: Bundle,
    settings: ExtractSettings,
    what: What,
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
    result: dict[str, Any] = {
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
        stages["read"] = lambda: _read_rate(slide, plan, threads)
    if what is What.READ:
        return result | _medians(stages, repeats, prepare)
    with load(backend, bundle, precision, batch, threads)[0] as engine:
        result |= {"engine": engine.name, "precision": engine.precision, "batch": engine.batch}
        stages["infer"] = lambda: infer_rate(engine, len(plan.kept), bundle.manifest.tile_px)
        last: dict[str, Any] = {}
        if what is What.EXTRACT:
            stages["extract"] = lambda: _extract_rate(slide, plan, bundle, engine, settings, threads, folder, last)
        result |= _medians(stages, repeats, prepare)
    if what is What.EXTRACT:
        ceiling = _ceiling(result["read_tiles_per_s"], result["infer_tiles_per_s"], result["engine"])
        result |= {
            "ceiling_tiles_per_s": ceiling,
            "ceiling_from": _FROM_SHARED if _on_cores(result["engine"]) else _FROM_APART,
            "extract_of_ceiling": result["extract_tiles_per_s"] / ceiling,
            "extract_of_infer": result["extract_tiles_per_s"] / result["infer_tiles_per_s"],
            **last,
        }
    return result


def _on_cores(engine: str) -> bool:
    """Say whether an engine computes on the cores that read, too."""
    return engine.startswith(("openvino ", "onnxruntime "))  # the GPU ones are called onnxruntime-cuda and so on


def _ceiling(read_per_s: float, infer_per_s: float, engine: str) -> float:
    """Return the tiles/s that no overlap of the two stages can exceed.

    >>> _ceiling(300.0, 100.0, "openvino 2025.0"), _ceiling(300.0, 100.0, "tensorrt 10.9 (H100)")
    (75.0, 100.0)
    """
    if _on_cores(engine):  # a tile costs what reading and inferring cost together
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


def _read_rate(slide: Slide, plan: Plan, threads: int) -> float:
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
                    read_tile(fresh, buffers[thread], x0, y0, plan.grid.scale)

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
    from mtdp_runtime.slide.open import open_slide

    path = folder / "bench.h5"
    path.unlink(missing_ok=True)  # a file that is there would be left alone
    with open_slide(slide.info.path, slide.info.mpp, slide.info.mpp_source) as fresh:
        outcome, _ = extract_slide(fresh, path, bundle, engine, settings, threads)
    assert outcome.times is not None
    last.update(bottleneck=outcome.times.bottleneck, device_idle=round(outcome.times.device_idle, 3))
    return outcome.times.tiles_per_s


def _print(rates: dict[str, Any]) -> None:
    print(
        f"{printable(rates['slide'])}: {rates['tiles']} tiles, scale {rates['scale']:.4f}, {rates['threads']} threads, "
        f"{rates['file_cache']} file cache"
    )
    if "engine" in rates:
        print(
            f"engine {rates['engine']}, {rates['precision']}, batch {rates['batch']}; model {printable(rates['model'])}"
        )
    for stage in ("read", "infer", "extract"):
        if f"{stage}_tiles_per_s" in rates:
            print(f"{stage:<8} {rates[f'{stage}_tiles_per_s']:9.1f} tiles/s   runs {rates[f'{stage}_runs']}")
    if "ceiling_tiles_per_s" in rates:
        print(
            f"ceiling  {rates['ceiling_tiles_per_s']:9.1f} tiles/s, {rates['ceiling_from']}; "
            f"extract is {rates['extract_of_ceiling']:.0%} of it "
            f"and {rates['extract_of_infer']:.0%} of the model alone; bottleneck {rates['bottleneck']}"
        )


def main() -> None:
    """Entry point of `mtdp-bench`."""
    run_app(app)
