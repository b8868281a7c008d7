"""From a network to a bundle on disk: whole, proven, or not at all."""

from __future__ import annotations

import copy
import math
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray

import mtdp
from mtdp_export.card import model_card
from mtdp_export.engines import EngineSettings, build_engines
from mtdp_export.errors import ExportError, ExportUsageError
from mtdp_export.golden import calibration_tiles, save_golden, synthetic_tiles
from mtdp_export.graph import Deployed, WeightsStorage, export_graph, reference_outputs, round_weights_to_fp16
from mtdp_export.onnx_source import OnnxSource, original_outputs, wrap_onnx
from mtdp_export.parity import Comparison, compare, require
from mtdp_export.schema import check_schema
from mtdp_export.source import Source, weights_digest
from mtdp_runtime.backends import Backend, choose
from mtdp_runtime.bundle import (
    MANIFEST_NAME,
    Bundle,
    FileRef,
    Head,
    Manifest,
    Parity,
    Variant,
    Weights,
    file_ref,
    load_bundle,
    write_manifest,
)
from mtdp_runtime.extraction import writable_folder

_REFERENCE: Final = "onnxruntime"
_MODEL_FILE: Final = "model.fp32.onnx"
_GOLDEN_FILE: Final = "golden.npz"
_OF_A_BUNDLE: Final = re.compile(r"bundle\.json|card\.md|golden\.npz|model\.\w+\.onnx|engines")


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """How a bundle is made."""

    name: str
    mpp: float
    weights_storage: WeightsStorage = "fp32"
    calibration: Path | None = None  # a slide or a folder of images; synthetic tiles where None
    licence: str = ""  # overrides what the source says
    overwrite: bool = False
    engines: EngineSettings = field(default_factory=EngineSettings)


