"""`mtdp-train tasks` and `mtdp-train convert`: the paper's tasks, listed, and made from their downloads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_TENTHS = 10


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command()(tasks)
    app.command()(convert)


def tasks(
    as_json: Annotated[bool, typer.Option("--json", help="All that is known of each task, for programs.")] = False,
) -> None:
    """List the 22 tasks of the paper: organ, stain, classes, images and splits, and whether they are public."""
    import json

    from mtdp.catalogue import catalogue, text_table

    typer.echo(json.dumps([task.as_dict() for task in catalogue()], ensure_ascii=False) if as_json else text_table())


def convert(
    task: Annotated[str, typer.Argument(help="Name of a public task, as `mtdp-train tasks` lists it.", metavar="TASK")],
    source: Annotated[Path, typer.Argument(help="Folder of the unpacked download.", metavar="SOURCE_DIR")],
    out: Annotated[Path, typer.Option(help="Task folder to make; it must not be there yet.")],
    seed: Annotated[int, typer.Option(help="Of the split, and of the windows around objects.")] = 0,
) -> None:
    """Make a task folder from a public data set's own download, by the paper's patch rules and a split by group."""
    from mtdp.converters import convert as run

    told = 0

    def report(done: int, total: int) -> None:
        nonlocal told
        if done * _TENTHS // total > told:
            told = done * _TENTHS // total
            typer.echo(f"converting {done}/{total}", err=True)

    for line in run(task, source, out, seed, report).lines():
        typer.echo(line)
    typer.echo(out)
