"""Multi-task pre-training, as the paper does it (arXiv 2005.02561, section on training; thesis chapter 5).

`pretrain` is the algorithm, top to bottom. Its run folder holds `checkpoint.safetensors` (the model, usable at any
time), `state.safetensors` (all that `resume` needs) and `metrics.jsonl`.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from mtdp.backbones import build_backbone, native_preprocessing
from mtdp.batchnorm import adapt_batch_norm
from mtdp.checkpoint import CheckpointInfo, current_versions, save_checkpoint
from mtdp.choices import pretraining_choices
from mtdp.devices import (
    autocast,
    best_device,
    gradient_scaler,
    gradients_overflow,
    keep_freed_memory,
    out_of_memory_said,
    take_step,
)
from mtdp.errors import Interrupted, TrainingDiverged, UsageError, or_overflow
from mtdp.images import ImageCache
from mtdp.multitask import MultiTaskNet, TaskShare, rescale_head_gradients, routed_loss
from mtdp.optimiser import build_optimiser, rate_at, set_drop_path, set_rates
from mtdp.parallel import Ranks, average_head_gradients, check_batch, joined_ranks, shared_backbone, whole_shares
from mtdp.preprocess import Normalise
from mtdp.pretrain_config import PretrainConfig, check_data, resolve
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
    write_state,
)
from mtdp.sampling import ADAPTATION, TRAINING, Batch, batches
from mtdp.tasks import Task
from mtdp.weights import CHECKPOINT_NAME, WeightsOrigin, load_backbone_weights


@dataclass(frozen=True, slots=True)
class PretrainSteps:
    """What pre-training does with images: an argument, so that which images reach which step can be recorded."""

    batches: Callable[..., Iterator[Batch]] = field(default_factory=lambda: batches)


def pretrain(
    tasks: Sequence[Task],
    config: PretrainConfig,
    out: Path,
    *,
    resume: bool = False,
    checkpoint_every_s: float = 300.0,
    cache_bytes: int = 4 << 30,
    quiet: bool = False,
    tensorboard: bool = False,
    steps: PretrainSteps | None = None,
) -> Path:
    """Pre-train one network on all tasks together.

    Args:
        tasks: the pool; every task has images in `config.splits`.
        out: the run's folder, made if need be.
        resume: go on from the run's last saved state, to the same weights as an uninterrupted run (bit for bit on a
            CPU with the same number of threads); start anew if there is none. Only `iterations` may differ.
        cache_bytes: memory for decoded images.
        tensorboard: also write the metrics to `out/tensorboard`.
        steps: where batches come from.

    Under torchrun the processes share each batch, and rank 0 writes the files.

    Returns:
        The path of the final checkpoint.

    Raises:
        UsageError: the folder holds another run, or a task has no image in these splits.
        CheckpointError: the saved state is of another configuration or of other images.
        TrainingDiverged: the loss, or a gradient whatever the scale, is not finite any more; the last saved state is
            kept.
        Interrupted: SIGINT or SIGTERM came; the state was saved.
    """
    options = _Options(resume, checkpoint_every_s, cache_bytes, quiet, tensorboard, steps or PretrainSteps())
    said = out_of_memory_said("pre-training", "use a smaller --batch-size, or a smaller --image-px")
    with joined_ranks() as ranks, waiting_signals() as caught, torch.random.fork_rng(), said:
        check_batch(ranks, config.batch_size)
        with locked_run(out, ranks.leads):
            return _Training(tasks, config, out, ranks, caught, options).run()


@dataclass(frozen=True, slots=True)
class _Options:
    """What does not decide the weights; as `pretrain` takes it."""

    resume: bool
    checkpoint_every_s: float
    cache_bytes: int
    quiet: bool
    tensorboard: bool
    steps: PretrainSteps


class _Training:
    """One pre-training in one process, from a saved state or from its start to its last iteration."""

    def __init__(
        self,
        tasks: Sequence[Task],
        config: PretrainConfig,
        out: Path,
        ranks: Ranks,
        caught: list[int],
        options: _Options,
    ) -> None:
        self.out, self.ranks, self.caught, self.options = out, ranks, caught, options
        self.saved = open_run(out, options.resume, "pre-training")
        if self.saved is None and (out / CHECKPOINT_NAME).is_file():  # of a fine-tuning, or moved here
            raise UsageError(
                f"{out} holds another run's {CHECKPOINT_NAME}", "give another --out: it would be overwritten"
            )
        self.device = best_device()
        self.config = config = resolve(config, self.saved, self.device)
        self.data = [task.of(config.splits_of(task.name)) for task in tasks]
        self.dataset = {task.name: task.summary(config.splits_of(task.name)) for task in tasks}
        check_data(tasks, self.data, config, self.saved, self.dataset)
        keep_freed_memory()
        self.net, self.origin = _build_net(tasks, config, self.saved, out)
        self.preprocessing = native_preprocessing(self.net.backbone, config.image_px)
        self.net.to(self.device).to(memory_format=torch.channels_last)
        self.normalise = Normalise(self.preprocessing).to(self.device)
        self.cache = ImageCache(config.image_px, options.cache_bytes, self.preprocessing.interpolation)
        self.start = 0 if self.saved is None else int(self.saved.data["iteration"])
        self.scaler = gradient_scaler(config.precision, self.device)
        if self.saved is not None:
            restore_scaler(self.scaler, self.saved)

    def run(self) -> Path:
        config, saved, start, options = self.config, self.saved, self.start, self.options
        folder = self.out if self.ranks.leads else None
        with TrainingLog(folder, start, config.iterations, quiet=options.quiet, tensorboard=options.tensorboard) as log:
            log.say(self._description())
            if saved is None and config.adaptation_batches and config.init != "random":
                # Paper: batch norm first takes the pool's statistics, without any change of what it computes.
                log.say(f"adapting batch norm on {config.adaptation_batches} batches")
                self._adapt()
            # No draw of ours uses this generator, but a backbone with dropout does.
            torch.manual_seed(config.seed)
            if saved is not None:
                restore_generator(saved, self.out)
            optimizer = build_optimiser(self.net, config, start)
            if saved is not None and _phase(start, config) == _phase(start - 1, config):
                restore_optimiser(self.net, optimizer, saved, self.out)
            backbone = _set_phase(self.net, start, config, self.ranks)
            saved_at_s = time.monotonic()
            part = slice(self.ranks.rank, None, self.ranks.world)
            for iteration, batch in enumerate(self._batches(TRAINING, range(start, config.iterations), part), start):
                if iteration == config.warmup and iteration != start:
                    # Paper: after the warm-up everything is trained; the momentum starts anew (not stated).
                    optimizer = build_optimiser(self.net, config, iteration)
                    backbone = _set_phase(self.net, iteration, config, self.ranks)
                set_rates(optimizer, config, iteration)
                shares, stop = self._step(iteration, batch, backbone, optimizer)
                done = iteration + 1
                log.batch(done, _phase(iteration, config), shares, rate_at(config, iteration))
                due = time.monotonic() - saved_at_s >= options.checkpoint_every_s
                if stop or done == config.iterations or due:
                    self._save(done, optimizer)
                    saved_at_s = time.monotonic()
                if stop and done < config.iterations:
                    log.flush(done, _phase(iteration, config), {"lr": rate_at(config, iteration)})
                    raise Interrupted(
                        self.caught[0] if self.caught else signal.SIGTERM,
                        f"stopped at iteration {done} of {config.iterations}; saved in {self.out}",
                        "continue with --resume",
                    )
        return self.out / CHECKPOINT_NAME

    def _step(
        self, iteration: int, batch: Batch, backbone: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, TaskShare], bool]:
        """One iteration: the tasks' shares of the whole batch, and whether to stop after it."""
        config, device, net, scaler = self.config, self.device, self.net, self.scaler
        images = batch.images.to(device, non_blocking=True)  # uint8 (B, P, P, 3)
        labels = batch.labels.to(device)  # (B,)
        warming = iteration < config.warmup
        with autocast(config.precision, device), torch.set_grad_enabled(not warming):
            features = backbone(self.normalise(images))  # (B, P, P, 3) -> (B, D)
        # Paper: mean cross-entropy over the batch, each sample through its own task's head.
        loss, own_shares = routed_loss(net, features.float(), batch.tasks, labels)
        shares, stop = whole_shares(net.task_names, own_shares, bool(self.caught), self.ranks, device)
        # Of all processes' losses: each refuses to go on, or none does.
        if not math.isfinite(sum(share.loss_sum for share in shares.values())):
            raise _diverged(f"the loss is {float(loss.detach())} at iteration {iteration + 1}", iteration, config)
        if gradients_overflow(scaler):  # of the steps before: here, the GPU has been waited for
            raise _diverged(f"the gradients are not finite at iteration {iteration}", iteration - 1, config)
        # Heads without a sample keep grad None, so the optimiser leaves them and their momentum alone.
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        average_head_gradients(net, tuple(shares), self.ranks)
        rescale_head_gradients(net, shares)  # paper: head gradients times B / B_t, before the step
        take_step(scaler, optimizer)
        return shares, stop

    def _batches(self, stream: int, iterations: range, part: slice = slice(None)) -> Iterator[Batch]:
        config = self.config
        return self.options.steps.batches(
            self.data,
            self.cache,
            seed=config.seed,
            stream=stream,
            iterations=iterations,
            batch_size=config.batch_size,
            part=part,
        )

    def _adapt(self) -> None:
        stream = self._batches(ADAPTATION, range(self.config.adaptation_batches))
        adapt_batch_norm(self.net.backbone, _until_caught(stream, self.normalise, self.device, self.caught))
        if self.caught:
            raise Interrupted(self.caught[0], "stopped before the first iteration; nothing was saved")

    def _save(self, iteration: int, optimizer: torch.optim.Optimizer) -> None:
        net, config = self.net, self.config
        if not all(bool(torch.isfinite(parameter).all()) for parameter in net.parameters()):
            raise _diverged(f"the weights are not finite after iteration {iteration}", iteration - 1, config)
        if not self.ranks.leads:
            return
        training = {
            "config": asdict(config),
            "choices": pretraining_choices(config),
            "init": self.origin.to_json(),
            "tasks": self.dataset,
            "versions": current_versions(),
        }
        info = CheckpointInfo(config.arch, net.class_names, self.preprocessing, training, iteration)
        write_state(self.out, net, optimizer, self.scaler, info.to_json())
        save_checkpoint(self.out / CHECKPOINT_NAME, net, info)

    def _description(self) -> str:
        images = sum(len(samples) for samples in self.data)
        begin = f"resuming at iteration {self.start}" if self.start else f"from {self.origin.description}"
        world, config = self.ranks.world, self.config
        where = self.device.type if world == 1 else f"{world} processes on {self.device.type}"
        return f"{config.arch} on {len(self.data)} tasks, {images} images, {where} {config.precision}, {begin}"


