"""`mtdp-train tasks`, `convert`, `pool` and `split`: tasks listed, made from downloads or plain folders, and pooled."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtdp import cli_options as o

_TENTHS = 10


def register(app: typer.Typer) -> None:
    """Add the commands."""
    o.add(app, tasks, convert, pool, split)


def tasks(
    *,
    more: Annotated[
        bool, typer.Option("--more", help="List the public tasks with a converter that are not the paper's.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All that is known of each task, for programs.")] = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """List the 22 tasks of the paper: organ, stain, classes, images and splits, and whether they are public."""
    import json

    from mtdp.catalogue import catalogue, more_tasks, text_table

    o.begin(verbose)
    listed = more_tasks() if more else catalogue()
    typer.echo(json.dumps([task.as_dict() for task in listed], ensure_ascii=False) if as_json else text_table(more))


def pool(
    *,
    folder: Annotated[Path, typer.Argument(help="Folder that holds tasks.", metavar="DIR")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File to write.", show_default="DIR/pool.toml")
    ] = None,
    huge_images: o.HugeImages = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Write the pool file of the tasks in a folder, each checked; tasks that share images are left out together."""
    from mtdp.own_tasks import write_pool

    o.begin(verbose, huge_images)
    path, found = write_pool(folder, out)
    if not quiet:
        for task in found:
            typer.echo(f"{task.name}: {len(task.classes)} classes, {len(task.of(('train', 'val', 'test')))} images")
    typer.echo(path)


def split(
    *,
    source: Annotated[Path, typer.Argument(help="Folder with a folder of images for each class.", metavar="CLASSES")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Task folder to make; it must not be there yet.")],
    shares: Annotated[
        str, typer.Option(metavar="N,N,N", help="Shares of train, val and test: 60,20,20 or 3,1,1.")
    ] = "60,20,20",
    groups: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="CSV with the columns image, group: images of one group stay in the same split.",
            show_default="the part of a file's name before its first underscore",
        ),
    ] = None,
    each_image: Annotated[
        bool,
        typer.Option(
            "--each-image", help="Each image is its own group: right only if no two images are of one patient."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the split.")] = 0,
    huge_images: o.HugeImages = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Make a task folder from plain CLASS/*.jpg: images that must stay in the same split stay there."""
    from mtdp.own_tasks import split_classes

    o.begin(verbose, huge_images)
    summary = split_classes(source, out, o.whole_numbers(shares, "--shares"), groups, each_image, seed)
    if not quiet:
        for line in summary.lines():
            typer.echo(line)
    typer.echo(out)


def convert(
    *,
    task: Annotated[str, typer.Argument(help="Name of a public task, as `mtdp-train tasks` lists it.", metavar="TASK")],
    source: Annotated[Path, typer.Argument(help="Folder of the unpacked download.", metavar="SOURCE_DIR")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Task folder to make; it must not be there yet.")],
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the split and of the windows around objects.")] = 0,
    huge_images: o.HugeImages = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Make a task folder from a public data set's own download, by the paper's patch rules and a split by group."""
    from mtdp.converters import convert as run

    o.begin(verbose, huge_images)
    told = 0

    def report(done: int, total: int) -> None:
        nonlocal told
        if done * _TENTHS // total > told and not quiet:
            told = done * _TENTHS // total
            typer.echo(f"converting {done}/{total}", err=True)

    for line in run(task, source, out, seed, report).lines():
        typer.echo(line)
    typer.echo(out)
