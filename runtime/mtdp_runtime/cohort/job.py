"""All that decides a run, as plain values: what the command or the caller asked for, checked before any work.

A job can be compared, pickled, and carried out elsewhere: it holds neither an engine nor an open file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast, get_args

from mtdp_runtime.bundle import Bundle, default_bundle_path
from mtdp_runtime.bundle.hub import bundle_of
from mtdp_runtime.cohort.folder_search import PassedOver
from mtdp_runtime.cohort.requests import SlideRequest
from mtdp_runtime.errors import UsageError
from mtdp_runtime.extraction.models import folders, scale_folder
from mtdp_runtime.formats import check_formats, check_slide_names
from mtdp_runtime.machine import usable_cores
from mtdp_runtime.settings import MIN_TISSUE, ExtractSettings, FeaturesDtype, OnBadTile, Pool
from mtdp_runtime.slide.scale import is_scale
from mtdp_runtime.urls import SlideUrl


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Slides, models and settings of a run.

    Raises:
        UsageError: two models have one name, a format is unknown, two slides' files of it would have one name, tiles
            from a list are asked for at several scales, or patch tokens in a format that has no place for them.
    """

    slides: tuple[SlideRequest, ...]
    out: Path
    upload: SlideUrl | None = None  # where the files of `out` go, which holds them only until then
    bundles: tuple[Bundle, ...]  # of one tile size: each tile is read once for all
    settings: ExtractSettings  # of several scales those of the first
    scales: tuple[float, ...] = ()  # µm per pixel, where there are several; each gives a file of its own
    threads: int = field(default_factory=usable_cores)  # that read and compute, of all workers of a machine
    workers: int = 1  # that work on slides at once
    share: int = 0  # threads of each worker, where it is not its part of `threads`
    devices: tuple[int, ...] = ()  # GPUs, one for each worker
    scheduler: str = "local"  # or ray: the workers are actors of a cluster
    ray_address: str | None = None  # of the cluster; one is started here where None
    stall_limit_s: float = 0.0  # without anything read or computed, after which a worker of several is ended; 0: never
    backend: str = "auto"
    precision: str = "auto"
    batch: int | None = None  # tiles in a batch; the engine's own number where None
    check: int = 0  # tiles of each slide to recompute
    formats: tuple[str, ...] = ()  # to derive from each file
    report: bool = True
    overwrite: bool = False  # replace what differs or is incomplete
    retry_failed: bool = False
    stage: Path | None = None  # a folder on a local disk, for copies
    passed_over: tuple[PassedOver, ...] = ()  # what lay in the folders and is no work

    def __post_init__(self) -> None:
        folders(self.bundles, self.out)
        self._check_scales()
        object.__setattr__(self, "formats", check_formats(self.formats))
        check_slide_names([request.name for request in self.slides], self.formats)
        if self.settings.tokens and self.formats:
            raise UsageError(
                f"--tokens and --format {self.formats[0]}: only the HDF5 file has a place for patch tokens",
                hint="Leave out --format; for that format run the same without --tokens, into another --out.",
            )

    @property
    def threads_each(self) -> int:
        """The threads of one worker. An automatic batch follows from `threads`: it is the same for any workers."""
        return self.share or max(1, self.threads // self.workers)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is made from each feature file."""
        return (*self.formats, *(("report",) if self.report else ()))

    @property
    def passes(self) -> list[Pass]:
        """What is done with each slide, one after the other: each scale with the files of all models."""
        if not self.scales:
            return [Pass(self.settings, folders(self.bundles, self.out))]
        return [
            Pass(replace(self.settings, mpp=mpp), folders(self.bundles, self.out / scale_folder(mpp)))
            for mpp in self.scales
        ]

    @property
    def folders(self) -> list[Path]:
        """Where files go, of all scales and models."""
        return [folder for one in self.passes for folder in one.folders]

    def _check_scales(self) -> None:
        listed = next((request.coords for request in self.slides if request.coords is not None), None)
        if self.scales and listed is not None:
            raise UsageError(
                f"several --mpp and --coords {listed}: a list says where the tiles of one scale begin",
                hint="Run one command for each scale, each with a list of its own.",
            )


@dataclass(frozen=True, slots=True)
class Pass:
    """A scale: its settings, and the folder of each model's files, in the order of the bundles."""

    settings: ExtractSettings
    folders: Sequence[Path]


def scales_of(mpp: float | Sequence[float] | None) -> tuple[float, ...]:
    """Return the scales that were asked for, in µm per pixel, in their order; none where the model's own is meant.

    Raises:
        UsageError: one is no scale, or one is there twice.
    """
    scales = () if mpp is None else (mpp,) if isinstance(mpp, int | float) else tuple(mpp)
    for number, scale in enumerate(scales):
        _check_scale(scale)
        if scale_folder(scale) in map(scale_folder, scales[:number]):
            raise UsageError(f"--mpp {scale:g}: the same scale twice", hint="Name each scale once.")
    return scales


def load_bundles(paths: Sequence[Path | str], trust_engines: bool = False, tokens: bool = False) -> tuple[Bundle, ...]:
    """Return the bundles of a job, of folders and of the hub; the packaged one where none is named.

    With `tokens`, engines are to give the patch tokens, too.

    Raises:
        BundleError: one cannot be trusted or understood.
    """
    found = (bundle_of(path, trust_engines) for path in paths or [default_bundle_path()])
    return tuple(replace(bundle, tokens=tokens) for bundle in found)


def shared_settings(
    bundles: Sequence[Bundle],
    *,
    mpp: float | None = None,
    stride_px: int | None = None,
    min_tissue: float | None = None,
    coords: Path | None = None,
    on_bad_tile: str = "nan",
    heads: bool = False,
    pool: str = "none",
    features_dtype: str = "float32",
    tokens: bool = False,
) -> ExtractSettings:
    """Return the settings for models that share one reading; of tiles from a list, `coords`, no grid is laid.

    Raises:
        UsageError: they would see different tiles, one has no heads or no patch tokens to store, or a value is unknown.
    """
    if coords is not None and (stride_px is not None or min_tissue is not None):
        which = "--stride-px" if stride_px is not None else "--min-tissue"
        raise UsageError(
            f"--coords {coords} and {which}: the list says which tiles are computed, and where",
            hint=f"Leave out {which}: every tile of the list is computed.",
        )
    min_tissue = MIN_TISSUE if min_tissue is None else min_tissue
    _check_numbers(mpp, stride_px, min_tissue)
    tiles = {}
    for bundle in bundles:
        manifest = bundle.manifest
        if heads and not manifest.heads:
            raise UsageError(
                f"--heads: {manifest.name} has none",
                hint="Leave it out, or export the model anew: mtdp-export without --no-heads.",
            )
        if tokens and manifest.tokens is None:
            raise UsageError(
                f"--tokens: {manifest.name} gives no patch tokens",
                hint="Leave it out, or export the model anew: mtdp-export --tokens (transformers have them).",
            )
        tiles[manifest.name] = (manifest.tile_px, mpp if mpp is not None else manifest.mpp)
    if len(set(tiles.values())) > 1:
        wants = "; ".join(f"{name} {tile_px} px at {scale:g} µm/px" for name, (tile_px, scale) in tiles.items())
        raise UsageError(
            f"models that share one reading must see the same tiles: {wants}",
            hint="Run one command for each model, or give --mpp where only the scale differs.",
        )
    tile_px, scale = next(iter(tiles.values()))
    return ExtractSettings(
        mpp=scale,
        stride_px=stride_px if stride_px is not None else tile_px,
        min_tissue=min_tissue,
        on_bad_tile=cast(OnBadTile, _one_of("--on-bad-tile", on_bad_tile, get_args(OnBadTile))),
        heads=heads,
        pool=cast(Pool, _one_of("--pool", pool, get_args(Pool))),
        features_dtype=cast(FeaturesDtype, _one_of("--features-dtype", features_dtype, get_args(FeaturesDtype))),
        tokens=tokens,
    )


def _check_numbers(mpp: float | None, stride_px: int | None, min_tissue: float) -> None:
    if mpp is not None:
        _check_scale(mpp)
    if stride_px is not None and stride_px < 1:
        raise UsageError(f"--stride-px {stride_px}: must be at least 1", hint="Leave it out to lay tiles side by side.")
    if not 0 <= min_tissue <= 1:
        raise UsageError(
            f"--min-tissue {min_tissue}: must be from 0 to 1",
            hint="It is the part of a tile's area that must be tissue: 0 takes every tile, 1 only tiles full of it.",
        )


def _check_scale(mpp: float) -> None:
    if not is_scale(mpp):
        raise UsageError(f"--mpp {mpp}: not a scale", hint="Micrometres per pixel, for example --mpp 0.5.")


def _one_of(option: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise UsageError(f"{option} {value!r}: unknown", hint=f"One of {', '.join(known)}.")
    return value
