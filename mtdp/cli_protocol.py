"""`mtdp-train loto`, `evaluate` and `breakhis`: many results in one table."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mtdp import cli_options as o
from mtdp.errors import CellsFailed, Interrupted, UsageError

if TYPE_CHECKING:
    from mtdp.protocol.run import Protocol


def register(app: typer.Typer) -> None:
    """Add the commands."""
    o.add(app, loto, evaluate, breakhis)


def loto(
    *,
    pool: o.Pool,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder of the cells and of table.md, table.csv and table.png.")
    ],
    arch: o.Arch = "resnet50",
    init: o.Init = "imagenet",
    evaluate: o.Evaluated = None,
    lr: o.Rates = None,
    head_lr_multiplier: o.Multipliers = None,
    warmup: o.Warmups = None,
    seeds: Annotated[int, typer.Option(metavar="N", help="Runs of each combination.")] = 5,
    iterations: o.Iterations = 50_000,
    warmup_lr: o.WarmupLr = 1e-3,
    batch_size: o.BatchSize = 64,
    image_px: Annotated[
        int, typer.Option(metavar="N", help="Side of the square input, in training and in transfer.")
    ] = 224,
    precision: o.Precision = "auto",
    adaptation_batches: o.Adaptation = 20,
    finetune: o.Finetuned = None,
    finetune_lr: Annotated[
        list[float] | None,
        typer.Option(
            metavar="X", help="Learning rate of fine-tuning; repeat it for several.", show_default=o.PAPER_RATES
        ),
    ] = None,
    finetune_epochs: Annotated[int, typer.Option(metavar="N", help="Epochs of fine-tuning for each rate.")] = 100,
    scratch: o.Scratch = False,
    joint: Annotated[bool, typer.Option("--joint", help="Also do the joint training on the whole pool.")] = False,
    release: o.Release = False,
    scheduler: o.Scheduler = "local",
    ray_address: o.RayAddress = None,
    workers: o.Workers = None,
    dry_run: o.DryRun = False,
    huge_images: o.HugeImages = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Run the paper's protocol: leave tasks out, pre-train on the rest, transfer, and put the results in a table.

    A run that was stopped goes on with the next missing cell; several processes may share one --out, and --workers
    starts several, here or on a Ray cluster. Where an option of the grid is given once, only this value is tried. By
    this protocol the paper chose 1e-3 and multiplier 1 for ResNet-50, 1e-4 and 5 for DenseNet-121, with warm-up for
    both.
    """
    from mtdp.finetune import LEARNING_RATES
    from mtdp.protocol.config import ProtocolConfig
    from mtdp.protocol.estimate import say_plan
    from mtdp.protocol.run import Protocol, quiet_steps
    from mtdp.tasks import load_pool

    o.begin(verbose, huge_images)
    many = check_workers(scheduler, ray_address, workers)
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
        release=release,
    )
    protocol = Protocol(load_pool(pool), config, out, quiet_steps(quiet or many))
    if dry_run:
        say_plan(protocol, typer.echo)
        return
    _compute(protocol, (scheduler, ray_address, workers) if many else None, quiet)


def _compute(protocol: Protocol, crew: tuple[str, str | None, int | None] | None, quiet: bool) -> None:
    """Compute all cells, by a crew or in this process, and write the tables, also of a part of them."""
    from mtdp.protocol.run import run_protocol, to_stderr
    from mtdp.protocol.tables import write_tables

    say = to_stderr if not quiet else lambda text: None
    try:
        if crew is not None:
            _run_by_many(protocol, *crew, say)
        else:
            run_protocol(protocol, say)
    except (Interrupted, CellsFailed):
        write_tables(protocol)  # of what is there
        raise
    for path in write_tables(protocol):
        typer.echo(path)
    _show_protocol(protocol, quiet)
    typer.echo((protocol.out / "table.md").read_text("utf-8"))


def check_workers(scheduler: str, ray_address: str | None, workers: int | None) -> bool:
    """Whether cells are computed by workers, and not in this process.

    Raises:
        UsageError: the options do not go together, or there are fewer cores than workers.
    """
    from mtdp.devices import usable_cores

    if ray_address is not None and scheduler != "ray":
        raise UsageError("--ray-address: the scheduler is not ray", "add --scheduler ray")
    if workers is not None and ray_address is None and workers > usable_cores():
        raise UsageError(
            f"--workers {workers}: more than the {usable_cores()} cores that this process may use",
            "each worker needs one",
        )
    return scheduler == "ray" or (workers or 1) > 1


def _run_by_many(
    protocol: Protocol, scheduler: str, ray_address: str | None, workers: int | None, say: Callable[[str], None]
) -> None:
    from mtdp.devices import usable_cores
    from mtdp.protocol.crew import Crew, Given, threads_each
    from mtdp.protocol.many import run_by_many

    def start_crew(mark: Path) -> Crew:
        if scheduler == "ray":
            from mtdp.protocol.ray import RayCrew

            return RayCrew(lambda threads: Given(protocol, mark, threads, Path.cwd()), workers, ray_address)
        from mtdp.protocol.processes import Processes

        count = workers or 1
        return Processes(Given(protocol, mark, threads_each(usable_cores(), count), Path.cwd()), count)

    run_by_many(protocol, start_crew, say)


