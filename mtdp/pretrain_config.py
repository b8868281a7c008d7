"""What decides a pre-training run, and whether it may start or go on."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import torch

from mtdp.devices import PRECISIONS, choose_precision
from mtdp.errors import CheckpointError, UsageError
from mtdp.optimiser import OPTIMISERS, SCHEDULES
from mtdp.preprocess import Preprocessing
from mtdp.run_state import RunState
from mtdp.tasks import SPLITS, Task
from mtdp.weights import same_start

# Learning rate and multiplier of the heads, as the paper chose them by average rank for its published networks.
PAPER_CHOICE: Final = {"resnet50": (1e-3, 1.0), "densenet121": (1e-4, 5.0)}
# Of any other architecture: the rate that was best on average for both.
OTHER_CHOICE: Final = (1e-4, 1.0)
AS_THE_PAPER: Final = math.nan  # stands for the choice above


@dataclass(frozen=True, slots=True)
class PretrainConfig:
    """All that decides the weights, besides the images. The defaults are the paper's; comments tell the gaps."""

    arch: str = "resnet50"
    init: str = "imagenet"  # imagenet, mtdp, random, or a path
    iterations: int = 50_000  # in all, warm-up included
    warmup: int = 5_000  # iterations that train the heads only
    warmup_lr: float = 1e-3  # of the heads in warm-up; that the multiplier does not apply there is our reading
    lr: float = AS_THE_PAPER  # by architecture
    head_lr_multiplier: float = AS_THE_PAPER  # the paper's tau; by architecture
    momentum: float = 0.9  # no weight decay, schedule or Nesterov: the paper mentions none
    batch_size: int = 64
    image_px: int = 224  # not stated in the paper; the authors' code and published weights use it
    seed: int = 0
    precision: str = "auto"  # fp32, bf16 or fp16; auto is resolved before training and kept
    splits: tuple[str, ...] = ("train", "val")  # of each task; never test, which judges transfer
    train_only: tuple[str, ...] = ()  # tasks of which only train is used: those that joint training is judged on
    adaptation_batches: int = (
        20  # 0: leave batch norm as it comes; not used on random weights, which have nothing to keep
    )

    # For transformers; the paper has none of these.
    optimiser: str = "sgd"  # or adamw
    weight_decay: float = 0.0
    schedule: str = "constant"  # or cosine, to 0 at the last iteration
    lr_rise: int = 0  # iterations after the warm-up in which the rate rises linearly
    layer_decay: float = 1.0  # the rate of each layer is this times that of the layer after it
    drop_path: float = 0.0  # chance of the last block's branches to be left out

    compile: bool = False  # fuse the backbone's operations by torch.compile; rounds differently

    def __post_init__(self) -> None:
        Preprocessing(image_px=self.image_px)
        for name, chosen in zip(("lr", "head_lr_multiplier"), PAPER_CHOICE.get(self.arch, OTHER_CHOICE), strict=True):
            if math.isnan(getattr(self, name)):
                object.__setattr__(self, name, chosen)
        for name in ("iterations", "batch_size", "warmup_lr", "lr", "head_lr_multiplier"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} is {getattr(self, name)}, it must be above 0")
        if not 0 <= self.warmup <= self.iterations:
            raise UsageError(
                f"warmup is {self.warmup}, it must lie between 0 and iterations ({self.iterations})",
                "the warm-up counts as part of the iterations",
            )
        if self.batch_size < 2:
            raise UsageError("batch_size is 1, batch norm needs at least 2")
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}, it must not be negative")
        if self.precision not in PRECISIONS:
            raise UsageError(f"unknown precision {self.precision!r}", f"use {', '.join(PRECISIONS)}")
        if self.adaptation_batches < 0:
            raise UsageError(f"adaptation_batches is {self.adaptation_batches}, it must not be negative")
        self._check_optimiser()
        if not self.splits or not set(self.splits) <= set(SPLITS) or len(set(self.splits)) < len(self.splits):
            raise UsageError(f"splits {','.join(self.splits)!r}", f"use some of {', '.join(SPLITS)}, each once")

    def _check_optimiser(self) -> None:
        if self.optimiser not in OPTIMISERS:
            raise UsageError(f"unknown optimiser {self.optimiser!r}", f"use {', '.join(OPTIMISERS)}")
        if self.schedule not in SCHEDULES:
            raise UsageError(f"unknown schedule {self.schedule!r}", f"use {', '.join(SCHEDULES)}")
        if not 0 <= self.weight_decay < 1:
            raise UsageError(f"weight_decay is {self.weight_decay}, it must be at least 0 and below 1")
        if not 0 < self.layer_decay <= 1:
            raise UsageError(f"layer_decay is {self.layer_decay}, it must be above 0 and at most 1")
        if not 0 <= self.drop_path < 1:
            raise UsageError(f"drop_path is {self.drop_path}, it must be at least 0 and below 1")
        if self.lr_rise < 0 or (self.lr_rise and self.warmup + self.lr_rise >= self.iterations):
            raise UsageError(
                f"lr_rise is {self.lr_rise}: warm-up and rise must end before the last of {self.iterations} iterations"
            )

    def splits_of(self, task: str) -> tuple[str, ...]:
        """The splits of a task that are trained on."""
        return ("train",) if task in self.train_only else self.splits


