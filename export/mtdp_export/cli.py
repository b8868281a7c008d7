"""mtdp-export: a network in, a proven bundle out; and the proof again, on any machine."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mtdp_export.parity import Row

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
    backend: Annotated[list[str] | None, typer.Option(help="With --verify: only this engine.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Export a network to a bundle, or verify one. Exit code 1: an engine does not compute what torch does."""
    from mtdp_export.errors import ExportUsageError

    if verify is not None:
        if source is not None or out is not None:
            raise ExportUsageError("--verify takes no SOURCE and no --out", "mtdp-export --verify BUNDLE")
        unused = (weights, precision, tile_px, calibration, probe_task, name, licence, no_heads, overwrite)
        if any(unused) or weights_storage != "fp32":
            raise ExportUsageError("--verify goes with --backend and --json only", "mtdp-export --verify BUNDLE")
        _verify(verify, backend or [], as_json)
        return
    if backend:
        raise ExportUsageError("--backend goes with --verify", "leave it out: ONNX Runtime proves what is exported")
    if source is None or out is None:
        raise ExportUsageError("SOURCE and --out are needed", "mtdp-export resnet50 --weights random --out BUNDLE")
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
        precisions=tuple(dict.fromkeys(["fp32", *(precision or [])])),
        probe_task=probe_task,
    )
    bundle, report = write_bundle(open_source(source, weights, tile_px, not no_heads), out, settings)
    if as_json:
        print(json.dumps({"bundle": str(out), "digest": bundle.digest, **report.to_json()}))
    else:
        from mtdp_export.parity import table

        files = ", ".join(f"{v.file.file} {v.file.size_bytes / 1e6:.1f} MB" for v in bundle.manifest.variants)
        print(f"{out}: {bundle.manifest.name}, {files}, digest {bundle.digest}")
        print(table(report.rows))
        print("\n".join(report.notes), end="\n" if report.notes else "")
    for refusal in report.refused:
        print(f"error: {refusal}\nhint: {refusal.hint}", file=sys.stderr)
    if report.refused:
        raise typer.Exit(1)


def _verify(path: Path, backends: list[str], as_json: bool) -> None:
    from mtdp_export.parity import table
    from mtdp_export.verify import verify_bundle

    rows: list[Row] = verify_bundle(path, backends)
    if as_json:
        print(json.dumps({"bundle": str(path), "parity": [asdict(row) | {"passed": row.passed} for row in rows]}))
    else:
        print(table(rows))
    if not all(row.passed for row in rows if row.required):
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
