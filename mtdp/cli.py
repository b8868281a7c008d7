"""`mtdp-train`: each command parses, calls one library function, and prints."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from mtdp.errors import MtdpError


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
        Literal["auto", "fp32", "bf16"], typer.Option(help="auto: bf16 where the GPU, or the CPU's AMX, has it.")
    ] = "auto",
    splits: Annotated[str, typer.Option(help="Splits of each task to train on, with commas.")] = "train,val",
    adaptation_batches: Annotated[
        int,
        typer.Option(help="Batches that first give batch norm the pool's statistics, at unchanged outputs; 0: none."),
    ] = 20,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last saved state in --out.")] = False,
) -> None:
    """Pre-train one network on all tasks of a pool together, one head a task."""
    from mtdp.pretrain import PretrainConfig
    from mtdp.pretrain import pretrain as run
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
    typer.echo(run(tasks, config, out, resume=resume))


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
    seed: Annotated[int, typer.Option(help="Of random weights, and of the SVM's solver.")] = 0,
    precision: Annotated[Literal["auto", "fp32", "bf16"], typer.Option(help="Of the feature extraction.")] = "auto",
) -> None:
    """Judge features on a task: a linear SVM fitted on train and val, scored once on test; prints JSON."""
    import json
    from dataclasses import asdict

    from mtdp.tasks import load_task
    from mtdp.transfer import load_extractor, probe_task

    extractor = load_extractor(init, arch, seed)
    result = probe_task(extractor, load_task(task, metric=metric), seed=seed, precision=precision)
    typer.echo(json.dumps(asdict(result)))


def main() -> None:
    """The entry point of `mtdp-train`."""
    app()