def resolve(config: PretrainConfig, saved: RunState | None, device: torch.device) -> PretrainConfig:
    """Fix the precision, and hold the configuration against that of the saved state."""
    if saved is None:
        return replace(config, precision=choose_precision(config.precision, device))
    before = saved.data["training"]["config"]
    if config.precision == "auto":
        config = replace(config, precision=before["precision"])
    if not same_start(before["init"], saved.data["training"]["init"]["sha256"], config.init):
        raise CheckpointError(
            f"the run to resume had other starting weights: init was {before['init']!r}, now it is {config.init!r}",
            "give the same weights, by whatever path, or another --out",
        )
    config = replace(config, init=before["init"])  # of several spellings, the first is kept
    defaults = _plain(PretrainConfig())  # what a field was worth before it existed
    now = _plain(config)
    changed = [name for name in now if name != "iterations" and now[name] != before.get(name, defaults[name])]
    if changed:
        name = changed[0]
        raise CheckpointError(
            f"the run to resume had {name} {before.get(name, defaults[name])!r}, now it is {now[name]!r}",
            "give the same options, or another --out",
        )
    if config.iterations < saved.data["iteration"]:
        raise UsageError(
            f"the run has {saved.data['iteration']} iterations already, {config.iterations} were asked for"
        )
    if config.schedule != "constant" and config.iterations != before["iterations"]:
        raise CheckpointError(
            f"the run to resume had iterations {before['iterations']}, now it is {config.iterations}",
            "its schedule falls to 0 at the last iteration, so the number cannot change; give another --out",
        )
    if config.warmup >= config.iterations and config.iterations != before["iterations"]:
        raise UsageError("the warm-up takes all iterations")
    return config


def check_data(
    tasks: Sequence[Task],
    data: Sequence[Sequence[Any]],
    config: PretrainConfig,
    saved: RunState | None,
    dataset: dict[str, Any],
) -> None:
    """Refuse to go on with other data than a saved run had."""
    if not tasks:
        raise UsageError("there is no task to train on")
    strangers = sorted(set(config.train_only) - {task.name for task in tasks})
    if strangers:
        raise UsageError(f"train_only names {strangers[0]!r}, which is not in the pool", "is it misspelt?")
    for task, samples in zip(tasks, data, strict=True):
        if not samples:
            splits = ",".join(config.splits_of(task.name))
            raise UsageError(f"task {task.name!r} has no image in {splits}", "give other --splits")
    if saved is None:
        return
    if saved.data["training"]["tasks"] != dataset:
        before = saved.data["training"]["tasks"]
        names = sorted(name for name in {*before, *dataset} if before.get(name) != dataset.get(name))
        raise CheckpointError(
            f"the run to resume was trained on other images: {', '.join(names)}", "give the same pool, or another --out"
        )
    if saved.data["head_order"] != [task.name for task in tasks]:
        raise CheckpointError(
            f"the run to resume had the tasks in the order {', '.join(saved.data['head_order'])}",
            "keep the order of the pool file: it decides which samples are drawn",
        )


def _plain(config: PretrainConfig) -> dict[str, Any]:
    """As it reads back from JSON: tuples are lists."""
    data: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return data
