"""What a protocol run computes: left-out sets, hyper-parameter combinations, seeds, and which transfers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from mtdp.errors import UsageError
from mtdp.finetune import LEARNING_RATES, FinetuneConfig
from mtdp.pretrain_config import PretrainConfig
from mtdp.tasks import Task

ALL: Final = "all"


@dataclass(frozen=True, slots=True)
class Combination:
    """One point of the hyper-parameter grid (paper: table of hyper-parameters)."""

    lr: float
    head_lr_multiplier: float
    warmup: int

    @property
    def name(self) -> str:
        """Also the name of its folder.

        >>> Combination(1e-3, 5.0, 0).name
        'lr0.001-tau5-warmup0'
        """
        return f"lr{self.lr:g}-tau{self.head_lr_multiplier:g}-warmup{self.warmup}"


@dataclass(frozen=True, slots=True)
class ProtocolConfig:
    """A protocol run. The defaults are the paper's: 24 combinations for each network, and five seeds of each."""

    arch: str = "resnet50"
    init: str = "imagenet"
    evaluate: tuple[str, ...] = ()  # tasks to leave out, each with those of its `leave_out_with`; empty: all
    lrs: tuple[float, ...] = LEARNING_RATES
    head_lr_multipliers: tuple[float, ...] = (1.0, 5.0, 10.0)
    warmups: tuple[int, ...] = (5_000, 0)
    seeds: int = 5
    iterations: int = 50_000
    warmup_lr: float = 1e-3
    batch_size: int = 64
    image_px: int = 224
    precision: str = "auto"
    adaptation_batches: int = 20
    finetune: tuple[str, ...] = ()  # evaluated tasks that are fine-tuned, too
    finetune_lrs: tuple[float, ...] = LEARNING_RATES
    finetune_epochs: int = 100
    scratch: bool = False  # also from random weights, on the tasks that are fine-tuned
    joint: bool = False  # also joint training, with the evaluated tasks' train splits in the pool
    release: bool = False  # at last one network of the best combination on all images, as the published ones were

    def __post_init__(self) -> None:
        for name in ("lrs", "head_lr_multipliers", "warmups", "finetune_lrs"):
            values = getattr(self, name)
            if not values:
                raise UsageError(f"{name}: none was given")
            if len({f"{value:g}" for value in values}) < len(values):  # as in the names of folders
                raise UsageError(f"{name}: one was given twice", "give each once")
        if self.seeds < 1:
            raise UsageError(f"seeds is {self.seeds}, it must be at least 1")
        for combination in self.combinations():
            self.pretraining(combination, 0)  # refuses what cannot be trained, before anything is
        for lr in self.finetune_lrs:
            self.finetuning(self.init, 0, lr)

    def combinations(self) -> tuple[Combination, ...]:
        return tuple(
            Combination(lr, tau, warmup)
            for warmup in self.warmups
            for lr in self.lrs
            for tau in self.head_lr_multipliers
        )

    def pretraining(
        self,
        combination: Combination,
        seed: int,
        train_only: tuple[str, ...] = (),
        splits: tuple[str, ...] = ("train", "val"),
    ) -> PretrainConfig:
        """The configuration of one pre-training."""
        return PretrainConfig(
            arch=self.arch,
            init=self.init,
            iterations=self.iterations,
            warmup=combination.warmup,
            warmup_lr=self.warmup_lr,
            lr=combination.lr,
            head_lr_multiplier=combination.head_lr_multiplier,
            batch_size=self.batch_size,
            image_px=self.image_px,
            seed=seed,
            precision=self.precision,
            splits=splits,
            train_only=train_only,
            adaptation_batches=self.adaptation_batches,
        )

    def finetuning(self, source: str, seed: int, lr: float) -> FinetuneConfig:
        """The configuration of one fine-tuning from these weights."""
        return FinetuneConfig(
            arch=self.arch,
            init=source,
            lr=lr,
            epochs=self.finetune_epochs,
            batch_size=self.batch_size,
            image_px=self.image_px,
            seed=seed,
            precision=self.precision,
        )


def evaluated_tasks(tasks: Sequence[Task], config: ProtocolConfig) -> tuple[Task, ...]:
    """The tasks to leave out, in the pool's order: those named, or all that have val and test.

    Raises:
        UsageError: a name is not in the pool, its task lacks a split, or no task has both.
    """
    known = {task.name: task for task in tasks}
    strangers = sorted({*config.evaluate, *config.finetune} - set(known) - {ALL})
    if strangers:
        raise UsageError(f"no task {strangers[0]!r} in the pool", f"it has {', '.join(known)}")
    complete = [task for task in tasks if task.of(("val",)) and task.of(("test",))]
    wanted = set(config.evaluate) or {task.name for task in complete}
    for name in sorted(wanted - {task.name for task in complete}):
        raise UsageError(f"task {name!r} lacks val or test: it cannot be evaluated", "leave it in the pool only")
    if not complete:
        raise UsageError("no task of the pool has val and test: none can be evaluated", "add these splits to a task")
    return tuple(task for task in complete if task.name in wanted)


def finetuned_tasks(evaluated: Sequence[Task], config: ProtocolConfig) -> tuple[Task, ...]:
    """The evaluated tasks that are fine-tuned.

    Raises:
        UsageError: a task to fine-tune is not evaluated.
    """
    if ALL in config.finetune:
        return tuple(evaluated)
    names = {task.name for task in evaluated}
    strangers = sorted(set(config.finetune) - names)
    if strangers:
        raise UsageError(f"{strangers[0]!r} is to be fine-tuned, but not evaluated", "name it with --evaluate, too")
    return tuple(task for task in evaluated if task.name in config.finetune)


def left_out_sets(tasks: Sequence[Task], evaluated: Sequence[Task]) -> tuple[tuple[str, ...], ...]:
    """The sets of tasks that are left out together: related tasks, also by way of a third (paper: related pairs).

    A related task is left out of the training even where it is not evaluated itself.

    Raises:
        UsageError: nothing would be left to train on.
    """
    related = {task.name: {task.name, *task.leave_out_with} for task in tasks}
    for task in tasks:
        for other in task.leave_out_with:
            related[other].add(task.name)
    sets: list[tuple[str, ...]] = []
    for task in evaluated:
        if any(task.name in known for known in sets):
            continue
        group, waiting = {task.name}, [task.name]
        while waiting:
            for other in related[waiting.pop()] - group:
                group.add(other)
                waiting.append(other)
        sets.append(tuple(t.name for t in tasks if t.name in group))
    for group_names in sets:
        if len(group_names) == len(tasks):
            raise UsageError(
                f"without {', '.join(group_names)} no task is left to train on", "add tasks that are not related to it"
            )
    return tuple(sets)
