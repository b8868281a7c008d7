"""What the commands of `mtdp-train` share: options by one name, errors as lines, and what -v says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from mtdp.errors import LIST_ITEM, MtdpError, UsageError

PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]
MetricName = Literal["auto", "accuracy", "roc_auc"]

# What each exit code means: the last lines of every --help.
EXIT_CODES: Final = (
    "Exit codes: 0: all is done; 1: something failed (a task, an image, memory, a training that diverged); "
    "2: an option, a path, weights or a checkpoint cannot be used; 130, 143: stopped by SIGINT, SIGTERM; the state is "
    "saved where the command has --resume."
)

# What other commands call an option; accepted here, too, and not shown.
ALIASES: Final = {"--weights": "--init", "--tile-px": "--image-px", "--batch": "--batch-size"}


class Group(TyperGroup):
    """The one place that turns an error into a line, a hint and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MtdpError as error:
            typer.echo(f"error: {_printable(error.message)}", err=True)
            if error.hint:
                typer.echo(f"hint: {_printable(error.hint)}", err=True)
            raise typer.Exit(error.exit_code) from None


def _printable(text: str) -> str:
    """Return text for a terminal, its lists line by line: a name in a foreign file may hold what would command it."""
    parts = text.split(LIST_ITEM)
    return LIST_ITEM.join("".join(c if c.isprintable() else ascii(c)[1:-1] for c in part) for part in parts)


