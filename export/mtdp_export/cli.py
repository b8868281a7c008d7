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
    from mtdp_export.parity import Comparison
    from mtdp_export.source import Source

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def export(
    source: Annotated[
        str | None, typer.Argument(metavar="SOURCE", help="A run, a checkpoint, or an architecture (resnet50, ...).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the bundle.", metavar="BUNDLE")] = None,
    weights: Annotated[
        str | None, typer.Option(help="For an architecture: imagenet, mtdp (the paper's), random, or a file.")
    ] = None,
    precision: Annotated[list[str] | None, typer.Option(help="fp32, the only one so far.")] = None,
    weights_storage: Annotated[
        str, typer.Option(help="fp32, or fp16: half the size; the graph casts them back and computes in fp32.")
    ] = "fp32",
    tile_px: Annotated[int | None, typer.Option(help="Side of a tile; the checkpoint's own, or 224.")] = None,
    mpp: Annotated[float, typer.Option(help="µm per pixel at which the model wants to see tissue.")] = 0.5,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Slide, or folder of images, for the golden tiles; synthetic ones if left out.", metavar="SLIDE|DIR"
        ),
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
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Export a network to a bundle, verify one, or print its card. Exit code 1: an engine fails its proof."""
    from mtdp_export.errors import ExportUsageError

    own = (mean, std, input_range, input_layout, feature_output)
    if onnx is None and any(option is not None for option in own):
        raise ExportUsageError(
            "--mean, --std, --input-range, --input-layout and --feature-output go with --onnx", "leave them out"
        )
    if card is not None:
        others = (source, out, verify, onnx, weights, precision, tile_px, calibration, name, licence, backend)
        if any(others) or no_heads or overwrite or as_json or weights_storage != "fp32":
            raise ExportUsageError("--card goes alone", "mtdp-export --card BUNDLE > card.md")
        _card(card)
        return
    if verify is not None:
        if source is not None or out is not None:
            raise ExportUsageError("--verify takes no SOURCE and no --out", "mtdp-export --verify BUNDLE")
        unused = (onnx, weights, precision, tile_px, calibration, name, licence, no_heads, overwrite)
        if any(unused) or weights_storage != "fp32":
            raise ExportUsageError("--verify goes with --backend and --json only", "mtdp-export --verify BUNDLE")
        _verify(verify, backend or [], as_json)
        return
    if backend:
        raise ExportUsageError("--backend goes with --verify", "leave it out: ONNX Runtime proves what is exported")
    if onnx is not None and (source is not None or weights is not None or no_heads or weights_storage != "fp32"):
        raise ExportUsageError(
            "--onnx takes no SOURCE, --weights, --weights-storage or --no-heads", "mtdp-export --onnx FILE --out BUNDLE"
        )
    if (source is None and onnx is None) or out is None:
        raise ExportUsageError("SOURCE and --out are needed", "mtdp-export resnet50 --weights random --out BUNDLE")
    for wanted in precision or []:
        if wanted != "fp32":
            raise ExportUsageError(f"--precision {wanted}: not available yet", "leave it out, or --precision fp32")
    if weights_storage not in ("fp32", "fp16"):
        raise ExportUsageError(f"--weights-storage {weights_storage!r}: unknown", "fp32 or fp16")

    from mtdp_export.source import open_source
    from mtdp_export.write import ExportSettings, write_bundle

    settings = ExportSettings(
        name=name or out.resolve().name,
        mpp=mpp,
        weights_storage="fp16" if weights_storage == "fp16" else "fp32",
        calibration=calibration,
        licence=licence,
        overwrite=overwrite,
    )
    if onnx is not None:
        model: Source | OnnxSource = _open_onnx(onnx, *own, tile_px, licence)
    else:
        model = open_source(source or "", weights, tile_px, not no_heads)
    bundle, comparison = write_bundle(model, out, settings)
    file = bundle.manifest.variants[0].file
    if as_json:
        print(json.dumps({"bundle": str(out), "digest": bundle.digest, "parity": [asdict(comparison)]}))
        return
    from mtdp_export.parity import table

    print(f"{out}: {bundle.manifest.name}, {file.file} {file.size_bytes / 1e6:.1f} MB, digest {bundle.digest}")
    print(table([comparison]))


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


def _verify(path: Path, backends: list[str], as_json: bool) -> None:
    from mtdp_export.parity import table
    from mtdp_export.verify import verify_bundle
    from mtdp_runtime.bundle import load_bundle

    bundle = load_bundle(path)
    comparisons: list[Comparison] = verify_bundle(path, backends)
    if as_json:
        print(json.dumps({"bundle": str(path), "parity": [asdict(c) | {"passed": c.passed} for c in comparisons]}))
    else:
        files = [*(variant.file for variant in bundle.manifest.variants), bundle.manifest.golden]
        print(f"{path}: {bundle.manifest.name}, digest {bundle.digest}")
        print(f"intact: {', '.join(file.file for file in files)}; reference: {bundle.manifest.reference} in fp32")
        print(table(comparisons))
    if not all(comparison.passed for comparison in comparisons if comparison.required):
        raise typer.Exit(1)


def main() -> None:
    """Entry point of `mtdp-export`."""
    from mtdp.errors import MtdpError
    from mtdp_export.errors import ExportError
    from mtdp_runtime.console import run_app

    try:
        run_app(app)
    except (ExportError, MtdpError) as error:
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)
