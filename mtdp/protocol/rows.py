"""What a protocol has found: a row of test scores for each left-out task, with what is needed to judge them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mtdp.confusions import Confusion, confusion
from mtdp.metrics import Truth, balanced_accuracy, class_accuracies, percentiles, resampled_scores
from mtdp.protocol.cells import Cell, judgement_cells
from mtdp.protocol.run import Protocol
from mtdp.tasks import Task

# Column -> (kind of cell, weights), in the paper's order; features of random weights and of colours are our addition.
COLUMNS: Final = {
    "Scratch": ("finetune", "random"),
    "FE colour": ("probe", "colour"),
    "FE random": ("probe", "random"),
    "FE start": ("probe", "start"),
    "FE MTL": ("probe", "mtl"),
    "FT start": ("finetune", "start"),
    "FT MTL": ("finetune", "mtl"),
    "Joint": ("joint-test", "mtl"),
}


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the test images add to the score of one column of one task."""

    replicates: NDArray[np.float64]  # mean over the seeds, on each resample of groups; alike for every column
    balanced: tuple[float, ...]  # balanced accuracy of each run
    of_classes: tuple[float, ...]  # accuracy within each class, mean over the runs

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 %, of the mean over the seeds."""
        return percentiles(self.replicates)


@dataclass(frozen=True, slots=True)
class Row:
    """One left-out task: its test scores by column, one for each seed; an empty column was not computed."""

    task: str
    metric: str
    train_images: int  # train and val, as the paper counts
    classes: int
    scores: dict[str, tuple[float, ...]]
    combination: str  # that judged it
    test_images: int = 0
    test_groups: int = 0
    class_names: tuple[str, ...] = ()
    judgements: Mapping[str, Judgement] = field(default_factory=dict)  # of the columns whose outputs are known
    combinations: Mapping[str, str] = field(default_factory=dict)  # column -> the combination that judged it

    @property
    def seeds(self) -> int:
        return max(len(values) for values in self.scores.values())


def collect(protocol: Protocol) -> list[Row]:
    """The rows of every evaluated task, of the cells that are done.

    A training that diverged has no score and leaves its seed out.
    """
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for cell in judgement_cells(protocol.evaluated, protocol.finetuned, protocol.config):
        result = protocol.result(cell)
        if result is not None:
            found.setdefault(_key(cell), []).append(result)
    return [_row(task, found) for task in protocol.evaluated]


def _key(cell: Cell) -> tuple[str, str, str]:
    return cell.subject, cell.kind, cell.weights


def _row(task: Task, found: Mapping[tuple[str, str, str], Sequence[dict[str, Any]]]) -> Row:
    test = task.of(("test",))
    of_column = {name: found.get((task.name, *column), ()) for name, column in COLUMNS.items()}
    combinations = {
        name: str(results[0]["combination"])
        for name, results in of_column.items()
        if results and results[0].get("combination")
    }
    sound = {name: [result for result in results if result["score"] is not None] for name, results in of_column.items()}
    judgements = {
        name: _judgement(task, [result["outputs"] for result in results])
        for name, results in sound.items()
        if results and all(len(result.get("outputs") or ()) == len(test) for result in results)
    }
    return Row(
        task.name,
        task.metric,
        len(task.of(("train", "val"))),
        len(task.classes),
        {name: tuple(float(result["score"]) for result in results) for name, results in sound.items()},
        combinations.get("FE MTL", ""),
        len(test),
        len({sample.group for sample in test}),
        task.classes,
        judgements,
        combinations,
    )


def confusions_of(protocol: Protocol) -> list[Confusion | None]:
    """What each column takes for what, of the first seed that is done."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for cell in judgement_cells(protocol.evaluated, protocol.finetuned, protocol.config):
        result = protocol.result(cell)
        if result is not None and result.get("outputs"):
            found.setdefault(_key(cell), result)
    return [
        confusion(name, task, found[task.name, *column]["outputs"])
        for task in protocol.evaluated
        for name, column in COLUMNS.items()
        if (task.name, *column) in found
    ]


def truth_of(task: Task, split: str = "test") -> Truth:
    """Labels and groups of a split, in the order of its samples."""
    samples = task.of((split,))
    labels = np.array([sample.label for sample in samples], np.int64)
    return Truth(labels, tuple(sample.group for sample in samples), task.metric, len(task.classes))


def _judgement(task: Task, runs: Sequence[Sequence[float]]) -> Judgement:
    truth = truth_of(task)
    arrays = [np.asarray(run, np.float64) for run in runs]
    of_runs = [class_accuracies(run, truth.labels, truth.classes) for run in arrays]
    return Judgement(
        resampled_scores(runs, truth),
        tuple(balanced_accuracy(run, truth.labels, truth.classes) for run in arrays),
        tuple(fmean(values) for values in zip(*of_runs, strict=True)),
    )
