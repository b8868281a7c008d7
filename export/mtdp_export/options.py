"""The options of mtdp-export, each once: what it is called, what it takes, what it says of itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from mtdp_runtime.settings import BackendName

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
    str | None,
    typer.Option(
        metavar="WEIGHTS",
        help="Of an encoder or an architecture: a file, imagenet, mtdp (the paper's) or random.",
    ),
]
Feature = Annotated[
    str | None,
    typer.Option(
        metavar="cls|mean|cls+mean|pooled|stage3",
        help="Which values are the feature: cls, mean (of the patch tokens), ...; the encoder's own if left out.",
    ),
]
Tokens = Annotated[
    bool,
    typer.Option(
        "--tokens",
        help="The graph also gives the tokens of a tile's patches, for mtdp-extract --tokens. With --onnx: add --pool.",
    ),
]
ArchArg = Annotated[
    list[str] | None,
    typer.Option(
        "--arch-arg",
        metavar="NAME=VALUE",
        help="With timm:NAME: an argument of its constructor; repeat it for several.",
    ),
]
Precision = Annotated[
    list[str] | None,
    typer.Option(
        metavar="fp32|fp16|bf16|int8", help="A variant to write; repeat it for several. fp32 alone if left out."
    ),
]
WeightsStorage = Annotated[
    str,
    typer.Option(
        metavar="fp32|fp16",
        help="How weights are stored. fp16: half the size; the graph casts them back and computes in fp32.",
    ),
]
TilePx = Annotated[
    int | None, typer.Option(metavar="PX", help="Side of a tile as it is read; the model's own, or 224, if left out.")
]
Resize = Annotated[
    int | None,
    typer.Option("--resize", metavar="PX", help="The graph resizes a tile to this side first, as torchvision does."),
]
Crop = Annotated[
    int | None, typer.Option("--crop", metavar="PX", help="The graph then cuts out the centre of this side.")
]
Mean = Annotated[
    Triple | None,
    typer.Option(metavar="R G B", help="Subtracted from pixels of 0..1; the library's or the run's own if left out."),
]
Std = Annotated[
    Triple | None,
    typer.Option(metavar="R G B", help="Divides what is left. A file of weights needs both --mean and --std."),
]
Interpolation = Annotated[str | None, typer.Option(help="How images are resized.", metavar="bilinear|bicubic|lanczos")]
Mpp = Annotated[
    float | None,
    typer.Option(
        metavar="UM",
        help="µm per pixel at which the model wants to see tissue; the encoder's own, or 0.5, if left out.",
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        help="A slide or a folder of images: tiles of it become the golden tiles (synthetic ones if left out) and "
        "calibrate int8.",
        metavar="SLIDE|DIR",
    ),
]
Engine = Annotated[
    list[str] | None,
    typer.Option(
        metavar="tensorrt-rtx|tensorrt", help="Build an engine ahead of time; tensorrt-rtx needs no GPU for it."
    ),
]
Batch = Annotated[
    tuple[int, int, int], _help_of("--engine", "smallest, best and largest batch.", metavar="MIN BEST MAX")
]
ComputeCapability = Annotated[
    list[str] | None,
    typer.Option(
        metavar="X.Y",
        help="With tensorrt-rtx: build only for GPUs of this one, such as 8.9; repeat it. 8.0 and later if left out.",
    ),
]
HardwareCompatibility = Annotated[
    str,
    typer.Option(
        metavar="none|same-compute-capability|ampere-plus", help="With tensorrt: other GPUs that the engine may run on."
    ),
]
VersionCompatible = Annotated[
    bool,
    typer.Option("--version-compatible", help="With tensorrt: may run on later releases of the same major version."),
]
ProbeTask = Annotated[
    Path | None, _help_of("int8", "a labelled task; its linear probe must score as with fp32.", metavar="TASK")
]
Name = Annotated[str | None, typer.Option(metavar="NAME", help="Name of the model; the folder's if left out.")]
Licence = Annotated[str, typer.Option(metavar="TEXT", help="Licence of the weights, where the source does not say it.")]
NoHeads = Annotated[bool, typer.Option("--no-heads", help="Leave the classification heads out.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is already there.")]
Verify = Annotated[
    Path | None,
    typer.Option(
        help="Replay the golden tiles of a bundle on this machine: a folder, or hf:OWNER/NAME@REVISION.",
        metavar="BUNDLE",
    ),
]
Card = Annotated[Path | None, typer.Option(help="Print the model card of a bundle, as Markdown.", metavar="BUNDLE")]
Onnx = Annotated[
    Path | None, typer.Option(help="Bring a feature extractor of your own, in place of SOURCE.", metavar="FILE")
]
InputRange = Annotated[
    int | None,
    _help_of(
        "--onnx",
        "the scale of pixels, --mean and --std: 1 for 0..1 (also if left out), 255 for 0..255.",
        metavar="1|255",
    ),
]
InputLayout = Annotated[
    str | None, _help_of("--onnx", "order of the input's axes, where its shape leaves it open.", metavar="nchw|nhwc")
]
FeatureOutput = Annotated[
    str | None, _help_of("--onnx", "the output that is the feature, where there are several.", metavar="NAME")
]
Pool = Annotated[
    str | None,
    _help_of("--onnx", "what is taken of tokens [N, T, D]; mean is of the patch tokens.", metavar="cls|mean|cls+mean"),
]
PrefixTokens = Annotated[
    int,
    _help_of(
        "--pool",
        "tokens before those of the patches: 1 for a class token, 5 with 4 registers, 0 for none.",
        metavar="N",
    ),
]
ListEncoders = Annotated[
    bool, typer.Option("--list-encoders", help="Print the encoders whose names mtdp-export knows.")
]
Backend = Annotated[
    list[str] | None,
    _help_of(
        "--verify",
        "only this engine; repeat it for several.",
        metavar="|".join(name for name in get_args(BackendName) if name != "auto"),
    ),
]
TrustEngines = Annotated[
    bool,
    typer.Option("--trust-engines", help="With --verify: run the bundle's engines, too. They are code."),
]
StallLimit = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        min=0,
        help="With --onnx and --verify: one step that takes longer ends the command, since a hostile file may keep an "
        "engine busy for ever. 0: wait for ever.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Do not print what is being done.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print after each stage what it took.")]


@dataclass(frozen=True, slots=True)
class Options:
    """What stands on the command line, defaults filled in, by the names of the parameters."""

    source: str | None
    out: Path | None
    weights: str | None
    feature: str | None
    tokens: bool
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
    stall_limit: float
    as_json: bool
    quiet: bool
    verbose: bool
    given: frozenset[str]  # the parameters that were named, whatever their values

    @property
    def limit_s(self) -> float:
        """How long one step may take; without end where 0 was given."""
        return self.stall_limit or math.inf
