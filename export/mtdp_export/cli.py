"""mtdp-export: a network in, a proven bundle out; and the proof again, on any machine."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mtdp_export.onnx_source import OnnxSource
    from mtdp_export.parity import Row
    from mtdp_export.source import Source

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def export(
    ctx: typer.Context,
    source: Annotated[
        str | None, typer.Argument(metavar="SOURCE", help="A run, a checkpoint, or an architecture (resnet50, ...).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the bundle.", metavar="BUNDLE")] = None,
    weights: Annotated[
        str | None, typer.Option(help="For an architecture: imagenet, mtdp (the paper's), random, or a file.")
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="fp16, bf16, int8, each by its own --precision; fp32 is always there.")
    ] = None,
    weights_storage: Annotated[
        str, typer.Option(help="fp32, or fp16: half the size; the graph casts them back and computes in fp32.")
    ] = "fp32",
    tile_px: Annotated[int | None, typer.Option(help="Side of a tile; the checkpoint's own, or 224.")] = None,
    mpp: Annotated[float, typer.Option(help="µm per pixel at which the model wants to see tissue.")] = 0.5,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Slide, or folder of images, for the golden tiles (synthetic ones if left out) and for int8.",
            metavar="SLIDE|DIR",
        ),
    ] = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="Build an engine ahead of time: tensorrt-rtx (needs no GPU), tensorrt.")
    ] = None,
    batch: Annotated[tuple[int, int, int], typer.Option(help="Of the engines: smallest, best and largest batch.")] = (
        1,
        64,
        256,
    ),
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(help="tensorrt-rtx: build for these alone, such as 8.9; 8.0 and later if left out."),
    ] = None,
    hardware_compatibility: Annotated[
        str, typer.Option(help="tensorrt: other GPUs that it may run on: none, same-compute-capability, ampere-plus.")
    ] = "none",
    version_compatible: Annotated[
        bool,
        typer.Option("--version-compatible", help="tensorrt: may run on later releases of the same major version."),
    ] = False,
    probe_task: Annotated[
        Path | None,
        typer.Option(help="With int8: the labelled task whose linear probe must score as with fp32.", metavar="TASK"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model; the folder's if left out.")] = None,
    licence: Annotated[str, typer.Option(help="Licence of the weights, where the source does not say it.")] = "",
    no_heads: Annotated[bool, typer.Option("--no-heads", help="Leave the classification heads out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle.")] = False,
    verify: Annotated[
        Path | None, typer.Option(help="Replay the golden tiles of a bundle on this machine.", metavar="BUNDLE")
    ] = None,
    card: Annotated[
        Path | None, typer.Option(help="Print the model card of a bundle, as Markdown.", metavar="BUNDLE")
    ] = None,
    onnx: Annotated[
        Path | None, typer.Option(help="Bring a feature extractor of your own, in place of SOURCE.", metavar="FILE")
    ] = None,
    mean: Annotated[
        tuple[float, float, float] | None, typer.Option(help="With --onnx: of R G B, subtracted from the pixels.")
    ] = None,
    std: Annotated[
        tuple[float, float, float] | None, typer.Option(help="With --onnx: of R G B, divides what is left.")
    ] = None,
    input_range: Annotated[
        int | None, typer.Option(help="With --onnx: 1 for pixels of 0..1 (also if left out), 255 for 0..255.")
    ] = None,
    input_layout: Annotated[
        str | None, typer.Option(help="With --onnx: nchw or nhwc, where its shape leaves it open.")
    ] = None,
    feature_output: Annotated[
        str | None, typer.Option(help="With --onnx: the output that is the feature, where there are several.")
    ] = None,
    backend: Annotated[list[str] | None, typer.Option(help="With --verify: only this engine.")] = None,
    trust_engines: Annotated[
        bool, typer.Option("--trust-engines", help="With --verify: run the bundle's engines, too. They are code.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Export a network to a bundle, verify one, or print its card. Exit code 1: an engine fails its proof."""
    from mtdp_export.errors import ExportUsageError

    given = _given(ctx)
    own = (mean, std, input_range, input_layout, feature_output)
    if onnx is None and any(option is not None for option in own):
        raise ExportUsageError(
            "--mean, --std, --input-range, --input-layout and --feature-output go with --onnx", "leave them out"
        )
    if card is not None:
        if given - {"card"}:
            raise ExportUsageError("--card goes alone", "mtdp-export --card BUNDLE > card.md")
        _card(card)
        return
    if verify is not None:
        if source is not None or out is not None:
            raise ExportUsageError("--verify takes no SOURCE and no --out", "mtdp-export --verify BUNDLE")
        if given - {"verify", "backend", "trust_engines", "as_json"}:
            raise ExportUsageError(
                "--verify goes with --backend, --trust-engines and --json only", "mtdp-export --verify BUNDLE"
            )
        _verify(verify, backend or [], trust_engines, as_json)
        return
    if backend:
        raise ExportUsageError("--backend goes with --verify", "leave it out: ONNX Runtime proves what is exported")
    if trust_engines:
        raise ExportUsageError("--trust-engines goes with --verify", "leave it out")
    if "batch" in given and not engine:
        raise ExportUsageError("--batch is an option of --engine", "add --engine tensorrt-rtx, or leave it out")
    if probe_task is not None and "int8" not in (precision or []):
        raise ExportUsageError("--probe-task goes with --precision int8", "add it, or leave --probe-task out")
    if onnx is not None and (source is not None or weights is not None or no_heads or weights_storage != "fp32"):
        raise ExportUsageError(
            "--onnx takes no SOURCE, --weights, --weights-storage or --no-heads", "mtdp-export --onnx FILE --out BUNDLE"
        )
    if (source is None and onnx is None) or out is None:
        raise ExportUsageError("SOURCE and --out are needed", "mtdp-export resnet50 --weights random --out BUNDLE")
    if tile_px is not None and tile_px < 1:
        raise ExportUsageError(f"--tile-px {tile_px}: no side of a tile", "pixels, for example 224")
    if weights_storage not in ("fp32", "fp16"):
        raise ExportUsageError(f"--weights-storage {weights_storage!r}: unknown", "fp32 or fp16")

    from mtdp_export.engines import EngineSettings
    from mtdp_export.source import open_source
    from mtdp_export.write import ExportSettings, write_bundle

    settings = ExportSettings(
        name=name or out.resolve().name,
        mpp=mpp,
        weights_storage="fp16" if weights_storage == "fp16" else "fp32",
        calibration=calibration,
        licence=licence,
        overwrite=overwrite,
        engines=EngineSettings(
            tuple(dict.fromkeys(engine or [])),
            batch,
            tuple(compute_capability or []),
            hardware_compatibility,
            version_compatible,
        ),
        precisions=tuple(dict.fromkeys(["fp32", *(precision or [])])),
        probe_task=probe_task,
    )
    if onnx is not None:
        model: Source | OnnxSource = _open_onnx(onnx, *own, tile_px, licence)
    else:
        model = open_source(source or "", weights, tile_px, not no_heads)
    bundle, report = write_bundle(model, out, settings)
    if as_json:
        print(json.dumps({"bundle": str(out), "digest": bundle.digest, **report.to_json()}))
    else:
        from mtdp_export.parity import golden_note, table

        files = ", ".join(f"{v.file.file} {v.file.size_bytes / 1e6:.1f} MB" for v in bundle.manifest.variants)
        print(f"{out}: {bundle.manifest.name}, {files}, digest {bundle.digest}")
        print(table(report.rows))
        print(golden_note(bundle.manifest.golden_source))
        for built in bundle.manifest.engines:
            print(f"{built.file.file} {built.file.size_bytes / 1e6:.1f} MB")
        print("\n".join(report.notes), end="\n" if report.notes else "")
    if "mpp" not in given:
        print(f"note: --mpp was left out: {mpp:g} µm a pixel is taken as the model's scale", file=sys.stderr)
    for refusal in report.refused:
        print(f"error: {refusal}\nhint: {refusal.hint}", file=sys.stderr)
    if report.refused:
        raise typer.Exit(1)