def _diverged(message: str, iteration: int, config: PretrainConfig) -> TrainingDiverged:
    option, rate = ("--warmup-lr", config.warmup_lr) if iteration < config.warmup else ("--lr", config.lr)
    hint = f"use a lower learning rate ({option} below {rate:g}); the paper found rates above 1e-3 unstable"
    return TrainingDiverged(message, or_overflow(hint, config.precision))


def _phase(iteration: int, config: PretrainConfig) -> str:
    return "warm-up" if iteration < config.warmup else "training"


def _set_phase(net: MultiTaskNet, iteration: int, config: PretrainConfig, ranks: Ranks) -> nn.Module:
    """Freeze or free the backbone; return it as to be called."""
    # Paper: in warm-up neither the backbone's weights nor its batch-norm statistics move.
    warming = iteration < config.warmup
    net.train()
    net.backbone.train(not warming)
    net.backbone.requires_grad_(not warming)
    if warming:
        return net.backbone
    backbone = shared_backbone(net, ranks)
    return cast(nn.Module, torch.compile(backbone)) if config.compile else backbone


def _build_net(
    tasks: Sequence[Task], config: PretrainConfig, saved: RunState | None, out: Path
) -> tuple[MultiTaskNet, WeightsOrigin]:
    backbone = build_backbone(config.arch)
    set_drop_path(backbone, config.drop_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # of the heads, which start at random
        net = MultiTaskNet(backbone, {task.name: task.classes for task in tasks})
    if saved is None:
        return net, load_backbone_weights(backbone, config.arch, config.init, config.seed)
    restore_network(net, saved, out)
    return net, WeightsOrigin.from_json(saved.data["training"]["init"])


def _until_caught(
    stream: Iterator[Any], normalise: nn.Module, device: torch.device, caught: list[int]
) -> Iterator[torch.Tensor]:
    for batch in stream:
        if caught:
            return
        yield normalise(batch.images.to(device))