class PlainHelp(TyperCommand):
    """A command whose help names an argument without its type, which would say less than the name does."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options."""
        arguments, options = [], []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and parameter.param_type_name == "argument":
                arguments.append((record[0].split(" <")[0], record[1]))
            elif record is not None:
                options.append(record)
        for title, records in (("Arguments", arguments), ("Options", options)):
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class Command(PlainHelp):
    """A command that takes an option by the names of the other commands, too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {name for parameter in self.params for name in parameter.opts}
        given = []
        for number, argument in enumerate(args):
            if argument == "--":
                given += args[number:]
                break
            name, equals, value = argument.partition("=")
            if name not in own and ALIASES.get(name) in own:
                name = ALIASES[name]
            given.append(name + equals + value)
        return super().parse_args(ctx, given)


def add(app: typer.Typer, *commands: Callable[..., None]) -> None:
    """Add commands whose help ends with the exit codes; the list of commands has their whole first sentences."""
    for command in commands:
        first = " ".join((command.__doc__ or "").split("\n\n")[0].split())
        app.command(cls=Command, epilog=EXIT_CODES, short_help=first)(command)


def print_version(wanted: bool) -> None:
    """Print the version and end, where it was asked for."""
    if wanted:
        import mtdp

        typer.echo(f"mtdp-train {mtdp.__version__}")
        raise typer.Exit


def begin(verbose: bool, huge_images: bool = False) -> None:
    """What every command does first: -v says what it runs on, --huge-images lifts the limit."""
    if huge_images:
        from mtdp.images import allow_huge_images

        allow_huge_images()
    if verbose:
        import platform

        import torch

        import mtdp
        from mtdp.devices import best_device, choose_precision, usable_cores

        device = best_device()
        words = [f"mtdp {mtdp.__version__}", f"torch {torch.__version__}", f"python {platform.python_version()}"]
        words += [f"{device.type}, {usable_cores()} cores, {torch.get_num_threads()} threads"]
        words += [f"--precision auto is {choose_precision('auto', device)}"]
        print("; ".join(words), file=sys.stderr, flush=True)


def show(run: Path, quiet: bool) -> None:
    """Write the page of a run, and say where it is; one that cannot be written is said, too, and fails nothing."""
    from mtdp.run_page import write_run_page

    try:
        text = f"page: {write_run_page(run)}"
    except MtdpError as error:
        text = f"no page: {error.message}"
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def comma_list(text: str) -> tuple[str, ...]:
    """Return the parts of a text between its commas."""
    return tuple(part.strip() for part in text.split(","))


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """Return the whole numbers of a list such as 1,5,20."""
    try:
        return tuple(int(part) for part in comma_list(text))
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a list of whole numbers", "for example 1,5,20") from None


Pool = Annotated[
    Path, typer.Option(metavar="FILE", help="TOML file that lists the tasks: one [[task]] with name and path for each.")
]
TaskPath = Annotated[Path, typer.Option("--task", metavar="TASK", help="Task folder, or its table.")]
Arch = Annotated[str, typer.Option(metavar="NAME", help="A torchvision ResNet or DenseNet, or timm:NAME.")]
OwnArch = Annotated[
    str | None, typer.Option(metavar="NAME", help="Architecture, where --init does not name it itself.")
]
Init = Annotated[
    str,
    typer.Option(
        metavar="WEIGHTS",
        help="Starting weights: imagenet, random, mtdp (the authors'), or a .safetensors, .pth or run.",
    ),
]
Source = Annotated[
    str,
    typer.Option(
        metavar="WEIGHTS",
        help="What gives the features: a run, a checkpoint, a bundle, a weights file, imagenet, random, mtdp, colour.",
    ),
]
BatchSize = Annotated[int, typer.Option(metavar="N", help="Images in each batch, all tasks mixed.")]
ImagePx = Annotated[int, typer.Option(metavar="N", help="Side of the square input in pixels.")]
OwnImagePx = Annotated[
    int | None,
    typer.Option(metavar="N", help="Side of the square input in pixels.", show_default="that of --init, or its own"),
]
Iterations = Annotated[int, typer.Option(metavar="N", help="Iterations of each pre-training, warm-up included.")]
WarmupLr = Annotated[float, typer.Option(metavar="X", help="Learning rate of the heads in the warm-up.")]
Adaptation = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="Before training, batch norm takes its statistics from this many batches; outputs stay the same. 0: off.",
    ),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of everything that is random.")]
Precision = Annotated[
    PrecisionName,
    typer.Option(help="auto: bf16 where the GPU or the CPU is faster in it, fp16 on a GPU that has fp16 only."),
]
Metric = Annotated[MetricName, typer.Option(help="auto: ROC AUC for two classes, else accuracy.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last saved state in --out.")]
HugeImages = Annotated[bool, typer.Option("--huge-images", help="Also take images of more than 179 million pixels.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only results and errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also print versions, device and precision.")]
PAPER_RATES: Final = "1e-3, 1e-4, 1e-5, 1e-6"

Rate = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Learning rate after the warm-up. The paper chose 1e-3 for ResNet-50 and 1e-4 for DenseNet-121.",
        show_default="1e-3 for resnet50, else 1e-4",
    ),
]
Multiplier = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="The heads learn at --lr times this. The paper chose 1 for ResNet-50 and 5 for DenseNet-121.",
        show_default="5 for densenet121, else 1",
    ),
]
Optimiser = Annotated[Literal["sgd", "adamw"], typer.Option(help="The paper uses sgd; vision transformers want adamw.")]
WeightDecay = Annotated[
    float, typer.Option(metavar="X", help="Weight decay of the matrices; 0.05 is usual with adamw.")
]
Schedule = Annotated[
    Literal["constant", "cosine"], typer.Option(help="cosine: the rates fall to 0 at the last iteration.")
]
LrRise = Annotated[
    int, typer.Option(metavar="N", help="Iterations after the warm-up of the heads in which the rates rise linearly.")
]
LayerDecay = Annotated[
    float,
    typer.Option(metavar="X", help="The rate of each layer is this times that of the next; 0.75 is usual for ViT."),
]
DropPath = Annotated[
    float, typer.Option(metavar="X", help="Chance that a branch of the last block is left out, for ViT.")
]

Evaluated = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TASK",
        help="Task to leave out and evaluate; repeat it for several.",
        show_default="all with val and test",
    ),
]
Rates = Annotated[
    list[float] | None,
    typer.Option(metavar="X", help="Learning rate of the grid; repeat it for several.", show_default=PAPER_RATES),
]
Multipliers = Annotated[
    list[float] | None,
    typer.Option(
        metavar="X", help="The heads learn at --lr times this; repeat it for a grid.", show_default="1, 5, 10"
    ),
]
Warmups = Annotated[
    list[int] | None,
    typer.Option(
        metavar="N", help="Iterations that train only the heads; repeat it for a grid.", show_default="5000, 0"
    ),
]
Finetuned = Annotated[
    list[str] | None,
    typer.Option(metavar="TASK", help="Evaluated task to fine-tune on as well; repeat it, or say all."),
]
Scratch = Annotated[bool, typer.Option("--scratch", help="Also train the fine-tuned tasks from random weights.")]
Scheduler = Annotated[
    Literal["local", "ray"],
    typer.Option(help="What runs the workers: processes here, or tasks of a Ray cluster (pip install 'mtdp[ray]')."),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Join this Ray cluster (HOST:PORT, or auto). All its machines must see the pool, its images and --out "
        "under the same paths.",
        show_default="one is started here",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Compute so many cells at once, each with its part of the cores or its own GPU.",
        min=1,
        show_default="1; of --ray-address, one for each GPU or machine",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the cells and the time they take; train nothing.")]
Release = Annotated[
    bool,
    typer.Option(
        "--release",
        help="At the end, also train one network on all images of all tasks, test splits included, with the "
        "combination that is best overall, as the paper did for its published networks. It is written to OUT/release.",
    ),
]
