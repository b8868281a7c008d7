"""mtdp-export: a network in, a proven bundle out; and the proof again, on any machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import typer

from mtdp.cli_options import PlainHelp
from mtdp_export import options as o
from mtdp_export.errors import ExportUsageError
from mtdp_export.ways import export_network, export_onnx, list_encoders_known, print_card, verify_bundle

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@dataclass(frozen=True, slots=True)
class Way:
    """One of the things that the command does, and the parameters that go with it; any other is an error."""

    called: str
    takes: frozenset[str]
    example: str
    run: Callable[[o.Options], int]  # returns the exit code


_EXIT_CODES: Final = (
    "Exit codes: 0: all is done; 1: a bundle or a variant of it was not written, or an engine fails its proof; "
    "2: nothing could start or go on: a wrong option, model or folder, no engine; 130, 143: stopped by SIGINT, SIGTERM."
)
_SAID: Final = frozenset({"quiet", "verbose"})
_PIXELS: Final = frozenset({"tile_px", "resize", "crop", "mean", "std", "interpolation", "mpp"})
_MADE: Final = frozenset(
    {"out", "name", "licence", "overwrite", "calibration", "precision", "probe_task", "tokens", "as_json"}
)
_ENGINES: Final = frozenset({"engine", "batch", "compute_capability", "hardware_compatibility", "version_compatible"})
_FEW: Final = 4  # options are listed in a message where they are no more
_EXPORT: Final = _SAID | _PIXELS | _MADE | _ENGINES
_WAYS: Final = {
    "list_encoders": Way(
        "--list-encoders",
        frozenset({"list_encoders", "as_json"}) | _SAID,
        "mtdp-export --list-encoders",
        list_encoders_known,
    ),
    "card": Way("--card", frozenset({"card"}) | _SAID, "mtdp-export --card BUNDLE > card.md", print_card),
    "verify": Way(
        "--verify",
        frozenset({"verify", "backend", "trust_engines", "stall_limit", "as_json"}) | _SAID,
        "mtdp-export --verify BUNDLE",
        verify_bundle,
    ),
    "onnx": Way(
        "--onnx",
        _EXPORT | {"onnx", "input_range", "input_layout", "feature_output", "pool", "prefix_tokens", "stall_limit"},
        "mtdp-export --onnx FILE --out BUNDLE",
        export_onnx,
    ),
    "source": Way(
        "SOURCE",
        _EXPORT | {"source", "weights", "feature", "arch_arg", "weights_storage", "no_heads"},
        "mtdp-export resnet50 --weights random --out BUNDLE",
        export_network,
    ),
}


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"mtdp {version('mtdp')}")
        raise typer.Exit


@app.command(cls=PlainHelp, epilog=_EXIT_CODES)
def export(
    ctx: typer.Context,
    source: o.Source = None,
    *,
    out: o.Out = None,
    weights: o.Weights = None,
    feature: o.Feature = None,
    tokens: o.Tokens = False,
    arch_arg: o.ArchArg = None,
    precision: o.Precision = None,
    weights_storage: o.WeightsStorage = "fp32",
    tile_px: o.TilePx = None,
    resize: o.Resize = None,
    crop: o.Crop = None,
    mean: o.Mean = None,
    std: o.Std = None,
    interpolation: o.Interpolation = None,
    mpp: o.Mpp = None,
    calibration: o.Calibration = None,
    engine: o.Engine = None,
    batch: o.Batch = (1, 64, 256),
    compute_capability: o.ComputeCapability = None,
    hardware_compatibility: o.HardwareCompatibility = "none",
    version_compatible: o.VersionCompatible = False,
    probe_task: o.ProbeTask = None,
    name: o.Name = None,
    licence: o.Licence = "",
    no_heads: o.NoHeads = False,
    overwrite: o.Overwrite = False,
    verify: o.Verify = None,
    card: o.Card = None,
    onnx: o.Onnx = None,
    input_range: o.InputRange = None,
    input_layout: o.InputLayout = None,
    feature_output: o.FeatureOutput = None,
    pool: o.Pool = None,
    prefix_tokens: o.PrefixTokens = 1,
    list_encoders: o.ListEncoders = False,
    backend: o.Backend = None,
    trust_engines: o.TrustEngines = False,
    stall_limit: o.StallLimit = 600.0,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Export a network to a bundle, verify one, or print its card."""
    given = _given(ctx)
    way = _WAYS[next((name for name in _WAYS if name in given), "source")]
    _check_together(way, given)
    values: dict[str, Any] = {key: value for key, value in ctx.params.items() if key != "version"}
    code = way.run(o.Options(**values, given=frozenset(given)))
    if code:
        raise typer.Exit(code)


def _given(ctx: typer.Context) -> set[str]:
    """Return the names of the parameters that stand on the command line, whatever their values."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _check_together(way: Way, given: set[str]) -> None:
    """Refuse an option that would do nothing.

    Raises:
        ExportUsageError: naming it, and where it belongs.
    """
    foreign = sorted(given - way.takes)
    if "source" in foreign:
        raise ExportUsageError(f"{way.called} takes no SOURCE", way.example)
    if foreign and way.called == "SOURCE":
        homes = " or ".join(other.called for other in _WAYS.values() if foreign[0] in other.takes)
        raise ExportUsageError(f"{_option(foreign[0])} goes with {homes}", "leave it out")
    if foreign:
        takes = sorted(way.takes - _SAID, key=lambda name: (name == "as_json", name))
        others = [_option(name) for name in takes if _option(name) != way.called]
        if len(others) > _FEW:
            raise ExportUsageError(f"{_option(foreign[0])} does not go with {way.called}", way.example)
        only = "alone"
        if others:
            only = f"with {', '.join(others[:-1])}{' and ' if len(others) > 1 else ''}{others[-1]} only"
        raise ExportUsageError(f"{way.called} goes {only}", way.example)
    if {"tokens", "onnx"} <= given and "pool" not in given:
        raise ExportUsageError(
            "--tokens with --onnx: a file that gives one vector for each image has no patch tokens",
            "of a file that gives tokens [batch, T, D], add --pool cls, mean or cls+mean",
        )
    if "prefix_tokens" in given and "pool" not in given:
        raise ExportUsageError("--prefix-tokens is an option of --pool", "add --pool cls, mean or cls+mean")
    for name in sorted(_ENGINES & given):
        if "engine" not in given:
            raise ExportUsageError(
                f"{_option(name)} is an option of --engine", "add --engine tensorrt-rtx, or leave it out"
            )


def _option(name: str) -> str:
    return "--json" if name == "as_json" else f"--{name.replace('_', '-')}"


def main() -> None:
    """Entry point of `mtdp-export`."""
    from mtdp.errors import MtdpError
    from mtdp_export.errors import ExportError
    from mtdp_runtime.commands.console import run_app

    run_app(app, "mtdp-export", begins_itself=True, own_errors=(ExportError, MtdpError))
