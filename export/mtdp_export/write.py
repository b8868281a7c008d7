"""From a network to a bundle on disk: whole, proven, or not at all."""

from __future__ import annotations

import copy
import math
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

import mtdp
from mtdp_export.card import front_matter, model_card
from mtdp_export.engines import EngineSettings, build_engines
from mtdp_export.errors import ExportError, ExportUsageError, ParityFailure
from mtdp_export.golden import calibration_tiles, check_sees, describe_source, save_golden, synthetic_tiles
from mtdp_export.graph import (
    Deployed,
    WeightsStorage,
    autocast_outputs,
    export_graph,
    export_light,
    reference_outputs,
    round_weights_to_fp16,
)
from mtdp_export.int8 import CALIBRATION_TILES, load_probe_task
from mtdp_export.isolated import isolated
from mtdp_export.memory import release
from mtdp_export.model_store import load_light, save_model
from mtdp_export.onnx_source import OnnxSource, original_outputs, wrap_onnx
from mtdp_export.parity import Row, knn_agreement
from mtdp_export.schema import check_schema
from mtdp_export.scratch import scratch_of
from mtdp_export.source import Source, weights_digest
from mtdp_export.stages import Stages
from mtdp_export.tokens import tokens_of
from mtdp_export.variants import Made, Proof, make_variant, model_file, prove
from mtdp_export.verify import require_engine
from mtdp_runtime.bundle import Bundle, file_ref, load_bundle, write_manifest
from mtdp_runtime.bundle.golden import FEATURES, TOKENS
from mtdp_runtime.bundle.manifest import (
    DATA_SUFFIX,
    MANIFEST_NAME,
    PRECISIONS,
    Autocast,
    FileRef,
    Head,
    Manifest,
    Parity,
    Tokens,
    Variant,
    Weights,
)
from mtdp_runtime.bundle.tolerance import MIN_COSINE, cosines, least_cosine_of, least_tokens_cosine, tokens_cosine
from mtdp_runtime.faults import remedy
from mtdp_runtime.files import writable_folder
from mtdp_runtime.printable import printable

_REFERENCE: Final = "onnxruntime"
BASE: Final = "base.onnx"  # the fp32 graph from which every variant is made
_STORED: Final = "stored.onnx"  # the same with its weights in fp16
_LICENCE_FILE: Final = "LICENSE"  # of the weights, where its text lay beside them
_GOLDEN_FILE: Final = "golden.npz"
_OF_A_BUNDLE: Final = re.compile(
    r"bundle\.json|card\.md|README\.md|golden\.npz|LICENSE|model\.\w+\.onnx(\.data)?|engines"
)


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
    precisions: tuple[str, ...] = ("fp32",)  # those that are written, fp32 first where it is one of them
    probe_task: Path | None = None  # for int8: a labelled task whose probe must score as with fp32
    scratch: Path | None = None  # where it is made, on the disk of its place; `scratch_of` where None
    tokens: bool = False  # the graph gives those of the patches, too
    release: bool = False  # the network's memory is given back once it is written; the caller has no use for it then


@dataclass(frozen=True, slots=True)
class ExportReport:
    """How an export went."""

    rows: list[Row]  # each variant on each engine
    refused: list[ExportError]  # a variant that was asked for and not written
    notes: list[str]  # what else was measured

    def to_json(self) -> dict[str, Any]:
        return {
            "parity": [asdict(row) | {"passed": row.passed} for row in self.rows],
            "refused": [str(error) for error in self.refused],
            "notes": self.notes,
        }