def _given(ctx: typer.Context) -> set[str]:
    """Return the names of the parameters that stand on the command line, whatever their values."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _open_onnx(
    path: Path,
    mean: tuple[float, float, float] | None,
    std: tuple[float, float, float] | None,
    input_range: int | None,
    layout: str | None,
    output: str | None,
    tile_px: int | None,
    licence: str,
) -> OnnxSource:
    from mtdp_export.errors import ExportUsageError
    from mtdp_export.onnx_source import Declared, open_onnx

    if layout not in (None, "nchw", "nhwc"):
        raise ExportUsageError(f"--input-layout {layout}: unknown", "nchw or nhwc")
    if input_range not in (None, 1, 255):
        raise ExportUsageError(f"--input-range {input_range}: unknown", "1 or 255")
    declared = Declared(mean, std, input_range or 1, layout, tile_px, output, licence)  # type: ignore[arg-type]
    return open_onnx(path, declared)


def _card(path: Path) -> None:
    from mtdp_export.card import model_card
    from mtdp_runtime.bundle import load_bundle

    print(model_card(load_bundle(path).manifest), end="")


def _verify(path: Path, backends: list[str], trust_engines: bool, as_json: bool) -> None:
    from mtdp_export.parity import golden_note, table
    from mtdp_export.verify import engines_not_run, verify_bundle
    from mtdp_runtime.bundle import load_bundle

    bundle = load_bundle(path)
    rows: list[Row] = verify_bundle(path, backends, trust_engines)
    not_run = engines_not_run(path, trust_engines)
    # Where nothing that was asked for runs any variant, nothing failed, and nothing was shown either.
    passed = any(row.passed for row in rows) and all(row.passed for row in rows if row.required)
    if as_json:
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
        print(json.dumps(found))
    else:
        files = [*(variant.file for variant in bundle.manifest.variants), bundle.manifest.golden]
        print(f"{path}: {bundle.manifest.name}, digest {bundle.digest}")
        print(f"intact: {', '.join(file.file for file in files)}; reference: {bundle.manifest.reference} in fp32")
        print(table(rows))
        print(golden_note(bundle.manifest.golden_source))
        for file, why in not_run.items():
            print(f"{file}: digest right, not run: {why}")
    if not passed:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of `mtdp-export`."""
    from mtdp.errors import MtdpError
    from mtdp_export.errors import ExportError
    from mtdp_runtime.commands.console import run_app

    try:
        run_app(app)
    except (ExportError, MtdpError) as error:
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)
