"""The Python side of `mtdp-extract`: one call for a cohort. `mtdp_runtime` itself offers it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from mtdp_runtime.cohort.folder_search import PassedOver
from mtdp_runtime.cohort.job import Job, load_bundles, scales_of, shared_settings
from mtdp_runtime.cohort.requests import list_slides
from mtdp_runtime.cohort.run import look_first, run_job
from mtdp_runtime.errors import ListenerFailed, UsageError
from mtdp_runtime.extraction.extract import SILENT, Listeners
from mtdp_runtime.extraction.outcome import Outcome
from mtdp_runtime.files import working_folder
from mtdp_runtime.machine import usable_cores
from mtdp_runtime.store.run_log import RunMark
from mtdp_runtime.urls import path_or_url

OnProgress = Callable[[Path, int, int], None]  # the slide, its tiles that are done, all of its tiles

_PACKAGE: Final = Path(__file__).parent


def extract(
    slides: Path | str | Sequence[Path | str],
    out: Path | str = "features",
    *,
    model: Path | str | Sequence[Path | str] | None = None,
    mpp: float | Sequence[float] | None = None,
    stride_px: int | None = None,
    min_tissue: float | None = None,
    slide_mpp: float | None = None,
    mask: Path | str | None = None,
    coords: Path | str | None = None,
    classes: Path | str | None = None,
    heads: bool = False,
    pool: str = "none",
    tokens: bool = False,
    formats: Sequence[str] = (),
    backend: str = "auto",
    precision: str = "auto",
    batch: int | None = None,
    threads: int | None = None,
    on_bad_tile: str = "nan",
    overwrite: bool = False,
    retry_failed: bool = False,
    check: int = 0,
    stage: Path | str | None = None,
    report: bool = False,
    features_dtype: str = "float32",
    on_progress: OnProgress | None = None,
) -> list[Outcome]:
    """Extract features as `mtdp-extract` does; an argument means what the option of its name means.

    All of it happens in this process, so a decoder that crashes ends the process, which the command survives.

    Files that are complete are left alone, and what was stopped goes on. A slide that fails does not raise: it is an
    outcome with the status `failed`, a message and a hint, and the others go on.

    Args:
        slides: slides, folders of slides, or CSV manifests with the columns
            `slide[,mpp][,mask][,name][,coords][,classes]`.
        out: folder for `<slide>.h5`: `features` float32[N, D], `coords` int64[N, 2] (level-0 x, y), `status` uint8[N].
        model: bundle folders; the packaged model where None. Several share one reading of each tile, and their files
            go to `out/<model name>`.
        mpp: micrometres per pixel of the tiles; the model's own where None. Of several scales each gives files of its
            own, in `out/mpp<scale>`, and `on_progress` counts the tiles of one after the other.
        stride_px: pixels between tiles, at that scale; the tile size where None.
        min_tissue: part of a tile's area that must be tissue, 0 to 1; 0 takes every tile; 0.25 where None.
        slide_mpp: micrometres a level-0 pixel covers, where the slides do not say it or say it wrongly.
        mask: where the tissue of one slide is: GeoJSON, or an image whose non-zero pixels are tissue.
        coords: which tiles of one slide to compute, in their order: CSV, Parquet, or the HDF5 file of TRIDENT, CLAM or
            mtdp; or a folder with a file for each slide. Neither `stride_px` nor `min_tissue` goes with it.
        classes: QuPath's annotations of one slide as GeoJSON, or a folder with a file for each: the class that covers
            most of a tile is stored as `class`.
        heads: also store the model's task probabilities, `probabilities_<task>` float32[N, C].
        pool: none, or mean: also store a vector of the slide, `slide_features` float32[D].
        tokens: also store the tokens of each tile's patches, `tokens` float16[N, T, D]: large, and only of a model that
            was exported with `mtdp-export --tokens`. No `formats` go with it.
        formats: what to derive from each file: pt, npy, csv, geojson, zarr, h5ad, parquet.
        backend: auto, or the name of an engine.
        precision: auto, or one that the engine runs.
        batch: tiles in a batch; where None 64 on a GPU, 4 to 16 on a CPU, by its cores.
        threads: CPU threads; the cores that this process may use where None.
        on_bad_tile: nan, drop or fail.
        overwrite: replace files of other settings and incomplete ones; what is already right is left alone.
        retry_failed: try slides again that failed in an earlier run, though nothing has changed.
        check: recompute this many random tiles of each slide with ONNX Runtime in fp32: `Outcome.agreement`, and a
            `warning` where they are less alike than the precision allows.
        stage: a folder on a local disk, to which each slide is copied while the one before runs.
        report: also write `out/report/<slide>.html`, and `out/report/index.html` for all slides of the folder.
        features_dtype: float32 or float16, of the features in the file; a feature beyond 65504 fails its slide then.
        on_progress: called as `on_progress(slide, done, tiles)`, from a thread of the run, after each batch. What it
            raises ends the run and is raised here; what was computed is kept.

    Raises:
        UsageError: the arguments are wrong, or a mask is another slide's; said before any work.
        BundleError, BackendError: the model cannot be trusted, or not be run here.
    """
    bundles, passed, scales = load_bundles(_listed(model), tokens=tokens), list[PassedOver](), scales_of(mpp)
    named = [_path_of(path) for path in _listed(slides)]
    folder, upload = working_folder(_path_of(out), _path(stage))
    job = Job(
        slides=tuple(
            list_slides(
                named, slide_mpp, _path(mask), _warn, passed_over=passed, coords=_path(coords), classes=_path(classes)
            )
        ),
        passed_over=tuple(passed),
        out=folder,
        upload=upload,
        bundles=bundles,
        settings=shared_settings(
            bundles,
            mpp=scales[0] if scales else None,
            stride_px=stride_px,
            min_tissue=min_tissue,
            coords=_path(coords),
            on_bad_tile=on_bad_tile,
            heads=heads,
            pool=pool,
            features_dtype=features_dtype,
            tokens=tokens,
        ),
        scales=scales if len(scales) > 1 else (),
        threads=threads or usable_cores(),
        backend=backend,
        precision=precision,
        batch=batch,
        check=check,
        formats=tuple(formats),
        report=report,
        overwrite=overwrite,
        retry_failed=retry_failed,
        stage=_path(stage),
    )
    mark = RunMark()
    look_first(job, say=_warn, mark=mark)
    try:
        return list(run_job(job, listeners=lambda number: _listeners(on_progress), say=_warn, mark=mark))
    except ListenerFailed as error:
        raise error.__cause__ or error from None


def _listeners(on_progress: OnProgress | None) -> Listeners:
    """Add up what the pipeline reports batch by batch."""
    if on_progress is None:
        return SILENT
    slide, done, total = Path(), 0, 0

    def on_slide(path: Path) -> None:
        nonlocal slide
        slide = path

    def begin(tiles: int, already: int) -> None:
        nonlocal done, total
        done, total = already, tiles
        on_progress(slide, done, total)

    def advance(tiles: int) -> None:
        nonlocal done
        done += tiles
        on_progress(slide, done, total)

    return Listeners(begin, advance, on_slide=on_slide)


def _path(given: Path | str | None) -> Path | None:
    return None if given is None else _path_of(given)


def _path_of(given: Path | str) -> Path:
    if given == "":
        raise UsageError("a path is empty", hint='A dot, ".", names the current folder.')
    return path_or_url(given)


def _warn(text: str) -> None:
    """Warn at the caller's line: the first that is not of this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and Path(frame.f_code.co_filename).is_relative_to(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def _listed(given: Path | str | Sequence[Path | str] | None) -> list[Path | str]:
    if given is None:
        return []
    return [given] if isinstance(given, Path | str) else list(given)