def write_bundle(
    source: Source | OnnxSource, out: Path, settings: ExportSettings, stages: Stages | None = None
) -> tuple[Bundle, ExportReport]:
    """Export a network and prove it: each variant, run by each engine here, must repeat the reference.

    The reference is torch; for a model that was brought as an ONNX file it is that file, run as it came.

    Raises:
        ExportUsageError: the target exists or cannot be written, or the options are wrong.
        MtdpError: the task that is to judge int8 cannot be used.
        BackendUnavailable: ONNX Runtime, which proves it, is not installed.
        ParityFailure: the fp32 graph computes something else; nothing was written.
        BackendError: an engine cannot be built; nothing was written.
        ExportError: the disk is full, torch cannot export this network, or an engine crashed.
    """
    stages = stages or Stages()
    out = out.absolute()
    check_settings(out, settings)
    isolated(f"loading {_REFERENCE}", require_engine, _REFERENCE)
    writable_folder(out.parent)
    scratch = settings.scratch or scratch_of(out)
    try:
        scratch.mkdir(parents=True)
        report = _write_files(source, scratch, settings, stages)
        _replace(out, scratch)
    except OSError as error:
        raise ExportError(
            f"{out}: cannot be written: {error.strerror}", f"{remedy(error)}, or choose another --out"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return load_bundle(out), report


def check_settings(out: Path, settings: ExportSettings) -> None:
    """Find what cannot work before anything is loaded or computed.

    Raises:
        ExportUsageError: the target exists, or the options are wrong.
        MtdpError: the task that is to judge int8 cannot be used.
    """
    _check_target(out.absolute(), settings.overwrite)
    _check_precisions(settings)
    settings.engines.check()
    if not 0 < settings.mpp < math.inf:
        raise ExportUsageError(f"--mpp {settings.mpp}: not a scale", "micrometres per pixel, for example 0.5")


def _write_files(source: Source | OnnxSource, scratch: Path, settings: ExportSettings, stages: Stages) -> ExportReport:
    """Write all of a bundle into a folder, proven."""
    tokens = _tokens(source) if settings.tokens else None
    with stages.stage("taking the golden tiles"):
        tiles = golden_tiles(settings, source.pixels.tile_px)
        calibrating = _calibration(settings, tiles) if "int8" in settings.precisions else tiles
    work = scratch / "work"
    work.mkdir()
    with stages.stage("writing the network as ONNX, and computing its reference"):
        reference = _graph_and_reference(source, settings, tiles, work)
        source, expected = reference.source, reference.expected
        save_golden(scratch / _GOLDEN_FILE, tiles, expected)
        if settings.release and isinstance(source, Source):
            release(source.network)
    made, refused = _make_variants(scratch, work, settings, tiles, calibrating, reference, stages)
    shutil.rmtree(work)
    if not made:
        raise refused[0]
    manifest = replace(_manifest(reference, settings, expected[FEATURES].shape, scratch, made), tokens=tokens)
    write_manifest(scratch, manifest)
    with stages.stage("replaying the golden tiles on every engine here"):
        proof = isolated("the parity check", prove, scratch, settings.probe_task)
    refused += proof.refused
    kept = _keep_proven(scratch, made, proof)
    if not kept:
        raise refused[0]
    variants = tuple(
        replace(variant, parity=proof.parities[variant.precision][0], engines=proof.parities[variant.precision][1])
        for variant in manifest.variants
        if variant.precision in proof.parities
    )
    proven = replace(manifest, variants=variants)
    if settings.engines.libraries:
        with stages.stage("building engines"):
            proven = replace(proven, engines=build_engines(scratch, proven, settings.engines, _note))
    write_manifest(scratch, proven)
    check_schema(scratch)
    if source.licence_text:
        (scratch / _LICENCE_FILE).write_text(source.licence_text, encoding="utf-8")
    card = model_card(proven, source.checkpoint, bool(source.licence_text))
    (scratch / "card.md").write_text(card, encoding="utf-8")
    (scratch / "README.md").write_text(f"{front_matter(proven, bool(source.licence_text))}{card}", encoding="utf-8")
    notes = [item.note for item in kept if item.note] + proof.notes
    return ExportReport(proof.rows, refused, notes)


def _make_variants(
    scratch: Path,
    work: Path,
    settings: ExportSettings,
    tiles: NDArray[np.uint8],
    calibrating: NDArray[np.uint8],
    reference: _Reference,
    stages: Stages,
) -> tuple[list[Made], list[ExportError]]:
    """Write a file for each precision from the graph that lies in `work`."""
    made, refused = list[Made](), list[ExportError]()
    for precision in settings.precisions:
        with stages.stage(f"making {precision}"):
            if precision == "fp32":
                stored = work / (_STORED if (work / _STORED).is_file() else BASE)
                save_model(load_light(stored), work, scratch / model_file("fp32"))
                onnx.checker.check_model(str(scratch / model_file("fp32")))
                made.append(Made("fp32"))
                continue
            shown = calibrating if precision == "int8" else tiles
            try:
                one = isolated(
                    f"making {precision}",
                    make_variant,
                    work / BASE,
                    precision,
                    scratch,
                    shown,
                    reference.expected,
                    least_cosine_of(precision, reference.autocast),
                    least_tokens_cosine(precision, reference.autocast),
                )
            except ParityFailure as error:
                refused.append(error)
            else:
                made.append(one)
    return made, refused


def _note(text: str) -> None:
    print(f"note: {printable(text)}", file=sys.stderr)


def _keep_proven(scratch: Path, made: Sequence[Made], proof: Proof) -> list[Made]:
    kept = [item for item in made if item.precision in proof.parities]
    for item in made:
        if item not in kept:
            file = scratch / model_file(item.precision)
            file.unlink()
            file.with_name(file.name + DATA_SUFFIX).unlink(missing_ok=True)
    return kept


@dataclass(frozen=True, slots=True)
class _Reference:
    """What the variants are made from and judged by; the graph lies in the folder of work."""

    source: Source | OnnxSource
    expected: dict[str, NDArray[np.float32]]  # what the reference computes on the golden tiles
    digest: str  # of the weights as numbers
    autocast: tuple[Autocast, ...] = ()  # how near torch's own low precision comes to it


def _graph_and_reference(
    source: Source | OnnxSource, settings: ExportSettings, tiles: NDArray[np.uint8], work: Path
) -> _Reference:
    """Write the fp32 graph into the folder of work, as BASE; with fp16 storage the stored one, too, as _STORED."""
    metadata = {"name": settings.name, "arch": source.arch, "mtdp_version": mtdp.__version__}
    if isinstance(source, OnnxSource):
        metadata["weights_sha256"] = source.digest
        save_model(wrap_onnx(source, metadata), source.folder, work / BASE)
        given = original_outputs(source, tiles)
        check_sees(given[FEATURES], tiles)
        return _Reference(source, given, source.digest)
    network = source.network
    if settings.weights_storage == "fp16":
        network = copy.deepcopy(network)  # the caller's stays as it is
        round_weights_to_fp16(network)
    model = Deployed(network, source.pixels, settings.tokens).eval()
    metadata["weights_sha256"] = weights_digest(network)
    expected = reference_outputs(model, tiles)
    check_sees(expected[FEATURES], tiles)
    if settings.weights_storage == "fp16":
        stored = export_graph(model, metadata, "fp16")
        (work / _STORED).write_bytes(stored.SerializeToString(deterministic=True))
        source = _with_rounding(source, tiles, expected)
    if settings.weights_storage == "fp32" or len(settings.precisions) > 1:
        base = export_light(model, metadata, work)
        (work / BASE).write_bytes(base.SerializeToString(deterministic=True))
    autocast = _autocast(model, tiles, expected, settings.precisions)
    return _Reference(source, expected, metadata["weights_sha256"], autocast)


def _autocast(
    model: Deployed,
    tiles: NDArray[np.uint8],
    expected: Mapping[str, NDArray[np.float32]],
    precisions: Sequence[str],
) -> tuple[Autocast, ...]:
    """Measure what the low precisions are judged by."""
    measured = []
    for precision in precisions:
        outputs = autocast_outputs(model, tiles, precision) if precision in ("fp16", "bf16") else None
        if outputs is not None:
            similar = cosines(outputs[FEATURES], expected[FEATURES])
            agreement = knn_agreement(outputs[FEATURES], expected[FEATURES])
            tokens = tokens_cosine(outputs[TOKENS], expected[TOKENS]) if model.tokens else None
            measured.append(Autocast(precision, float(similar.min()), float(similar.mean()), agreement, tokens))
    return tuple(measured)


def _with_rounding(source: Source, tiles: NDArray[np.uint8], rounded: dict[str, NDArray[np.float32]]) -> Source:
    """Say in the origin how far rounded weights are from those that were given: every other number is against them.

    Raises:
        ParityFailure: further than fp16 may be.
    """
    given = reference_outputs(Deployed(source.network, source.pixels).eval(), tiles)
    cosine = float(cosines(rounded[FEATURES], given[FEATURES]).min())
    if not cosine >= MIN_COSINE["fp16"]:
        raise ParityFailure(
            f"--weights-storage fp16: rounding the weights brings features to a cosine of {cosine:.6f} to the "
            f"network's own, {MIN_COSINE['fp16']} is required",
            "Nothing was written. Leave --weights-storage out.",
        )
    said = f"kernels rounded to fp16, smallest cosine to the network before that {cosine:.7f}"
    return replace(source, origin=f"{source.origin}; {said}")


def _tokens(source: Source | OnnxSource) -> Tokens | None:
    """Return the grid of a source's patch tokens; of an ONNX file it was found when that was opened.

    Raises:
        ExportUsageError: it has none.
    """
    if isinstance(source, OnnxSource):
        return source.tokens
    return tokens_of(source.network.backbone, source.preprocessing.image_px)


def _data_ref(folder: Path, name: str) -> FileRef | None:
    data = name + DATA_SUFFIX
    return file_ref(folder, data) if (folder / data).is_file() else None


def golden_tiles(settings: ExportSettings, tile_px: int) -> NDArray[np.uint8]:
    """Return uint8[N, tile_px, tile_px, 3]: what the bundle proves itself on."""
    if settings.calibration is None:
        return synthetic_tiles(tile_px)
    if not settings.calibration.exists():
        raise ExportUsageError(f"--calibration {settings.calibration}: no such file or folder", "check the path")
    return calibration_tiles(settings.calibration, tile_px, settings.mpp)


def _calibration(settings: ExportSettings, golden: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Tissue that is not among the golden tiles: those judge the result."""
    assert settings.calibration is not None
    tiles = calibration_tiles(settings.calibration, golden.shape[1], settings.mpp, 2 * CALIBRATION_TILES)
    seen = {tile.tobytes() for tile in golden}
    fresh = [tile for tile in tiles if tile.tobytes() not in seen][:: 2 if len(tiles) > CALIBRATION_TILES else 1]
    if not fresh:
        raise ExportUsageError(
            f"--calibration {settings.calibration}: {len(tiles)} tiles are too few for int8",
            "give a slide with more tissue, or more images",
        )
    return np.stack(fresh[:CALIBRATION_TILES])


def _manifest(
    reference: _Reference,
    settings: ExportSettings,
    golden_shape: tuple[int, ...],  # tiles, features
    folder: Path,
    made: Sequence[Made],
) -> Manifest:
    unproven = Parity(_REFERENCE, 1, 0.0, 0.0, 0.0)
    source, digest = reference.source, reference.digest
    pixels, preprocessing = source.pixels, source.pixels.preprocessing
    resized, cut = pixels.resize_px != pixels.tile_px, preprocessing.image_px != pixels.resize_px
    return Manifest(
        name=settings.name,
        arch=source.arch,
        mtdp_version=mtdp.__version__,
        tile_px=pixels.tile_px,
        mpp=settings.mpp,
        mean=preprocessing.mean,
        std=preprocessing.std,
        features_dim=golden_shape[1],
        heads=tuple(Head(name, classes) for name, classes in source.class_names.items()),
        weights=Weights(digest, source.origin, settings.licence or source.licence, source.published),
        variants=tuple(
            Variant(
                m.precision,
                file_ref(folder, model_file(m.precision)),
                unproven,
                (),
                m.fp32_kernels,
                _data_ref(folder, model_file(m.precision)),
            )
            for m in made
        ),
        golden=file_ref(folder, _GOLDEN_FILE),
        reference="onnxruntime" if isinstance(source, OnnxSource) else "torch",
        interpolation=preprocessing.interpolation,
        golden_source=describe_source(settings.calibration, golden_shape[0]),
        autocast=reference.autocast,
        preprocessing_source=pixels.numbers_from,
        encoder=source.encoder,
        feature=source.feature,
        resize_px=pixels.resize_px if resized else None,
        input_px=preprocessing.image_px if cut else None,
    )


def _check_precisions(settings: ExportSettings) -> None:
    wanted = settings.precisions
    unknown = [precision for precision in wanted if precision not in PRECISIONS]
    if unknown:
        raise ExportUsageError(f"--precision {unknown[0]}: unknown", f"one of {', '.join(PRECISIONS)}")
    if not wanted or len(set(wanted)) != len(wanted) or ("fp32" in wanted[1:]):
        raise ExportUsageError(f"precisions {', '.join(wanted)}: fp32 comes first, and each one once")
    if settings.weights_storage == "fp16" and "fp32" not in wanted:
        raise ExportUsageError("--weights-storage is of the fp32 variant", "add --precision fp32, or leave it out")
    if "int8" in wanted and "fp32" not in wanted:
        raise ExportUsageError("--precision int8 is judged against fp32", "add --precision fp32")
    if "int8" in wanted and (settings.calibration is None or settings.probe_task is None):
        raise ExportUsageError(
            "--precision int8 needs tissue to calibrate on and a task to be judged by",
            "--calibration SLIDE (or a folder of images) and --probe-task TASK (train/, val/, test/ with classes)",
        )
    if "int8" in wanted and settings.probe_task is not None:
        load_probe_task(settings.probe_task)  # it judges last; what is wrong with it is said first


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
