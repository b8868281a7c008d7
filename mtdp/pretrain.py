"""Multi-task pre-training, as the paper does it (arXiv 2005.02561, section on training; thesis chapter 5).

`pretrain` is the algorithm, top to bottom. Its run folder holds `checkpoint.safetensors` (the model, usable at any
time), `state.safetensors` (all that `resume` needs) and `metrics.jsonl`.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from mtdp.backbones import build_backbone, native_preprocessing
from mtdp.batchnorm import adapt_batch_norm
from mtdp.checkpoint import CheckpointInfo, current_versions, save_checkpoint
from mtdp.choices import PRETRAINING_CHOICES
from mtdp.devices import autocast, best_device, gradient_scaler, gradients_overflow, keep_freed_memory, take_step
from mtdp.errors import Interrupted, TrainingDiverged, UsageError, or_overflow
from mtdp.images import ImageCache
from mtdp.multitask import MultiTaskNet, rescale_head_gradients, routed_loss
from mtdp.parallel import Ranks, average_head_gradients, check_batch, joined_ranks, shared_backbone, whole_shares
from mtdp.preprocess import Normalise
from mtdp.pretrain_config import PretrainConfig, check_data, resolve
from mtdp.progress import TrainingLog
from mtdp.run_state import (
    RunState,
    open_run,
    restore_momentum,
    restore_network,
    restore_scaler,
    waiting_signals,
    write_state,
)
from mtdp.sampling import ADAPTATION, TRAINING, batches
from mtdp.tasks import Task
from mtdp.weights import CHECKPOINT_NAME, WeightsOrigin, load_backbone_weights


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
) -> Path:
    """Pre-trains one network on all tasks together.

    Args:
        tasks: the pool; every task has images in `config.splits`.
        out: the run's folder, made if need be.
        resume: go on from the run's last saved state, to the same weights as an uninterrupted run (bit for bit on a
            CPU with the same number of threads); start anew if there is none. Only `iterations` may differ.
        cache_bytes: memory for decoded images.
        tensorboard: also write the metrics to `out/tensorboard`.

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
    with joined_ranks() as ranks, waiting_signals() as caught, torch.random.fork_rng():
        return _run(tasks, config, out, ranks, caught, resume, checkpoint_every_s, cache_bytes, quiet, tensorboard)


def _run(
    tasks: Sequence[Task],
    config: PretrainConfig,
    out: Path,
    ranks: Ranks,
    caught: list[int],
    resume: bool,
    checkpoint_every_s: float,
    cache_bytes: int,
    quiet: bool,
    tensorboard: bool,
) -> Path:
    saved = open_run(out, resume, "pre-training")
    if saved is None and (out / CHECKPOINT_NAME).is_file():  # of a fine-tuning, or moved here
        raise UsageError(f"{out} holds another run's {CHECKPOINT_NAME}", "give another --out: it would be overwritten")
    device = best_device()
    check_batch(ranks, config.batch_size)
    config = resolve(config, saved, device)
    data = [task.of(config.splits_of(task.name)) for task in tasks]
    dataset = {task.name: task.summary(config.splits_of(task.name)) for task in tasks}
    check_data(tasks, data, config, saved, dataset)
    keep_freed_memory()

    net, origin = _build_net(tasks, config, saved, out)
    preprocessing = native_preprocessing(net.backbone, config.image_px)
    net.to(device).to(memory_format=torch.channels_last)
    normalise = Normalise(preprocessing).to(device)
    cache = ImageCache(config.image_px, cache_bytes, preprocessing.interpolation)
    start = 0 if saved is None else int(saved.data["iteration"])
    scaler = gradient_scaler(config.precision, device)
    if saved is not None:
        restore_scaler(scaler, saved)

    def save(iteration: int, optimizer: torch.optim.Optimizer) -> None:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in net.parameters()):
            raise _diverged(f"the weights are not finite after iteration {iteration}", iteration - 1, config)
        if not ranks.leads:
            return
        training = {
            "config": asdict(config),
            "choices": PRETRAINING_CHOICES,
            "init": origin.to_json(),
            "tasks": dataset,
            "versions": current_versions(),
        }
        info = CheckpointInfo(config.arch, net.class_names, preprocessing, training, iteration)
        write_state(out, net, optimizer, scaler, info.to_json())
        save_checkpoint(out / CHECKPOINT_NAME, net, info)

    folder = out if ranks.leads else None
    with TrainingLog(folder, start, config.iterations, quiet=quiet, tensorboard=tensorboard) as log:
        log.say(_describe(tasks, data, config, device, ranks, start, origin))
        if saved is None and config.adaptation_batches and config.init != "random":
            # Paper: the batch-norm layers first take the pool's statistics, without any change of what they compute.
            log.say(f"adapting batch norm on {config.adaptation_batches} batches")
            adaptation = batches(
                data,
                cache,
                seed=config.seed,
                stream=ADAPTATION,
                iterations=range(config.adaptation_batches),
                batch_size=config.batch_size,
            )
            adapt_batch_norm(net.backbone, _until_caught(adaptation, normalise, device, caught))
            if caught:
                raise Interrupted(caught[0], "stopped before the first iteration; nothing was saved")

        # No draw of ours uses this generator, but a backbone with dropout does.
        torch.manual_seed(config.seed)
        if saved is not None and "rng" in saved.tensors:
            torch.set_rng_state(saved.tensors["rng"])
        optimizer = _optimizer(net, config, start)
        if saved is not None and _phase(start, config) == _phase(start - 1, config):
            restore_momentum(net, optimizer, saved)
        backbone = _set_phase(net, start, config, ranks)
        saved_at_s = time.monotonic()
        stream = batches(
            data,
            cache,
            seed=config.seed,
            stream=TRAINING,
            iterations=range(start, config.iterations),
            batch_size=config.batch_size,
            part=slice(ranks.rank, None, ranks.world),
        )
        for iteration, batch in enumerate(stream, start):
            if iteration == config.warmup and iteration != start:
                # Paper: after the warm-up everything is trained; the momentum starts anew (not stated).
                optimizer = _optimizer(net, config, iteration)
                backbone = _set_phase(net, iteration, config, ranks)
            images = batch.images.to(device, non_blocking=True)  # uint8 (B, P, P, 3)
            labels = batch.labels.to(device)  # (B,)
            warming = iteration < config.warmup
            with autocast(config.precision, device), torch.set_grad_enabled(not warming):
                features = backbone(normalise(images))  # (B, P, P, 3) -> (B, D)
            # Paper: mean cross-entropy over the batch, each sample through its own task's head.
            loss, own_shares = routed_loss(net, features.float(), batch.tasks, labels)
            shares, stop = whole_shares(net.task_names, own_shares, bool(caught), ranks, device)
            # Of all processes' losses: each refuses to go on, or none does.
            if not math.isfinite(sum(share.loss_sum for share in shares.values())):
                raise _diverged(f"the loss is {float(loss.detach())} at iteration {iteration + 1}", iteration, config)
            if gradients_overflow(scaler):  # of the steps before: here, the GPU has been waited for
                raise _diverged(f"the gradients are not finite at iteration {iteration}", iteration - 1, config)
            # Heads without a sample keep grad None, so the optimiser leaves them and their momentum alone.
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            average_head_gradients(net, tuple(shares), ranks)
            rescale_head_gradients(net, shares)  # paper: head gradients times B / B_t, before the step
            take_step(scaler, optimizer)

            done = iteration + 1
            log.batch(done, _phase(iteration, config), shares)
            if stop or done == config.iterations or time.monotonic() - saved_at_s >= checkpoint_every_s:
                save(done, optimizer)
                saved_at_s = time.monotonic()
            if stop and done < config.iterations:
                log.flush(done, _phase(iteration, config))
                raise Interrupted(
                    caught[0] if caught else signal.SIGTERM,
                    f"stopped at iteration {done} of {config.iterations}; saved in {out}",
                    "go on with --resume",
                )
    return out / CHECKPOINT_NAME


