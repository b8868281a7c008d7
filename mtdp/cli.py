"""`mtdp-train`: each command parses, calls one library function, and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from mtdp import cli_catalogue
from mtdp.errors import Interrupted, MtdpError

_Precision = Literal["auto", "fp32", "bf16", "fp16"]


class _ErrorsAsLines(TyperGroup):
    """The one place that turns an error into a line, a hint and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MtdpError as error:
            typer.echo(f"error: {error.message}", err=True)
            if error.hint:
                typer.echo(f"hint: {error.hint}", err=True)
            raise typer.Exit(error.exit_code) from None


app = typer.Typer(
    cls=_ErrorsAsLines,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Multi-task pre-training for digital pathology, and transfer to a task of your own (arXiv 2005.02561).",
)


@app.callback()
def _root() -> None:
    """A group even with one command."""


@app.command()
def pretrain(
    pool: Annotated[Path, typer.Option(help="TOML file that lists the tasks: [[task]] with name and path.")],
    out: Annotated[Path, typer.Option(help="Folder of the run: checkpoint, state to resume from, metrics.")],
    arch: Annotated[str, typer.Option(help="A torchvision ResNet or DenseNet, or timm:NAME.")] = "resnet50",
    only_shippable: Annotated[
        bool, typer.Option("--only-shippable", help="Leave out the tasks that the pool does not mark `ships = true`.")
    ] = False,
    init: Annotated[
        str,
        typer.Option(help="Starting weights: imagenet, random, mtdp (the authors'), or a .safetensors, .pth or run."),
    ] = "imagenet",
    iterations: Annotated[int, typer.Option(help="In all, warm-up included.")] = 50_000,
    warmup: Annotated[int, typer.Option(help="Iterations at the start that train only the heads.")] = 5_000,
    warmup_lr: Annotated[float, typer.Option(help="Learning rate of the heads in the warm-up.")] = 1e-3,
    lr: Annotated[float, typer.Option(help="Learning rate after the warm-up.")] = 1e-4,
    head_lr_multiplier: Annotated[float, typer.Option(help="The heads learn at --lr times this.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Samples a batch, all tasks mixed.")] = 64,
    image_px: Annotated[int, typer.Option(help="Side of the square input in pixels.")] = 224,
    seed: Annotated[int, typer.Option(help="Of the heads, the samples and their augmentation.")] = 0,
    precision: Annotated[
        _Precision,
        typer.Option(help="auto: bf16 where the GPU or the CPU is faster in it, fp16 on a GPU that has fp16 only."),
    ] = "auto",
    splits: Annotated[str, typer.Option(help="Splits of each task to train on, with commas.")] = "train,val",
    adaptation_batches: Annotated[
        int,
        typer.Option(help="Batches that first give batch norm the pool's statistics, at unchanged outputs; 0: none."),
    ] = 20,
    checkpoint_every: Annotated[float, typer.Option(help="Seconds between two saved states.")] = 300.0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write metrics to OUT/tensorboard.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last saved state in --out.")] = False,
) -> None:
    """Pre-train one network on all tasks of a pool together, one head a task."""
    from mtdp.pretrain import pretrain as run
    from mtdp.pretrain_config import PretrainConfig
    from mtdp.tasks import load_pool

    config = PretrainConfig(
        arch=arch,
        init=init,
        iterations=iterations,
        warmup=warmup,
        warmup_lr=warmup_lr,
        lr=lr,
        head_lr_multiplier=head_lr_multiplier,
        batch_size=batch_size,
        image_px=image_px,
        seed=seed,
        precision=precision,
        splits=tuple(part.strip() for part in splits.split(",")),
        adaptation_batches=adaptation_batches,
    )
    tasks = [task for task in load_pool(pool) if task.ships or not only_shippable]
    typer.echo(
        run(tasks, config, out, resume=resume, checkpoint_every_s=checkpoint_every, tensorboard=tensorboard),
    )


