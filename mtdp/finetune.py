"""Transfer by fine-tuning: the whole network and a new head, trained on one task (paper: evaluation of transfer).

100 epochs on train for each of four learning rates; the rate and the epoch that do best on val are kept, and the
network of that epoch is scored once on test. From random weights, this is the paper's training from scratch.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from mtdp.backbones import build_backbone, native_preprocessing
from mtdp.batchnorm import adapt_batch_norm
from mtdp.checkpoint import CheckpointInfo, current_versions, load_checkpoint, save_checkpoint
from mtdp.choices import finetuning_choices
from mtdp.devices import (
    autocast,
    best_device,
    choose_precision,
    gradient_scaler,
    gradients_overflow,
    keep_freed_memory,
    out_of_memory_said,
    take_step,
)
from mtdp.errors import CheckpointError, Interrupted, TaskError, TrainingDiverged, UsageError, or_overflow
from mtdp.images import ImageCache
from mtdp.multitask import MultiTaskNet, routed_loss
from mtdp.parallel import refuse_torchrun
from mtdp.preprocess import Normalise, Preprocessing
from mtdp.progress import TrainingLog
from mtdp.run_state import (
    RunState,
    locked_run,
    open_run,
    restore_generator,
    restore_network,
    restore_optimiser,
    restore_scaler,
    waiting_signals,
    write_json,
    write_state,
)
from mtdp.sampling import Batch, epoch_batches
from mtdp.scores import head_scores, labels_of, outputs_of, score
from mtdp.tasks import Task
from mtdp.weights import (
    CHECKPOINT_NAME,
    STATE_NAME,
    WeightsOrigin,
    load_backbone_weights,
    same_start,
)

LEARNING_RATES: Final = (1e-3, 1e-4, 1e-5, 1e-6)  # the paper's
RESULT_NAME: Final = "result.json"
SAVE_EVERY_S: Final = 300.0
ADAPTATION_EPOCH: Final = 2**31 - 1  # its images and augmentation are those of no epoch that is trained
MEMORY_HINT: Final = "use a smaller --batch-size, or a smaller --image-px"


@dataclass(frozen=True, slots=True)
class FinetuneConfig:
    """All that decides a fine-tuned network, besides the images. The paper names epochs and rates; the rest is ours."""

    arch: str
    init: str = "imagenet"  # as in pre-training; random: from scratch
    lr: float = 1e-4
    epochs: int = 100
    momentum: float = 0.9  # the optimiser is not stated: as in pre-training
    batch_size: int = 64  # not stated: as in pre-training
    image_px: int = 224
    seed: int = 0  # of the head, the order and the augmentation
    precision: str = "auto"
    adaptation_batches: int = 0  # not stated whether batch norm is adapted before fine-tuning; off

    def __post_init__(self) -> None:
        Preprocessing(image_px=self.image_px)
        for name in ("epochs", "lr"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} is {getattr(self, name)}, it must be above 0")
        for name in ("seed", "adaptation_batches"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}, it must not be negative")
        if self.batch_size < 2:
            raise UsageError(f"batch_size is {self.batch_size}, batch norm needs at least 2")


@dataclass(frozen=True, slots=True)
class FinetuneSteps:
    """What fine-tuning does with images: an argument, so that which images reach which step can be recorded."""

    batches: Callable[..., Iterator[Batch]] = field(default_factory=lambda: epoch_batches)
    scores: Callable[..., NDArray[np.float32]] = field(default_factory=lambda: head_scores)


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """What fine-tuning found; `test` is of the network of the best rate and epoch on val."""

    task: str
    weights: str
    metric: str
    lr: float
    epoch: int  # counted from 1
    val: float
    test: float
    val_of_each_lr: dict[str, float]
    outputs: tuple[float, ...]  # of each test image, as `scores.outputs_of` gives them


def finetune_best(
    task: Task,
    config: FinetuneConfig,
    out: Path,
    learning_rates: Sequence[float] = LEARNING_RATES,
    *,
    resume: bool = False,
    quiet: bool = False,
    steps: FinetuneSteps | None = None,
) -> FinetuneResult:
    """Fine-tune once for each learning rate, and score the best on test.

    `out/lr-RATE/` holds each run; `out/checkpoint.safetensors` and `out/result.json` are of the best one.

    Raises:
        TaskError: the task lacks val or test.
        UsageError, CheckpointError, TrainingDiverged, Interrupted: as in pre-training. A rate that diverges is left
            out of the choice while another does not.
    """
    for split in ("val", "test"):
        if not task.of((split,)):
            raise TaskError(f"{task.path} has no {split} split", "fine-tuning chooses on val and is scored on test")
    if not learning_rates:
        raise UsageError("no learning rate was given")
    if len({f"{lr:g}" for lr in learning_rates}) < len(learning_rates):
        raise UsageError("a learning rate was given twice", "give each once")
    refuse_torchrun("fine-tuning")
    _check_place(out)
    steps = steps or FinetuneSteps()
    with locked_run(out):
        best: dict[float, tuple[float, int]] = {}
        diverged: TrainingDiverged | None = None
        for lr in learning_rates:
            folder = out / f"lr-{lr:g}"
            try:
                best[lr] = finetune(task, replace(config, lr=lr), folder, resume=resume, quiet=quiet, steps=steps)
            except TrainingDiverged as error:
                diverged = error
        if not best:
            assert diverged is not None
            raise diverged
        with out_of_memory_said(f"the test split of {task.name}", MEMORY_HINT):
            return _judged_on_test(task, config, out, best, steps)


def _judged_on_test(
    task: Task, config: FinetuneConfig, out: Path, best: dict[float, tuple[float, int]], steps: FinetuneSteps
) -> FinetuneResult:
    """Score the network of the best rate on test, once, and keep it.

    Args:
        best: learning rate -> (score on val, epoch).
    """
    lr = max(best, key=lambda rate: best[rate][0])  # of equals the first that was given
    net, info = load_checkpoint(out / f"lr-{lr:g}")
    if info.iteration != best[lr][1]:  # killed between the writing of the two, and rounded otherwise the second time
        raise CheckpointError(
            f"{out / f'lr-{lr:g}'}: the checkpoint is of epoch {info.iteration}, the best was {best[lr][1]}",
            "delete this folder, and give the same command again",
        )
    net.to(best_device()).to(memory_format=torch.channels_last)
    test = task.of(("test",))
    normalise = Normalise(info.preprocessing).to(best_device())
    cache = ImageCache(info.preprocessing.image_px, 0, info.preprocessing.interpolation)
    precision = choose_precision(config.precision, best_device())
    logits = steps.scores(net, normalise, task.name, test, cache, precision)
    result = FinetuneResult(
        task=task.name,
        weights=info.origin.description,
        metric=task.metric,
        lr=lr,
        epoch=best[lr][1],
        val=best[lr][0],
        test=score(logits, labels_of(test), task.metric),
        val_of_each_lr={f"{rate:g}": value for rate, (value, _) in best.items()},
        outputs=tuple(outputs_of(logits).tolist()),
    )
    save_checkpoint(out / CHECKPOINT_NAME, net, info)
    write_json(out / RESULT_NAME, asdict(result))
    return result


def _check_place(out: Path) -> None:
    """Refuse a folder whose checkpoint is not of a fine-tuning."""
    held = (out / STATE_NAME).is_file() or ((out / CHECKPOINT_NAME).is_file() and not any(out.glob("lr-*")))
    if held:
        raise UsageError(f"{out} holds another run's {CHECKPOINT_NAME}", "give another --out: it would be overwritten")


def finetune(
    task: Task,
    config: FinetuneConfig,
    out: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    steps: FinetuneSteps | None = None,
) -> tuple[float, int]:
    """Train backbone and head on train for some epochs, and keep the network of the best epoch on val.

    Returns:
        The best score on val, and its epoch, counted from 1; the first of equals.
    """
    with locked_run(out), out_of_memory_said(f"fine-tuning on {task.name}", MEMORY_HINT):
        saved = open_run(out, resume, "fine-tuning")
        config = replace(config, precision=choose_precision(config.precision, best_device()))
        facts = {"config": asdict(config), "tasks": {task.name: task.summary(("train", "val"))}}
        _check_saved(saved, facts)
        if saved is not None and saved.data["epoch"] == config.epochs:
            return saved.data["best_score"], saved.data["best_epoch"]
        keep_freed_memory()
        with waiting_signals() as caught, torch.random.fork_rng():
            return _Epochs(task, config, out, saved, facts, steps or FinetuneSteps()).run(caught, quiet)


class _Epochs:
    """One fine-tuning, from a saved state or from its start to its last epoch."""

    def __init__(
        self,
        task: Task,
        config: FinetuneConfig,
        out: Path,
        saved: RunState | None,
        facts: dict[str, Any],
        steps: FinetuneSteps,
    ) -> None:
        self.task, self.config, self.out, self.saved, self.facts, self.steps = task, config, out, saved, facts, steps
        self.device = best_device()
        self.train, self.val = task.of(("train",)), task.of(("val",))
        self.net, self.origin = _build_net(task, config, saved, out)
        self.preprocessing = native_preprocessing(self.net.backbone, config.image_px)
        self.net.to(self.device).to(memory_format=torch.channels_last)
        self.normalise = Normalise(self.preprocessing).to(self.device)
        self.cache = ImageCache(config.image_px, 4 << 30, self.preprocessing.interpolation)
        self.start, self.best_score, self.best_epoch = 0, -math.inf, 0
        if saved is not None:
            self.start = int(saved.data["epoch"])
            self.best_score, self.best_epoch = saved.data["best_score"], saved.data["best_epoch"]

    def run(self, caught: list[int], quiet: bool) -> tuple[float, int]:
        config, out = self.config, self.out
        with TrainingLog(out, self.start, config.epochs, every=1, quiet=quiet, unit="epoch") as log:
            log.say(
                f"{config.arch} on {self.task.name}, {len(self.train)} images, lr {config.lr:g}, "
                f"from {self.origin.description}"
            )
            if self.saved is None and config.adaptation_batches and config.init != "random":
                self._adapt()
            torch.manual_seed(config.seed)
            if self.saved is not None:
                restore_generator(self.saved, out)
            optimizer = torch.optim.SGD(self.net.parameters(), lr=config.lr, momentum=config.momentum)
            scaler = gradient_scaler(config.precision, self.device)
            if self.saved is not None:
                restore_optimiser(self.net, optimizer, self.saved, out)
                restore_scaler(scaler, self.saved)
            saved_at_s = time.monotonic()
            for epoch in range(self.start, config.epochs):
                self._train(epoch, optimizer, scaler, log, caught)
                if caught:
                    what = f"stopped in epoch {epoch + 1} of {config.epochs}"
                    raise Interrupted(caught[0], what, "continue with --resume")
                better = self._judge(epoch, log)
                # The state names the epoch of the checkpoint: with a new one it is written at once.
                if better or epoch + 1 == config.epochs or time.monotonic() - saved_at_s >= SAVE_EVERY_S:
                    best = {"best_score": self.best_score, "best_epoch": self.best_epoch}
                    state = {**_STATE, **self.facts, "epoch": epoch + 1, **best, "init": self.origin.to_json()}
                    write_state(out, self.net, optimizer, scaler, state)
                    saved_at_s = time.monotonic()
        return self.best_score, self.best_epoch

    def _adapt(self) -> None:
        first = self.steps.batches(
            self.train, self.cache, seed=self.config.seed, epoch=ADAPTATION_EPOCH, batch_size=self.config.batch_size
        )
        few = islice(first, self.config.adaptation_batches)
        adapt_batch_norm(self.net.backbone, (self.normalise(batch.images.to(self.device)) for batch in few))

    def _train(
        self,
        epoch: int,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        log: TrainingLog,
        caught: list[int],
    ) -> None:
        """Show every image of train once."""
        config, net = self.config, self.net
        net.train()
        for batch in self.steps.batches(
            self.train, self.cache, seed=config.seed, epoch=epoch, batch_size=config.batch_size
        ):
            with autocast(config.precision, self.device):
                features = net.backbone(self.normalise(batch.images.to(self.device)))  # (B, P, P, 3) -> (B, D)
            loss, shares = routed_loss(net, features.float(), batch.tasks, batch.labels.to(self.device))
            if not torch.isfinite(loss) or gradients_overflow(scaler):
                what = f"loss is {float(loss.detach())}" if not torch.isfinite(loss) else "gradients are not finite"
                raise TrainingDiverged(
                    f"{self.task.name}: the {what} in epoch {epoch + 1}",
                    or_overflow(f"use a learning rate below {config.lr:g}", config.precision),
                )
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            take_step(scaler, optimizer)
            log.count(shares)
            if caught:
                break

    def _judge(self, epoch: int, log: TrainingLog) -> bool:
        """Score on val; keep the network, and say so, if no earlier epoch was as good."""
        config, task = self.config, self.task
        logits = self.steps.scores(self.net, self.normalise, task.name, self.val, self.cache, config.precision)
        val_score = score(logits, labels_of(self.val), task.metric)
        log.flush(epoch + 1, f"val {val_score:.4f}", {"val": round(val_score, 5)})
        if val_score <= self.best_score:
            return False
        self.best_score, self.best_epoch = val_score, epoch + 1
        described = {"choices": finetuning_choices(config), "versions": current_versions()}
        training = {**self.facts, **described, "init": self.origin.to_json()}
        info = CheckpointInfo(config.arch, self.net.class_names, self.preprocessing, training, epoch + 1)
        save_checkpoint(self.out / CHECKPOINT_NAME, self.net, info)
        return True


_STATE: Final[dict[str, Any]] = {"schema_version": 1, "kind": "fine-tuning"}


def _build_net(
    task: Task, config: FinetuneConfig, saved: RunState | None, out: Path
) -> tuple[MultiTaskNet, WeightsOrigin]:
    backbone = build_backbone(config.arch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = MultiTaskNet(backbone, {task.name: task.classes})
    if saved is None:
        return net, load_backbone_weights(backbone, config.arch, config.init, config.seed)
    restore_network(net, saved, out)
    return net, WeightsOrigin.from_json(saved.data["init"])


def _check_saved(saved: RunState | None, facts: dict[str, Any]) -> None:
    if saved is None:
        return
    for key in ("config", "tasks"):
        now = json.loads(json.dumps(facts[key]))
        before = saved.data.get(key) or {}
        if key == "config":  # weights are compared by what they are: a path may be spelt in several ways
            same = same_start(before.get("init"), saved.data["init"]["sha256"], now["init"])
            before = {**before, "init": now["init"] if same else None}
        if before != now:
            names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
            raise CheckpointError(
                f"the run to resume differs in {', '.join(names)}", "give the same options and images, or another --out"
            )
