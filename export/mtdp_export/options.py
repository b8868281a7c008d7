"""The options of mtdp-export, each once: what it is called, what it takes, what it says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

Triple = tuple[float, float, float]


def _help_of(way: str, text: str, **more: Any) -> Any:
    return typer.Option(help=f"With {way}: {text}", **more)


Source = Annotated[
    str | None,
    typer.Argument(
        metavar="SOURCE",
        help="A run, a checkpoint, an encoder of --list-encoders, an architecture (resnet50, timm:NAME), or a folder "
        "of Hugging Face.",
    ),
]
Out = Annotated[Path | None, typer.Option(help="Folder of the bundle.", metavar="BUNDLE")]
Weights = Annotated[
    str | None, typer.Option(help="Of an encoder or architecture: a file; imagenet, mtdp (the paper's), random.")
]
Feature = Annotated[
    str | None,
    typer.Option(help="Which values: cls, mean (of patch tokens), cls+mean, pooled, stage3; the encoder's own if out."),
]
ArchArg = Annotated[
    list[str] | None,
    typer.Option("--arch-arg", metavar="NAME=VALUE", help="With timm:NAME: an argument of its constructor."),
]
Precision = Annotated[
    list[str] | None, typer.Option(help="fp32 (also if left out), fp16, bf16, int8, each by its own --precision.")
]
WeightsStorage = Annotated[
    str, typer.Option(help="fp32, or fp16: half the size; the graph casts them back and computes in fp32.")
]
TilePx = Annotated[int | None, typer.Option(help="Side of a tile as it is read; the model's own, or 224.")]
Resize = Annotated[
    int | None,
    typer.Option("--resize", metavar="PX", help="The graph resizes a tile to this side first, as torchvision does."),
]
Crop = Annotated[
    int | None, typer.Option("--crop", metavar="PX", help="The graph then cuts out the centre of this side.")
]
Mean = Annotated[
    Triple | None,
    typer.Option(help="Of R G B on the scale 0..1, subtracted; the library's or the run's own if left out."),
]
Std = Annotated[Triple | None, typer.Option(help="Of R G B, divides what is left. A file of weights needs both said.")]
Interpolation = Annotated[
    str | None, typer.Option(help="By which images are resized: bilinear, bicubic or lanczos.", metavar="NAME")
]
Mpp = Annotated[
    float | None, typer.Option(help="µm per pixel at which the model wants to see tissue; the encoder's own, or 0.5.")
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        help="Slide, or folder of images, for the golden tiles (synthetic ones if left out) and for int8.",
        metavar="SLIDE|DIR",
    ),
]
Engine = Annotated[
    list[str] | None, typer.Option(help="Build an engine ahead of time: tensorrt-rtx (needs no GPU), tensorrt.")
]
Batch = Annotated[tuple[int, int, int], _help_of("--engine", "smallest, best and largest batch.")]
ComputeCapability = Annotated[
    list[str] | None, typer.Option(help="tensorrt-rtx: build for these alone, such as 8.9; 8.0 and later if left out.")
]
HardwareCompatibility = Annotated[
    str, typer.Option(help="tensorrt: other GPUs that it may run on: none, same-compute-capability, ampere-plus.")
]
VersionCompatible = Annotated[
    bool, typer.Option("--version-compatible", help="tensorrt: may run on later releases of the same major version.")
]
ProbeTask = Annotated[
    Path | None, _help_of("int8", "the labelled task whose linear probe must score as with fp32.", metavar="TASK")
]
Name = Annotated[str | None, typer.Option(help="Name of the model; the folder's if left out.")]
Licence = Annotated[str, typer.Option(help="Licence of the weights, where the source does not say it.")]
NoHeads = Annotated[bool, typer.Option("--no-heads", help="Leave the classification heads out.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a bundle.")]
Verify = Annotated[
    Path | None, typer.Option(help="Replay the golden tiles of a bundle on this machine.", metavar="BUNDLE")
]
Card = Annotated[Path | None, typer.Option(help="Print the model card of a bundle, as Markdown.", metavar="BUNDLE")]
Onnx = Annotated[
    Path | None, typer.Option(help="Bring a feature extractor of your own, in place of SOURCE.", metavar="FILE")
]
InputRange = Annotated[
    int | None, _help_of("--onnx", "1 for pixels of 0..1 (also if left out), 255 for 0..255; of --mean and --std, too.")
]
InputLayout = Annotated[str | None, _help_of("--onnx", "nchw or nhwc, where its shape leaves it open.")]
FeatureOutput = Annotated[str | None, _help_of("--onnx", "the output that is the feature, where there are several.")]
Pool = Annotated[str | None, _help_of("--onnx", "of tokens [N, T, D]: cls, mean (of the patch tokens), or cls+mean.")]
PrefixTokens = Annotated[
    int, _help_of("--pool", "tokens before those of the patches: 1 for a class token, 5 with 4 registers, 0 for none.")
]
ListEncoders = Annotated[
    bool, typer.Option("--list-encoders", help="Print the encoders whose names mtdp-export knows.")
]
Backend = Annotated[list[str] | None, _help_of("--verify", "only this engine.")]
TrustEngines = Annotated[
    bool,
    typer.Option("--trust-engines", help="With --verify: run the bundle's engines, too. They are code."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Do not say what is being done.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say after each stage what it took.")]


@dataclass(frozen=True, slots=True)
class Options:
    """What stands on the command line, defaults filled in, by the names of the parameters."""

    source: str | None
    out: Path | None
    weights: str | None
    feature: str | None
    arch_arg: list[str] | None
    precision: list[str] | None
    weights_storage: str
    tile_px: int | None
    resize: int | None
    crop: int | None
    mean: Triple | None
    std: Triple | None
    interpolation: str | None
    mpp: float | None
    calibration: Path | None
    engine: list[str] | None
    batch: tuple[int, int, int]
    compute_capability: list[str] | None
    hardware_compatibility: str
    version_compatible: bool
    probe_task: Path | None
    name: str | None
    licence: str
    no_heads: bool
    overwrite: bool
    verify: Path | None
    card: Path | None
    onnx: Path | None
    input_range: int | None
    input_layout: str | None
    feature_output: str | None
    pool: str | None
    prefix_tokens: int
    list_encoders: bool
    backend: list[str] | None
    trust_engines: bool
    as_json: bool
    quiet: bool
    verbose: bool
    given: frozenset[str]  # the parameters that were named, whatever their values
