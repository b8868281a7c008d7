"""The cells of a protocol run: the smallest units of work that have a result of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from mtdp.protocol.config import Combination, ProtocolConfig
from mtdp.tasks import Task

# pretrain: one network, without a set or (joint) with all. select: its score on a left-out task's val split.
# probe: features and SVM, scored on test. finetune: the same for fine-tuning. joint-*: its own head's score.
# release: one network on all images of all tasks, by the combination that is best over all.
Kind = Literal["pretrain", "select", "probe", "finetune", "joint-select", "joint-test", "release"]
# colour: no network at all, the mean and the deviation of red, green and blue.
Weights = Literal["random", "start", "mtl", "colour"]
JOINT: Final = "joint"
RELEASE: Final = "all"


@dataclass(frozen=True, slots=True)
class Cell:
    """One unit of work; `combination` is None where none plays a part, or where it is chosen by rank later."""

    kind: Kind
    subject: str  # a task, or for pre-training the left-out set's name
    weights: Weights
    combination: Combination | None
    seed: int

    @property
    def name(self) -> str:
        """The place of its result below the run's folder."""
        combination = f"{self.combination.name}/" if self.combination else ""
        return f"{self.kind}/{self.subject}/{self.weights}/{combination}seed-{self.seed}"


def set_name(left_out: Sequence[str]) -> str:
    """Return what a set of left-out tasks is called."""
    return "-".join(left_out)


def selection_cells(sets: Sequence[Sequence[str]], evaluated: Sequence[Task], config: ProtocolConfig) -> list[Cell]:
    """What the choice of combinations rests on: every pre-training, and its score on val if there is a choice."""
    names = {task.name for task in evaluated}
    cells = []
    choice = len(config.combinations()) > 1
    for seed in range(config.seeds):
        for combination in config.combinations():
            for left_out in sets:
                cells.append(Cell("pretrain", set_name(left_out), "mtl", combination, seed))
                if choice:
                    cells += [Cell("select", name, "mtl", combination, seed) for name in left_out if name in names]
            if config.joint:
                cells.append(Cell("pretrain", JOINT, "mtl", combination, seed))
                if choice:
                    cells += [Cell("joint-select", task.name, "mtl", combination, seed) for task in evaluated]
    return cells


_WITHOUT_SEED: Final[tuple[Weights, ...]] = ("colour", "start")


def judgement_cells(evaluated: Sequence[Task], finetuned: Sequence[Task], config: ProtocolConfig) -> list[Cell]:
    """What stands in the table. Features of the starting weights are deterministic: one cell, whatever the seeds."""
    cells = [Cell("probe", task.name, weights, None, 0) for task in evaluated for weights in _WITHOUT_SEED]
    for seed in range(config.seeds):
        for task in evaluated:
            cells += [Cell("probe", task.name, "random", None, seed), Cell("probe", task.name, "mtl", None, seed)]
            if task in finetuned:
                cells += [Cell("finetune", task.name, "start", None, seed)]
                cells += [Cell("finetune", task.name, "mtl", None, seed)]
                if config.scratch:
                    cells += [Cell("finetune", task.name, "random", None, seed)]
            if config.joint:
                cells += [Cell("joint-test", task.name, "mtl", None, seed)]
    return cells


def phases(selection: Sequence[Cell], judgement: Sequence[Cell], config: ProtocolConfig) -> list[list[Cell]]:
    """The cells in the order in which they run; a phase begins when the one before it is done.

    A choice needs every seed of every combination, before anything is judged by it. Where there is none, seeds are
    the outer loop, and a run that is cut short has whole tables of fewer seeds.
    """
    release = [[Cell("release", RELEASE, "mtl", None, 0)]] if config.release else []
    if len(config.combinations()) > 1:
        return [list(selection), list(judgement), *release]
    return [sorted([*selection, *judgement], key=lambda cell: cell.seed), *release]


def cost(cell: Cell, tasks: Sequence[Task], config: ProtocolConfig) -> float:
    """Its work, in images trained on. An image that is only passed forward counts a third of one."""
    images = {task.name: {split: len(task.of((split,))) for split in ("train", "val", "test")} for task in tasks}
    if cell.weights == "colour":
        return 0.0
    if cell.kind in ("pretrain", "release"):
        warmup = cell.combination.warmup if cell.combination else min(config.warmups)
        batches = config.iterations - warmup + (warmup + config.adaptation_batches) / 3
        return batches * config.batch_size
    own = images[cell.subject]
    if cell.kind == "finetune":
        return len(config.finetune_lrs) * config.finetune_epochs * (own["train"] + own["val"] / 3) + own["test"] / 3
    if cell.kind in ("joint-select", "joint-test"):
        return own["val" if cell.kind == "joint-select" else "test"] / 3
    if cell.kind == "select":
        return (own["train"] + own["val"]) / 3
    return sum(own.values()) / 3