@app.command()
def finetune(
    task: Annotated[Path, typer.Option(help="Task folder, or its manifest.")],
    init: Annotated[str, typer.Option(help="Starting weights: as of pretrain, or a training run.")],
    out: Annotated[Path, typer.Option(help="Folder of the run: the best network, result.json, a run a rate.")],
    arch: Annotated[str | None, typer.Option(help="Architecture, where --init does not name it itself.")] = None,
    lr: Annotated[
        list[float] | None, typer.Option(help="Learning rate; several are compared on val.", show_default="the paper's")
    ] = None,
    epochs: Annotated[int, typer.Option(help="For each rate; the best on val is kept.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Images a batch.")] = 64,
    image_px: Annotated[
        int | None, typer.Option(help="Side of the square input in pixels.", show_default="that of --init, or 224")
    ] = None,
    metric: Annotated[
        Literal["auto", "accuracy", "roc_auc"], typer.Option(help="auto: ROC AUC for two classes, else accuracy.")
    ] = "auto",
    adaptation_batches: Annotated[
        int, typer.Option(help="Batches that first give batch norm the task's statistics, at unchanged outputs.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the head, the order and the augmentation.")] = 0,
    precision: Annotated[
        _Precision,
        typer.Option(help="auto: bf16 where the GPU or the CPU is faster in it, fp16 on a GPU that has fp16 only."),
    ] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last saved state in --out.")] = False,
) -> None:
    """Fine-tune a whole network on one task; --init random trains from scratch. Prints the result as JSON."""
    import json
    from dataclasses import asdict

    from mtdp.finetune import LEARNING_RATES, FinetuneConfig, finetune_best
    from mtdp.tasks import load_task
    from mtdp.weights import named_input

    arch, image_px = named_input(init, arch, image_px)
    config = FinetuneConfig(
        arch=arch,
        init=init,
        epochs=epochs,
        batch_size=batch_size,
        image_px=image_px,
        seed=seed,
        precision=precision,
        adaptation_batches=adaptation_batches,
    )
    found = finetune_best(load_task(task, metric=metric), config, out, tuple(lr or LEARNING_RATES), resume=resume)
    typer.echo(json.dumps(asdict(found)))