def _diverged(message: str, iteration: int, config: PretrainConfig) -> TrainingDiverged:
    option, rate = ("--warmup-lr", config.warmup_lr) if iteration < config.warmup else ("--lr", config.lr)
    hint = f"use a lower learning rate ({option} below {rate:g}); the paper found rates above 1e-3 unstable"
    return TrainingDiverged(message, or_overflow(hint, config.precision))


def _phase(iteration: int, config: PretrainConfig) -> str:
    return "warm-up" if iteration < config.warmup else "training"


def _set_phase(net: MultiTaskNet, iteration: int, config: PretrainConfig, ranks: Ranks) -> nn.Module:
    """Freezes or frees the backbone; returns it as to be called."""
    # Paper: in warm-up neither the backbone's weights nor its batch-norm statistics move.
    warming = iteration < config.warmup
    net.train()
    net.backbone.train(not warming)
    net.backbone.requires_grad_(not warming)
    if warming:
        return net.backbone
    backbone = shared_backbone(net, ranks)
    return cast(nn.Module, torch.compile(backbone)) if config.compile else backbone


def _optimizer(net: MultiTaskNet, config: PretrainConfig, iteration: int) -> torch.optim.SGD:
    # Paper: SGD with momentum, constant rates.
    head_parameters = list(net.heads.parameters())
    if iteration < config.warmup:
        return torch.optim.SGD(head_parameters, lr=config.warmup_lr, momentum=config.momentum)
    groups = [
        {"params": list(net.backbone.parameters()), "lr": config.lr},
        {"params": head_parameters, "lr": config.lr * config.head_lr_multiplier},
    ]
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


def _build_net(
    tasks: Sequence[Task], config: PretrainConfig, saved: RunState | None, out: Path
) -> tuple[MultiTaskNet, WeightsOrigin]:
    backbone = build_backbone(config.arch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # of the heads, which start at random
        net = MultiTaskNet(backbone, {task.name: task.classes for task in tasks})
    if saved is None:
        return net, load_backbone_weights(backbone, config.arch, config.init, config.seed)
    restore_network(net, saved, out)
    return net, WeightsOrigin.from_json(saved.data["training"]["init"])


def _describe(
    tasks: Sequence[Task],
    data: Sequence[Sequence[Any]],
    config: PretrainConfig,
    device: torch.device,
    ranks: Ranks,
    start: int,
    origin: WeightsOrigin,
) -> str:
    images = sum(len(samples) for samples in data)
    begin = f"resuming at iteration {start}" if start else f"from {origin.description}"
    where = device.type if ranks.world == 1 else f"{ranks.world} processes on {device.type}"
    return f"{config.arch} on {len(tasks)} tasks, {images} images, {where} {config.precision}, {begin}"


def _until_caught(
    stream: Iterator[Any], normalise: nn.Module, device: torch.device, caught: list[int]
) -> Iterator[torch.Tensor]:
    for batch in stream:
        if caught:
            return
        yield normalise(batch.images.to(device))
