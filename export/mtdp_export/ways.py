"""What mtdp-export does, each as one function of its options that returns the exit code. Imports only when it runs."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mtdp_export.errors import ExportUsageError
from mtdp_export.isolated import limited
from mtdp_export.options import Options
from mtdp_export.scratch import scratch_of
from mtdp_export.stages import Stages
from mtdp_runtime.commands.console import hint, note, result, result_json, trouble, work_begins

if TYPE_CHECKING:
    from mtdp_export.onnx_source import OnnxSource
    from mtdp_export.parity import Row
    from mtdp_export.source import Source
    from mtdp_export.write import ExportReport, ExportSettings
    from mtdp_runtime.bundle import Bundle


_DEFAULT_MPP: Final = 0.5


def print_card(options: Options) -> int:
    """Print the model card of a bundle."""
    from mtdp_export.card import model_card
    from mtdp_runtime.bundle import load_bundle

    assert options.card is not None
    _lines(model_card(load_bundle(options.card).manifest, None, (options.card / "LICENSE").is_file()))
    return 0


def list_encoders_known(options: Options) -> int:
    """Print the catalogue."""
    from mtdp_export.catalogue import catalogue
    from mtdp_export.encoder_docs import as_json, as_lines

    recipes = list(catalogue().values())
    if options.as_json:
        result_json(as_json(recipes))
    else:
        _lines(as_lines(recipes))
    return 0


def export_network(options: Options) -> int:
    """Export a run, a checkpoint or an architecture."""
    out = _target(options)
    settings = _settings(options, out)
    if options.source is None:
        raise ExportUsageError("SOURCE and --out are needed", "mtdp-export resnet50 --weights random --out BUNDLE")
    if options.weights_storage not in ("fp32", "fp16"):
        raise ExportUsageError(f"--weights-storage {options.weights_storage!r}: unknown", "fp32 or fp16")

    from mtdp_export.encoder_source import Asked
    from mtdp_export.pixels import Stated
    from mtdp_export.source import open_source
    from mtdp_export.write import check_settings

    stated = Stated(options.mean, options.std, options.interpolation, options.tile_px, options.resize, options.crop)
    stated.check()
    asked = Asked(options.feature, _arguments(options.arch_arg or []) or None)
    check_settings(out, settings)
    with _stages(options).stage(f"loading {options.source}"):
        source = open_source(
            options.source, options.weights, options.tile_px, not options.no_heads, stated=stated, asked=asked
        )
    if source.encoder:
        note(source.licence)
    if source.published:
        note(f"the digest of their file says: {source.published}")
    work_begins()
    return _say_what_was_written(_write(source, out, settings, options), options)


def export_onnx(options: Options) -> int:
    """Export an ONNX file of one's own: in a process of its own, since such a file may keep an engine busy for ever."""
    scratch = scratch_of(_target(options))
    if options.input_layout not in (None, "nchw", "nhwc"):
        raise ExportUsageError(f"--input-layout {options.input_layout}: unknown", "nchw or nhwc")
    if options.input_range not in (None, 1, 255):
        raise ExportUsageError(f"--input-range {options.input_range}: unknown", "1 or 255")
    work_begins()
    try:
        written = limited(f"--onnx {options.onnx}", options.limit_s, _onnx_written, options, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that was ended
    return _say_what_was_written(written, options)


def _onnx_written(options: Options, scratch: Path) -> Written:
    from mtdp_export.onnx_source import Declared, open_onnx
    from mtdp_export.write import check_settings

    out = _target(options)
    settings = replace(_settings(options, out), scratch=scratch)

    declared = Declared(
        options.mean,
        options.std,
        options.input_range or 1,
        options.input_layout,  # type: ignore[arg-type]  # checked above
        options.tile_px,
        options.feature_output,
        options.licence,
        options.interpolation,
        options.resize,
        options.crop,
        options.pool,
        options.prefix_tokens,
        options.tokens,
    )
    check_settings(out, settings)
    assert options.onnx is not None
    with _stages(options).stage(f"reading {options.onnx}"):
        source = open_onnx(options.onnx, declared)
    return _write(source, out, settings, options)


def verify_bundle(options: Options) -> int:
    """Replay the golden tiles of a bundle on this machine; 1 where an engine fails its proof."""
    from mtdp_export.parity import golden_note, table
    from mtdp_export.verify import engines_are_here, engines_not_run, verify_bundle
    from mtdp_runtime.bundle.hub import bundle_of

    assert options.verify is not None
    bundle = bundle_of(options.verify, options.trust_engines)
    path = bundle.source or options.verify  # a tag may move meanwhile, a commit does not
    with _stages(options).stage("replaying the golden tiles on every engine here"):
        rows: list[Row] = verify_bundle(path, options.backend or [], options.trust_engines, options.limit_s)
    not_run = engines_not_run(bundle)
    # Where nothing that was asked for runs any variant, nothing failed, and nothing was shown either.
    passed = any(row.passed for row in rows) and all(row.passed for row in rows if row.required)
    if options.as_json:
        found = {
            "bundle": str(path),
            "name": bundle.manifest.name,
            "digest": bundle.digest,
            "reference": bundle.manifest.reference,
            "golden_source": bundle.manifest.golden_source,
            "passed": passed,
            "parity": [asdict(row) | {"passed": row.passed} for row in rows],
            "engines_not_run": not_run,
        }
        result_json(found)
    else:
        files = [*(variant.file for variant in bundle.manifest.variants), bundle.manifest.golden]
        result(f"{path}: {bundle.manifest.name}, digest {bundle.digest}")
        result(f"intact: {', '.join(file.file for file in files)}; reference: {bundle.manifest.reference} in fp32")
        _lines(table(rows, bundle.manifest.autocast))
        result(golden_note(bundle.manifest.golden_source))
        for file, why in not_run.items():
            result(f"{file}: {'digest right' if engines_are_here(bundle) else 'not fetched'}, not run: {why}")
    return 0 if passed else 1


def _lines(text: str) -> None:
    """Print a text of many lines, each escaped: names of a bundle may come from a stranger."""
    for line in text.splitlines():
        result(line)


def _target(options: Options) -> Path:
    if options.out is None:
        raise ExportUsageError("SOURCE and --out are needed", "mtdp-export resnet50 --weights random --out BUNDLE")
    if options.probe_task is not None and "int8" not in (options.precision or []):
        raise ExportUsageError("--probe-task goes with --precision int8", "add it, or leave --probe-task out")
    return options.out


def _settings(options: Options, out: Path) -> ExportSettings:
    from mtdp_export.engines import EngineSettings
    from mtdp_export.write import ExportSettings

    return ExportSettings(
        name=options.name or out.resolve().name,
        mpp=_DEFAULT_MPP if options.mpp is None else options.mpp,
        weights_storage="fp16" if options.weights_storage == "fp16" else "fp32",
        calibration=options.calibration,
        licence=options.licence,
        overwrite=options.overwrite,
        engines=EngineSettings(
            tuple(dict.fromkeys(options.engine or [])),
            options.batch,
            tuple(options.compute_capability or []),
            options.hardware_compatibility,
            options.version_compatible,
        ),
        precisions=_precisions(options.precision or []),
        probe_task=options.probe_task,
        tokens=options.tokens,
        release=True,
    )


def _precisions(named: list[str]) -> tuple[str, ...]:
    """What is named, fp32 first; fp32 where nothing is, and beside int8, which is judged against it."""
    fp32 = not named or "fp32" in named or "int8" in named
    return tuple(dict.fromkeys([*(["fp32"] if fp32 else []), *named]))


def _arguments(given: list[str]) -> dict[str, Any]:
    """Parse NAME=VALUE: a number, true, false or a word."""
    arguments: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ExportUsageError(f"--arch-arg {text}: not NAME=VALUE", "for example --arch-arg reg_tokens=4")
        if name in arguments:
            raise ExportUsageError(f"--arch-arg {name}: given twice", "give it once")
        arguments[name] = {"true": True, "false": False}.get(value.lower(), value)
        for kind in (float, int):
            try:
                arguments[name] = kind(value)
            except ValueError:
                continue
    return arguments


def _stages(options: Options) -> Stages:
    return Stages("quiet" if options.quiet else "timed" if options.verbose else "stages")


@dataclass(frozen=True, slots=True)
class Written:
    """A bundle that is in its place, and how that went."""

    out: Path
    bundle: Bundle
    report: ExportReport
    assumed_mpp: float | None  # where nobody said it


def _write(source: Source | OnnxSource, out: Path, settings: ExportSettings, options: Options) -> Written:
    from mtdp_export.write import write_bundle

    said = options.mpp is not None or source.mpp is not None
    if options.mpp is None and source.mpp is not None:
        settings = replace(settings, mpp=source.mpp)
    bundle, report = write_bundle(source, out, settings, _stages(options))
    return Written(out, bundle, report, None if said else settings.mpp)


def _say_what_was_written(written: Written, options: Options) -> int:
    """Say it; return the exit code."""
    bundle, report = written.bundle, written.report
    if options.as_json:
        result_json({"bundle": str(written.out), "digest": bundle.digest, **report.to_json()})
    else:
        from mtdp_export.parity import golden_note, table

        files = ", ".join(f"{v.file.file} {v.file.size_bytes / 1e6:.1f} MB" for v in bundle.manifest.variants)
        result(f"{written.out}: {bundle.manifest.name}, {files}, digest {bundle.digest}")
        _lines(table(report.rows, bundle.manifest.autocast))
        result(golden_note(bundle.manifest.golden_source))
        for built in bundle.manifest.engines:
            result(f"{built.file.file} {built.file.size_bytes / 1e6:.1f} MB")
        for each in report.notes:
            result(each)
    if written.assumed_mpp is not None:
        note(f"--mpp was left out: {written.assumed_mpp:g} µm per pixel is taken as the model's scale")
    for refusal in report.refused:
        trouble("error: ", refusal)
        hint(refusal.hint)
    return 1 if report.refused else 0
