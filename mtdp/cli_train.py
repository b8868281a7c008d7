"""`mtdp-train pretrain`, `finetune` and `probe`: one network, one result; `page`: a run as a page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from mtdp import cli_options as o


def register(app: typer.Typer) -> None:
    """Add the commands."""
    o.add(app, pretrain, finetune, probe, page)


def pretrain(
    *,
    pool: o.Pool,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder of the run: checkpoint, state to resume from, metrics.")
    ],
    arch: o.Arch = "resnet50",
    only_shippable: Annotated[
        bool, typer.Option("--only-shippable", help="Leave out the tasks that the pool does not mark `ships = true`.")
    ] = False,
    init: o.Init = "imagenet",
    iterations: Annotated[int, typer.Option(metavar="N", help="Number of iterations, warm-up included.")] = 50_000,
    warmup: Annotated[
        int, typer.Option(metavar="N", help="Iterations at the start that train only the heads.")
    ] = 5_000,
    warmup_lr: o.WarmupLr = 1e-3,
    lr: o.Rate = None,
    head_lr_multiplier: o.Multiplier = None,
    batch_size: o.BatchSize = 64,
    image_px: o.ImagePx = 224,
    seed: o.Seed = 0,
    precision: o.Precision = "auto",
    splits: Annotated[
        str, typer.Option(metavar="NAMES", help="Splits of each task to train on, separated by commas.")
    ] = "train,val",
    adaptation_batches: o.Adaptation = 20,
    optimiser: o.Optimiser = "sgd",
    weight_decay: o.WeightDecay = 0.0,
    schedule: o.Schedule = "constant",
    lr_rise: o.LrRise = 0,
    layer_decay: o.LayerDecay = 1.0,
    drop_path: o.DropPath = 0.0,
    checkpoint_every: Annotated[float, typer.Option(metavar="X", help="Seconds between two saved states.")] = 300.0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write metrics to OUT/tensorboard.")] = False,
    resume: o.Resume = False,
    huge_images: o.HugeImages = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Pre-train one network on all tasks of a pool together, with one head for each task."""
    from mtdp.parallel import leads_all
    from mtdp.pretrain import pretrain as run
    from mtdp.pretrain_config import PretrainConfig
    from mtdp.tasks import load_pool

    o.begin(verbose, huge_images)
    config = PretrainConfig(
        arch=arch,
        init=init,
        iterations=iterations,
        warmup=warmup,
        warmup_lr=warmup_lr,
        lr=math.nan if lr is None else lr,
        head_lr_multiplier=math.nan if head_lr_multiplier is None else head_lr_multiplier,
        batch_size=batch_size,
        image_px=image_px,
        seed=seed,
        precision=precision,
        splits=o.comma_list(splits),
        optimiser=optimiser,
        weight_decay=weight_decay,
        schedule=schedule,
        lr_rise=lr_rise,
        layer_decay=layer_decay,
        drop_path=drop_path,
        adaptation_batches=adaptation_batches,
    )
    tasks = [task for task in load_pool(pool) if task.ships or not only_shippable]
    every_s = checkpoint_every
    typer.echo(run(tasks, config, out, resume=resume, checkpoint_every_s=every_s, quiet=quiet, tensorboard=tensorboard))
    if leads_all():
        o.show(out, quiet)


def finetune(
    *,
    task: o.TaskPath,
    init: Annotated[str, typer.Option(metavar="WEIGHTS", help="Starting weights: as in pretrain, or a training run.")],
    out: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Folder of the run: the best network, result.json, a run for each rate."),
    ],
    arch: o.OwnArch = None,
    lr: Annotated[
        list[float] | None,
        typer.Option(
            metavar="X", help="Learning rate; repeat it, and the best on val is taken.", show_default=o.PAPER_RATES
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(metavar="N", help="Epochs for each rate; the best on val is kept.")] = 100,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Images in each batch.")] = 64,
    image_px: Annotated[
        int | None,
        typer.Option(metavar="N", help="Side of the square input in pixels.", show_default="that of --init, or 224"),
    ] = None,
    metric: o.Metric = "auto",
    adaptation_batches: o.Adaptation = 0,
    seed: o.Seed = 0,
    precision: o.Precision = "auto",
    resume: o.Resume = False,
    huge_images: o.HugeImages = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Fine-tune a whole network on one task; --init random trains from scratch. Print the result as JSON."""
    import json
    from dataclasses import asdict

    from mtdp.confusions import confusion, write_confusions
    from mtdp.finetune import LEARNING_RATES, FinetuneConfig, finetune_best
    from mtdp.tasks import load_task
    from mtdp.weights import named_input

    o.begin(verbose, huge_images)
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
    rates = tuple(lr or LEARNING_RATES)
    loaded = load_task(task, metric=metric)
    found = finetune_best(loaded, config, out, rates, resume=resume, quiet=quiet)
    write_confusions(out, [confusion("fine-tuned", loaded, found.outputs)])
    o.show(out, quiet)
    typer.echo(json.dumps({name: value for name, value in asdict(found).items() if name != "outputs"}))


def probe(
    *,
    task: o.TaskPath,
    init: o.Source,
    arch: o.OwnArch = None,
    metric: o.Metric = "auto",
    image_px: o.OwnImagePx = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of random weights and of the SVM's solver.")] = 0,
    precision: o.Precision = "auto",
    huge_images: o.HugeImages = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Score features on a task: a linear SVM fitted on train and val, scored once on test. Print JSON."""
    import json
    from dataclasses import asdict

    from mtdp.tasks import load_task
    from mtdp.transfer import load_extractor, probe_task, sureness

    o.begin(verbose, huge_images)
    loaded = load_task(task, metric=metric)
    result = probe_task(load_extractor(init, arch, seed, image_px), loaded, seed=seed, precision=precision)
    told = {name: value for name, value in asdict(result).items() if name != "outputs"}
    typer.echo(json.dumps({**told, **sureness(result, loaded)}))


def page(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run: the --out of another command.")],
    *,
    huge_images: o.HugeImages = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Write the page of a run anew, RUN/index.html, of what its folder holds: curves, scores, mistakes."""
    from mtdp.run_page import write_run_page

    o.begin(verbose, huge_images)
    written = write_run_page(run)
    if not quiet:
        typer.echo(written)
