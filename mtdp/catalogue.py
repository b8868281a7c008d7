"""The 22 tasks of the paper: what they are, how large, how split, and where they come from.

The data is `catalogue.toml` beside this module; the counts are the paper's own (arXiv 2005.02561, supplement), and its
row and column sums are checked by a test. `mtdp.converters` makes the public ones.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from mtdp.errors import UsageError


@dataclass(frozen=True, slots=True)
class CatalogueTask:
    """One task of the paper; `class_names` are the folders that its converter writes."""

    name: str  # also the name of the head in the authors' published weights
    title: str
    annotation: Literal["classification", "detection", "segmentation"]  # what the experts gave
    organ: str
    stain: str
    classes: int
    images: int
    train: int
    val: int  # 0: the paper has no validation split of it
    test: int
    group: Literal["patient", "slide", "image"]  # what the paper did keep in the same split
    patch_px: int  # side of a patch; 0: as published
    rule: str  # from annotations to labelled patches
    reference: str
    doi: str
    licence: str  # empty: not known
    source: str  # where to ask for it; empty: nowhere
    public: bool
    class_names: tuple[str, ...] = ()
    leave_out_with: tuple[str, ...] = ()
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@cache
def catalogue() -> tuple[CatalogueTask, ...]:
    """All tasks, in the paper's order."""
    entries = tomllib.loads(files("mtdp").joinpath("catalogue.toml").read_text("utf-8"))["task"]
    return tuple(_from_toml(entry) for entry in entries)


@cache
def more_tasks() -> tuple[CatalogueTask, ...]:
    """Public tasks that the paper did not train on, for which there is a converter, too."""
    entries = tomllib.loads(files("mtdp").joinpath("more_tasks.toml").read_text("utf-8"))["task"]
    return tuple(_from_toml(entry) for entry in entries)


def known_task(name: str) -> CatalogueTask:
    """The task of that name, of the paper or of the others.

    Raises:
        UsageError: there is none.
    """
    for task in more_tasks():
        if task.name == name:
            return task
    return catalogue_task(name)


def _from_toml(entry: dict[str, Any]) -> CatalogueTask:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return CatalogueTask(**values)


def catalogue_task(name: str) -> CatalogueTask:
    """The task of that name.

    Raises:
        UsageError: the paper has none of that name.
    """
    for task in catalogue():
        if task.name == name:
            return task
    raise UsageError(f"the paper has no task {name!r}", "`mtdp-train tasks` lists their names")


_HEADER = ("task", "organ", "stain", "annotation", "classes", "images", "train/val/test", "split by", "availability")


def _row(task: CatalogueTask) -> tuple[str, ...]:
    split = "/".join(str(count) if count else "-" for count in (task.train, task.val, task.test))
    counts = (str(task.classes), str(task.images), split)
    availability = "public" if task.public else "private"
    return (task.name, task.organ, task.stain, task.annotation, *counts, task.group, availability)


def _totals(tasks: Sequence[CatalogueTask]) -> tuple[str, ...]:
    split = "/".join(str(sum(counts)) for counts in zip(*((t.train, t.val, t.test) for t in tasks), strict=True))
    public = f"{sum(task.public for task in tasks)} public"
    sums = (str(sum(task.classes for task in tasks)), str(sum(task.images for task in tasks)), split)
    return (f"{len(tasks)} tasks", "", "", "", *sums, "", public)


def text_table(more: bool = False) -> str:
    """The catalogue for a terminal: aligned columns, totals last; or the tasks that are not the paper's."""
    tasks = more_tasks() if more else catalogue()
    rows = [_HEADER, *(_row(task) for task in tasks), _totals(tasks)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def markdown() -> str:
    """The tables of docs/catalogue.md: all tasks, then the patch rules, sources and errata."""
    tasks = catalogue()
    lines = [*_markdown_table(_HEADER, [*(_row(task) for task in tasks), _totals(tasks)]), ""]
    head = ("task", "name in the paper", "patch", "rule", "reference", "licence", "source")
    rules = [
        (
            task.name,
            task.title,
            f"{task.patch_px} px" if task.patch_px else "as it comes",
            task.rule,
            f"[{task.reference}](https://doi.org/{task.doi})" if task.doi else task.reference,
            task.licence or "not known",
            f"<{task.source}>" if task.source else "none",
        )
        for task in tasks
    ]
    lines += [*_markdown_table(head, rules), ""]
    lines += [f"- `{task.name}`: {task.note}" for task in tasks if task.note]
    return "\n".join(lines) + "\n"


def more_markdown() -> str:
    """The table of docs/catalogue.md of the tasks that are not the paper's."""
    head = ("task", "data set", "organ", "classes", "images", "train/val/test", "split by", "licence", "source")
    rows = [
        (
            task.name,
            f"{task.title}, [{task.reference}](https://doi.org/{task.doi})",
            task.organ,
            str(task.classes),
            str(task.images),
            f"{task.train}/{task.val}/{task.test}",
            task.group,
            task.licence,
            f"<{task.source}>",
        )
        for task in more_tasks()
    ]
    notes = [f"- `{task.name}`: {task.note}" for task in more_tasks() if task.note]
    return "\n".join([*_markdown_table(head, rows), "", *notes]) + "\n"


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
