"""What was taken for what on the test images of a run: kept in its folder, for its page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from mtdp.metrics import predicted
from mtdp.run_state import write_json
from mtdp.tasks import Task

NAME: Final = "confusions.json"
_MOST_MISTAKES: Final = 12


@dataclass(frozen=True, slots=True)
class Mistake:
    """A test image that was taken for another class; classes by number."""

    path: str
    label: int
    predicted: int


@dataclass(frozen=True, slots=True)
class Confusion:
    """A classifier on the test images of a task."""

    title: str
    task: str
    classes: tuple[str, ...]
    matrix: tuple[tuple[int, ...], ...]  # [true class][predicted class]
    mistakes: tuple[Mistake, ...]  # some of them: in turn of each kind, of two classes the surest first


def confusion(title: str, task: Task, outputs: Sequence[float]) -> Confusion | None:
    """Return what was taken for what; None where the outputs are not of the task's test images.

    Args:
        title: what classified.
        task: whose test split the outputs are of.
        outputs: float[N], as `mtdp.metrics` takes them.
    """
    samples, classes = task.of(("test",)), len(task.classes)
    values = np.asarray(outputs, np.float64)
    if not len(values) or len(values) != len(samples):
        return None
    labels, guesses = np.array([sample.label for sample in samples]), predicted(values, classes)
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (labels, guesses), 1)
    sureness = np.abs(values) if classes == 2 else np.zeros(len(values))
    wrong = np.flatnonzero(labels != guesses)
    wrong = wrong[np.argsort(-sureness[wrong], kind="stable")]
    seen: dict[tuple[int, int], int] = {}
    turns = []  # the first of each kind, then the second of each, ...
    for index in wrong.tolist():
        kind = (int(labels[index]), int(guesses[index]))
        turns.append((seen.setdefault(kind, 0), index))
        seen[kind] += 1
    chosen = [index for _, index in sorted(turns, key=lambda one: one[0])[:_MOST_MISTAKES]]
    mistakes = (Mistake(str(samples[i].path.absolute()), int(labels[i]), int(guesses[i])) for i in chosen)
    return Confusion(title, task.name, task.classes, tuple(map(tuple, matrix.tolist())), tuple(mistakes))


def write_confusions(run: Path, found: Sequence[Confusion | None]) -> None:
    """Keep what is there in a run's folder."""
    write_json(run / NAME, {"confusions": [asdict(one) for one in found if one is not None]})


def read_confusions(run: Path) -> list[Confusion]:
    """Return what a run's folder keeps; nothing where that is missing or damaged."""
    try:
        return [_from_json(one) for one in json.loads((run / NAME).read_text("utf-8"))["confusions"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _from_json(data: dict[str, Any]) -> Confusion:
    return Confusion(
        str(data["title"]),
        str(data["task"]),
        tuple(map(str, data["classes"])),
        tuple(tuple(map(int, row)) for row in data["matrix"]),
        tuple(Mistake(str(one["path"]), int(one["label"]), int(one["predicted"])) for one in data["mistakes"]),
    )