def _show_protocol(protocol: Protocol, quiet: bool) -> None:
    from mtdp.confusions import write_confusions
    from mtdp.protocol.rows import confusions_of

    write_confusions(protocol.out, confusions_of(protocol))
    o.show(protocol.out, quiet)


def evaluate(
    *,
    task: Annotated[list[Path], typer.Option(metavar="TASK", help="Task folder, or its table; repeat it for several.")],
    bundle: Annotated[
        list[Path] | None,
        typer.Option(metavar="BUNDLE", help="Exported bundle to evaluate, of any encoder; repeat it for several."),
    ] = None,
    init: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WEIGHTS",
            help="Also evaluate a run, a checkpoint, or named weights with --arch; repeat it for several.",
        ),
    ] = None,
    arch: Annotated[
        str | None, typer.Option(metavar="NAME", help="Architecture of --init, where it does not name it itself.")
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder of evaluation.md, evaluation.csv and evaluation.png.")
    ] = Path("evaluation"),
    metric: o.Metric = "auto",
    image_px: o.OwnImagePx = None,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Seed of the draws of few labels, of the SVM and of the random network.")
    ] = 0,
    precision: o.Precision = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers for programs, not the table.")] = False,
    huge_images: o.HugeImages = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Compare encoders on labelled tasks: probe, few labels, k-NN and retrieval, with 95 % intervals.

    A network that was never trained and six colour numbers are always in the table: where they do as well as an
    encoder, the task tells nothing about encoders.
    """
    import json

    from mtdp.confusions import confusion, write_confusions
    from mtdp.evaluate import evaluate_task
    from mtdp.evaluation_report import as_json as numbers
    from mtdp.evaluation_report import markdown, write
    from mtdp.evaluation_sources import named_sources
    from mtdp.run_state import locked_run
    from mtdp.tasks import load_task

    o.begin(verbose, huge_images)
    sources = named_sources(bundle or [], init or [], arch, seed, image_px)
    tasks = [load_task(path, metric=metric) for path in task]
    twice = [name for name, count in Counter(one.name for one in tasks).items() if count > 1]
    if twice:
        raise UsageError(f"two tasks are named {twice[0]!r}", "results are told by name: rename one, or give it once")
    found = []
    with locked_run(out):
        for one in tasks:
            if not quiet:
                print(f"{one.name}: {len(sources)} encoders", file=sys.stderr, flush=True)
            found.append(evaluate_task(one, sources, precision, seed))
        paths = write(found, out)
        probes = zip(tasks, found, strict=True)
        write_confusions(
            out, [confusion(f"probe of {one.encoder}", task, one.outputs) for task, of in probes for one in of.encoders]
        )
        o.show(out, quiet)
    if as_json:
        typer.echo(json.dumps(numbers(found)))
        return
    for path in paths:
        typer.echo(path)
    typer.echo(markdown(found))


def breakhis(
    *,
    source: Annotated[
        Path, typer.Argument(help="Folder of the unpacked BreakHis, with dsfold1.txt to dsfold5.txt.", metavar="DIR")
    ],
    init: o.Source,
    arch: o.OwnArch = None,
    finetune: Annotated[
        bool, typer.Option("--finetune", help="Fine-tune the whole network instead of fitting an SVM to its features.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder of the fine-tuned networks; needed by --finetune.")
    ] = None,
    lr: Annotated[
        list[float] | None,
        typer.Option(
            metavar="X", help="Learning rate of fine-tuning; repeat it to compare several.", show_default=o.PAPER_RATES
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(metavar="N", help="Epochs of fine-tuning for each rate.")] = 100,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Images in each batch.")] = 64,
    image_px: o.OwnImagePx = None,
    seed: o.Seed = 0,
    precision: o.Precision = "auto",
    resume: o.Resume = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Test a network on BreakHis as the paper does: accuracy within each patient, over the five original folds."""
    from mtdp.breakhis import finetune_folds, probe_folds, table
    from mtdp.finetune import LEARNING_RATES, FinetuneConfig
    from mtdp.transfer import load_extractor
    from mtdp.weights import named_input

    o.begin(verbose)
    if finetune:
        if out is None:
            raise UsageError("--finetune keeps its networks", "add --out FOLDER")
        arch, image_px = named_input(init, arch, image_px)
        config = FinetuneConfig(
            arch, init, epochs=epochs, batch_size=batch_size, image_px=image_px, seed=seed, precision=precision
        )
        scores = list(finetune_folds(config, source, out, tuple(lr or LEARNING_RATES), resume=resume, quiet=quiet))
    else:
        scores = list(probe_folds(load_extractor(init, arch, seed, image_px), source, precision, seed))
    typer.echo(table(scores, f"{'FT' if finetune else 'FE'} {init}"))