@app.command()
def loto(
    pool: Annotated[Path, typer.Option(help="TOML file that lists the tasks.")],
    out: Annotated[Path, typer.Option(help="Folder of the cells and of table.md, table.csv and table.png.")],
    arch: Annotated[str, typer.Option(help="A torchvision ResNet or DenseNet, or timm:NAME.")] = "resnet50",
    init: Annotated[str, typer.Option(help="Starting weights, as of pretrain.")] = "imagenet",
    evaluate: Annotated[
        list[str] | None,
        typer.Option(help="Task to leave out and judge; repeat.", show_default="all with val and test"),
    ] = None,
    lr: Annotated[
        list[float] | None, typer.Option(help="Of the grid; repeat.", show_default="1e-3, 1e-4, 1e-5, 1e-6")
    ] = None,
    head_lr_multiplier: Annotated[
        list[float] | None, typer.Option(help="Of the grid; repeat.", show_default="1, 5, 10")
    ] = None,
    warmup: Annotated[
        list[int] | None, typer.Option(help="Of the grid, in iterations; repeat.", show_default="5000, 0")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each combination.")] = 5,
    iterations: Annotated[int, typer.Option(help="Of each pre-training, warm-up included.")] = 50_000,
    warmup_lr: Annotated[float, typer.Option(help="Learning rate of the heads in the warm-up.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(help="Samples a batch.")] = 64,
    image_px: Annotated[int, typer.Option(help="Side of the square input, in training and in transfer.")] = 224,
    precision: Annotated[_Precision, typer.Option(help="Of training and transfer.")] = "auto",
    adaptation_batches: Annotated[int, typer.Option(help="Of batch norm, before each pre-training.")] = 20,
    finetune: Annotated[
        list[str] | None, typer.Option(help="Evaluated task to fine-tune on, too; repeat, or all.")
    ] = None,
    finetune_lr: Annotated[
        list[float] | None, typer.Option(help="Repeat.", show_default="1e-3, 1e-4, 1e-5, 1e-6")
    ] = None,
    finetune_epochs: Annotated[int, typer.Option(help="For each rate.")] = 100,
    scratch: Annotated[
        bool, typer.Option("--scratch", help="Also train from random weights, where fine-tuned.")
    ] = False,
    joint: Annotated[bool, typer.Option("--joint", help="Also joint training on the whole pool.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the cells and the time they take; train nothing.")
    ] = False,
) -> None:
    """The paper's protocol: leave tasks out, pre-train on the rest, transfer, and put the results in a table.

    A run that was stopped goes on with the next missing cell; several processes may share one --out. An option given
    once makes a grid of one.
    """
    from mtdp.finetune import LEARNING_RATES
    from mtdp.protocol.config import ProtocolConfig
    from mtdp.protocol.estimate import say_plan
    from mtdp.protocol.run import Protocol, run_protocol, to_stderr
    from mtdp.protocol.tables import write_tables
    from mtdp.tasks import load_pool

    config = ProtocolConfig(
        arch=arch,
        init=init,
        evaluate=tuple(evaluate or ()),
        lrs=tuple(lr or LEARNING_RATES),
        head_lr_multipliers=tuple(head_lr_multiplier or (1.0, 5.0, 10.0)),
        warmups=tuple(warmup if warmup is not None else (5_000, 0)),
        seeds=seeds,
        iterations=iterations,
        warmup_lr=warmup_lr,
        batch_size=batch_size,
        image_px=image_px,
        precision=precision,
        adaptation_batches=adaptation_batches,
        finetune=tuple(finetune or ()),
        finetune_lrs=tuple(finetune_lr or LEARNING_RATES),
        finetune_epochs=finetune_epochs,
        scratch=scratch,
        joint=joint,
    )
    protocol = Protocol(load_pool(pool), config, out)
    if dry_run:
        say_plan(protocol, typer.echo)
        return
    try:
        run_protocol(protocol, to_stderr)
    except Interrupted:
        write_tables(protocol)  # of what is there
        raise
    for path in write_tables(protocol):
        typer.echo(path)
    typer.echo((out / "table.md").read_text("utf-8"))


@app.command()
def probe(
    task: Annotated[Path, typer.Option(help="Task folder, or its manifest.")],
    init: Annotated[
        str,
        typer.Option(help="Features of: a run, a checkpoint or a bundle; or imagenet, random, mtdp, a weights file."),
    ],
    arch: Annotated[str | None, typer.Option(help="Architecture, where --init does not name it itself.")] = None,
    metric: Annotated[
        Literal["auto", "accuracy", "roc_auc"], typer.Option(help="auto: ROC AUC for two classes, else accuracy.")
    ] = "auto",
    image_px: Annotated[
        int | None, typer.Option(help="Side of the square input in pixels.", show_default="that of --init, or its own")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random weights, and of the SVM's solver.")] = 0,
    precision: Annotated[_Precision, typer.Option(help="Of the feature extraction.")] = "auto",
) -> None:
    """Judge features on a task: a linear SVM fitted on train and val, scored once on test; prints JSON."""
    import json
    from dataclasses import asdict

    from mtdp.tasks import load_task
    from mtdp.transfer import load_extractor, probe_task

    extractor = load_extractor(init, arch, seed, image_px)
    result = probe_task(extractor, load_task(task, metric=metric), seed=seed, precision=precision)
    typer.echo(json.dumps(asdict(result)))


cli_catalogue.register(app)


def main() -> None:
    """The entry point of `mtdp-train`."""
    app()
