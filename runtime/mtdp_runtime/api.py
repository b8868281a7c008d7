"""The Python side of `mtdp-extract`: one call for a cohort. `mtdp_runtime` itself offers it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from mtdp_runtime.backends import load
from mtdp_runtime.bundle import Bundle, default_bundle_path, load_bundle
from mtdp_runtime.cohort import Listeners, extract_slides
from mtdp_runtime.cores import usable_cores
from mtdp_runtime.errors import UsageError
from mtdp_runtime.extraction import ExtractSettings, Outcome, writable_folder
from mtdp_runtime.formats import check_formats
from mtdp_runtime.slides import list_slides
from mtdp_runtime.together import folders, load_models

_ON_BAD_TILE = ("nan", "drop", "fail")


def extract(
    slides: Path | str | Sequence[Path | str],
    out: Path | str = "features",
    *,
    model: Path | str | Sequence[Path | str] | None = None,
    mpp: float | None = None,
    stride_px: int | None = None,
    min_tissue: float = 0.25,
    slide_mpp: float | None = None,
    heads: bool = False,
    formats: Sequence[str] = (),
    backend: str = "auto",
    precision: str = "auto",
    batch: int | None = None,
    threads: int | None = None,
    on_bad_tile: str = "nan",
    overwrite: bool = False,
    report: bool = False,
) -> list[Outcome]:
    """Extract features as `mtdp-extract` does, in this process; each argument is the option of that name.

    Files that are complete are left alone, and what was stopped goes on. A slide that fails does not raise: it is an
    outcome with the status `failed`, a message and a hint, and the others go on.

    Args:
        slides: slides, folders of slides, or CSV manifests.
        out: folder for `<slide>.h5`: `features` float32[N, D], `coords` int64[N, 2] (level-0 x, y), `status` uint8[N].
        model: bundle folders; the packaged model where None. Several share one reading of each tile, and their files
            go to `out/<model name>`.
        mpp: micrometres a pixel of the tiles; the model's own where None.
        stride_px: pixels between tiles, at that scale; the tile size where None.
        min_tissue: part of a tile's area that must be tissue.
        slide_mpp: micrometres a level-0 pixel covers, where the slides do not say it or say it wrongly.
        heads: also store the model's task probabilities, `probabilities_<task>` float32[N, C].
        formats: what to derive from each file: pt, npy, csv, geojson, zarr.
        backend: auto, or the name of an engine.
        precision: auto, or one that the engine runs.
        batch: tiles in a batch; where None 16 on a CPU, 64 on a GPU.
        threads: CPU threads; the cores that this process may use where None.
        on_bad_tile: nan, drop or fail.
        overwrite: replace files of other settings.
        report: also write `out/report/<slide>.html`.

    Raises:
        UsageError: the arguments are wrong, said before any work.
        BundleError, BackendError: the model cannot be trusted, or not be run here.
    """
    bundles = [load_bundle(path) for path in _listed(model)] or [load_bundle(default_bundle_path())]
    derived = check_formats(formats)
    requests = list_slides([Path(path) for path in _listed(slides)], slide_mpp)
    settings = shared_settings(bundles, mpp, stride_px, min_tissue, on_bad_tile, heads)
    folder = Path(out)
    folders(bundles, folder)
    writable_folder(folder)
    cores = threads or usable_cores()
    quiet = Listeners(lambda plan: None, lambda tiles: None)
    with ExitStack() as loaded:
        models = load_models(
            bundles, lambda one, size: loaded.enter_context(load(backend, one, precision, size, cores)[0]), batch
        )
        return list(
            extract_slides(requests, folder, models, settings, cores, quiet, overwrite, report, formats=derived)
        )


def shared_settings(
    bundles: Sequence[Bundle],
    mpp: float | None,
    stride_px: int | None,
    min_tissue: float,
    on_bad_tile: str,
    heads: bool,
) -> ExtractSettings:
    """Return the settings for models that share one reading.

    Raises:
        UsageError: they would see different tiles, one has no heads to store, or a value is unknown.
    """
    if on_bad_tile not in _ON_BAD_TILE:
        raise UsageError(f"--on-bad-tile {on_bad_tile!r}: unknown", hint=f"One of {', '.join(_ON_BAD_TILE)}.")
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
    )


def _listed(given: Path | str | Sequence[Path | str] | None) -> list[Path | str]:
    if given is None:
        return []
    return [given] if isinstance(given, Path | str) else list(given)