def write_bundle(source: Source | OnnxSource, out: Path, settings: ExportSettings) -> tuple[Bundle, Comparison]:
    """Export a network and prove it: the graph, run by ONNX Runtime, must repeat the reference.

    The reference is torch; for a model that was brought as an ONNX file it is that file, run as it came.

    Raises:
        ExportUsageError: the target exists or cannot be written, or the options are wrong.
        BackendUnavailable: ONNX Runtime, which proves it, is not installed.
        ParityFailure: the graph computes something else; nothing was written.
        BackendError: an engine cannot be built; nothing was written.
        ExportError: the disk is full, or torch cannot export this network.
    """
    out = out.absolute()
    _check_target(out, settings.overwrite)
    reference, _ = choose(_REFERENCE)
    settings.engines.check()
    if not 0 < settings.mpp < math.inf:
        raise ExportUsageError(f"--mpp {settings.mpp}: not a scale", "micrometres per pixel, for example 0.5")
    writable_folder(out.parent)
    tiles = golden_tiles(settings, source.preprocessing.image_px)
    graph, expected, digest = _graph_and_reference(source, settings, tiles)
    scratch = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        scratch.mkdir(parents=True)
        (scratch / _MODEL_FILE).write_bytes(graph.SerializeToString(deterministic=True))
        save_golden(scratch / _GOLDEN_FILE, tiles, expected)
        manifest = _manifest(source, settings, digest, expected["features"].shape[1], scratch)
        comparison = require(_prove(reference, scratch, manifest, tiles, expected))
        proven = _manifest(source, settings, digest, manifest.features_dim, scratch, comparison.parity)
        engines = build_engines(scratch, proven, settings.engines, lambda note: print(f"note: {note}", file=sys.stderr))
        proven = replace(proven, engines=engines)
        write_manifest(scratch, proven)
        check_schema(scratch)
        (scratch / "card.md").write_text(model_card(proven, source.checkpoint), encoding="utf-8")
        _replace(out, scratch)
    except OSError as error:
        raise ExportError(
            f"{out}: cannot be written: {error.strerror}", "choose another --out, or free space"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return load_bundle(out), comparison


def _graph_and_reference(
    source: Source | OnnxSource, settings: ExportSettings, tiles: NDArray[np.uint8]
) -> tuple[onnx.ModelProto, dict[str, NDArray[np.float32]], str]:
    """Return the fp32 graph, what the reference computes on the tiles, and the digest of the weights."""
    metadata = {"name": settings.name, "arch": source.arch, "mtdp_version": mtdp.__version__}
    if isinstance(source, OnnxSource):
        metadata["weights_sha256"] = source.digest
        return wrap_onnx(source, metadata), original_outputs(source, tiles), source.digest
    network = source.network
    if settings.weights_storage == "fp16":
        network = copy.deepcopy(network)  # the caller's stays as it is
        round_weights_to_fp16(network)
    model = Deployed(network, source.preprocessing).eval()
    metadata["weights_sha256"] = weights_digest(network)
    graph = export_graph(model, metadata, settings.weights_storage)
    return graph, reference_outputs(model, tiles), metadata["weights_sha256"]


def golden_tiles(settings: ExportSettings, tile_px: int) -> NDArray[np.uint8]:
    """Return uint8[N, tile_px, tile_px, 3]: what the bundle proves itself on."""
    if settings.calibration is None:
        return synthetic_tiles(tile_px)
    if not settings.calibration.exists():
        raise ExportUsageError(f"--calibration {settings.calibration}: no such file or folder", "check the path")
    return calibration_tiles(settings.calibration, tile_px, settings.mpp)


def _prove(
    reference: type[Backend],
    folder: Path,
    manifest: Manifest,
    tiles: NDArray[np.uint8],
    expected: Mapping[str, NDArray[np.float32]],
) -> Comparison:
    write_manifest(folder, manifest)
    with reference.load(load_bundle(folder), "fp32", min(8, len(tiles)), len(os.sched_getaffinity(0))) as backend:
        return compare(backend, tiles, expected)


def _manifest(
    source: Source | OnnxSource,
    settings: ExportSettings,
    digest: str,
    features_dim: int,
    folder: Path,
    parity: Parity | None = None,
) -> Manifest:
    unproven = Parity(_REFERENCE, 1, 0.0, 0.0, 0.0)
    model: FileRef = file_ref(folder, _MODEL_FILE)
    return Manifest(
        name=settings.name,
        arch=source.arch,
        mtdp_version=mtdp.__version__,
        tile_px=source.preprocessing.image_px,
        mpp=settings.mpp,
        mean=source.preprocessing.mean,
        std=source.preprocessing.std,
        features_dim=features_dim,
        heads=tuple(Head(name, classes) for name, classes in source.class_names.items()),
        weights=Weights(digest, source.origin, settings.licence or source.licence),
        variants=(Variant("fp32", model, parity or unproven),),
        golden=file_ref(folder, _GOLDEN_FILE),
        reference="onnxruntime" if isinstance(source, OnnxSource) else "torch",
        interpolation=source.preprocessing.interpolation,
    )


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise ExportUsageError(f"{out}: exists already", "choose another --out, or replace it with --overwrite")
    hint = "choose another --out"
    if out.is_symlink() or not out.is_dir():
        raise ExportUsageError(f"{out}: exists and is no bundle; it is not replaced", hint)
    names = sorted(entry.name for entry in out.iterdir())
    foreign = [name for name in names if not _OF_A_BUNDLE.fullmatch(name)]
    if names and (foreign or MANIFEST_NAME not in names):
        why = f"{foreign[0]} is in it" if foreign else f"it has no {MANIFEST_NAME}"
        raise ExportUsageError(f"{out}: exists and is no bundle; it is not replaced ({why})", hint)


def _replace(out: Path, scratch: Path) -> None:
    """Move a finished bundle to its name; what stood there goes only once the new one is in its place."""
    if not out.exists():
        scratch.rename(out)
        return
    old = scratch.with_suffix(".old")
    out.rename(old)
    try:
        scratch.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old)
