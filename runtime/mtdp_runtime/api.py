"""The Python side of `mtdp-extract`: one call for a cohort. `mtdp_runtime` itself offers it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from mtdp_runtime.backends import load
from mtdp_runtime.bundle import Bundle, default_bundle_path, load_bundle
from mtdp_runtime.cohort.attempt import Listeners, Run
from mtdp_runtime.cohort.local import extract_slides
from mtdp_runtime.cohort.preflight import check_masks
from mtdp_runtime.cohort.requests import list_slides
from mtdp_runtime.cohort.staging import Staging
from mtdp_runtime.errors import UsageError
from mtdp_runtime.extraction.models import checked, folders, load_models
from mtdp_runtime.extraction.outcome import Outcome
from mtdp_runtime.files import writable_folder
from mtdp_runtime.formats import check_formats
from mtdp_runtime.machine import usable_cores
from mtdp_runtime.settings import ExtractSettings
from mtdp_runtime.slide.scale import is_scale
from mtdp_runtime.tiling.plan import Plan

OnProgress = Callable[[Path, int, int], None]  # the slide, its tiles that are done, all of its tiles

_ON_BAD_TILE = ("nan", "drop", "fail")
_FEATURES_DTYPES = ("float32", "float16")


def extract(
    slides: Path | str | Sequence[Path | str],
    out: Path | str = "features",
    *,
    model: Path | str | Sequence[Path | str] | None = None,
    mpp: float | None = None,
    stride_px: int | None = None,
    min_tissue: float = 0.25,
    slide_mpp: float | None = None,
    mask: Path | str | None = None,
    heads: bool = False,
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
        slides: slides, folders of slides, or CSV manifests with the columns `slide[,mpp][,mask][,name]`.
        out: folder for `<slide>.h5`: `features` float32[N, D], `coords` int64[N, 2] (level-0 x, y), `status` uint8[N].
        model: bundle folders; the packaged model where None. Several share one reading of each tile, and their files
            go to `out/<model name>`.
        mpp: micrometres a pixel of the tiles; the model's own where None.
        stride_px: pixels between tiles, at that scale; the tile size where None.
        min_tissue: part of a tile's area that must be tissue, 0 to 1; 0 takes every tile.
        slide_mpp: micrometres a level-0 pixel covers, where the slides do not say it or say it wrongly.
        mask: where the tissue of one slide is: GeoJSON, or an image whose non-zero pixels are tissue.
        heads: also store the model's task probabilities, `probabilities_<task>` float32[N, C].
        formats: what to derive from each file: pt, npy, csv, geojson, zarr.
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
        report: also write `out/report/<slide>.html`.
        features_dtype: float32 or float16, of the features in the file; a feature beyond 65504 fails its slide then.
        on_progress: called as `on_progress(slide, done, tiles)`, from a thread of the run, after each batch.

    Raises:
        UsageError: the arguments are wrong, or a mask is another slide's; said before any work.
        BundleError, BackendError: the model cannot be trusted, or not be run here.
    """
    bundles = [load_bundle(path) for path in _listed(model)] or [load_bundle(default_bundle_path())]
    derived = check_formats(formats)
    requests = list_slides([Path(path) for path in _listed(slides)], slide_mpp, _path(mask), _warn)
    settings = shared_settings(bundles, mpp, stride_px, min_tissue, on_bad_tile, heads, features_dtype)
    folder, cores = Path(out), threads or usable_cores()
    folders(bundles, folder)
    check_masks(requests)
    writable_folder(folder)
    with ExitStack() as loaded:
        models = loaded.enter_context(
            load_models(bundles, lambda one, size: load(backend, one, precision, size, cores)[0], batch)
        )
        run = Run(
            folder,
            loaded.enter_context(checked(models, check, cores)),
            settings,
            cores,
            _listeners(on_progress),
            overwrite=overwrite,
            report=report,
            retry_failed=retry_failed,
            formats=derived,
            staging=None if stage is None else loaded.enter_context(Staging(Path(stage), _warn)),
        )
        return list(extract_slides(requests, run))


def _listeners(on_progress: OnProgress | None) -> Listeners:
    """Add up what the pipeline reports batch by batch."""
    if on_progress is None:
        return Listeners(lambda plan, done: None, lambda tiles: None)
    slide, done, total = Path(), 0, 0

    def begin(plan: Plan, already: int) -> None:
        nonlocal slide, done, total
        slide, done, total = plan.info.path, already, len(plan.kept)
        on_progress(slide, done, total)

    def advance(tiles: int) -> None:
        nonlocal done
        done += tiles
        on_progress(slide, done, total)

    return Listeners(begin, advance)


def _path(given: Path | str | None) -> Path | None:
    return None if given is None else Path(given)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def shared_settings(
    bundles: Sequence[Bundle],
    mpp: float | None,
    stride_px: int | None,
    min_tissue: float,
    on_bad_tile: str,
    heads: bool,
    features_dtype: str = "float32",
) -> ExtractSettings:
    """Return the settings for models that share one reading.

    Raises:
        UsageError: they would see different tiles, one has no heads to store, or a value is unknown.
    """
    if on_bad_tile not in _ON_BAD_TILE:
        raise UsageError(f"--on-bad-tile {on_bad_tile!r}: unknown", hint=f"One of {', '.join(_ON_BAD_TILE)}.")
    if features_dtype not in _FEATURES_DTYPES:
        raise UsageError(f"--features-dtype {features_dtype!r}: unknown", hint=f"One of {', '.join(_FEATURES_DTYPES)}.")
    if mpp is not None and not is_scale(mpp):
        raise UsageError(f"--mpp {mpp}: not a scale", hint="Micrometres per pixel, for example --mpp 0.5.")
    if stride_px is not None and stride_px < 1:
        raise UsageError(f"--stride-px {stride_px}: must be at least 1", hint="Leave it out to lay tiles side by side.")
    if not 0 <= min_tissue <= 1:
        raise UsageError(f"--min-tissue {min_tissue}: not a part", hint="From 0 (every tile) to 1 (all of it tissue).")
    tiles = {}
    for bundle in bundles:
        manifest = bundle.manifest
        if heads and not manifest.heads:
            raise UsageError(
                f"--heads: {manifest.name} has none", hint="Export the model without --no-heads, or leave it out."
            )
        tiles[manifest.name] = (manifest.tile_px, mpp if mpp is not None else manifest.mpp)
    if len(set(tiles.values())) > 1:
        wants = "; ".join(f"{name} {tile_px} px at {scale:g} µm/px" for name, (tile_px, scale) in tiles.items())
        raise UsageError(
            f"models that share one reading must see the same tiles: {wants}",
            hint="Run one command a model, or give --mpp where it is the scale alone that differs.",
        )
    tile_px, scale = next(iter(tiles.values()))
    return ExtractSettings(
        mpp=scale,
        stride_px=stride_px if stride_px is not None else tile_px,
        min_tissue=min_tissue,
        on_bad_tile=on_bad_tile,  # type: ignore[arg-type]  # checked above
        heads=heads,
        features_dtype=features_dtype,  # type: ignore[arg-type]  # checked above
    )


def _listed(given: Path | str | Sequence[Path | str] | None) -> list[Path | str]:
    if given is None:
        return []
    return [given] if isinstance(given, Path | str) else list(given)
