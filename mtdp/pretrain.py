"""Multi-task pre-training, as the paper does it (arXiv 2005.02561, section on training; thesis chapter 5).

`pretrain` is the algorithm, top to bottom. Its run folder holds `checkpoint.safetensors` (the model, usable at any
time), `state.safetensors` (all that `resume` needs) and `metrics.jsonl`.
"""

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch
from torch import nn

from mtdp.backbones import build_backbone, native_preprocessing
from mtdp.batchnorm import adapt_batch_norm
from mtdp.checkpoint import (
    CheckpointInfo,
    current_versions,
    fill_net,
    read_tensors_and_json,
    save_checkpoint,
    write_tensors,
)
from mtdp.devices import PRECISIONS, autocast, best_device, choose_precision, keep_freed_memory
from mtdp.errors import CheckpointError, Interrupted, TrainingDiverged, UsageError
from mtdp.images import ImageCache
from mtdp.multitask import MultiTaskNet, rescale_head_gradients, routed_loss
from mtdp.preprocess import Normalise, Preprocessing
from mtdp.progress import TrainingLog
from mtdp.sampling import ADAPTATION, TRAINING, batches
from mtdp.tasks import SPLITS, Task
from mtdp.weights import CHECKPOINT_NAME, WeightsOrigin, load_backbone_weights

STATE_NAME: Final = "state.safetensors"
METRICS_NAME: Final = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class PretrainConfig:
    """All that decides the weights, besides the images. The defaults are the paper's; comments tell the gaps."""

    arch: str = "resnet50"
    init: str = "imagenet"  # imagenet, mtdp, random, or a path
    iterations: int = 50_000  # in all, warm-up included
    warmup: int = 5_000  # iterations that train the heads only
    warmup_lr: float = 1e-3  # of the heads in warm-up; that the multiplier does not apply there is our reading
    lr: float = 1e-4
    head_lr_multiplier: float = 1.0  # the paper's tau
    momentum: float = 0.9  # no weight decay, schedule or Nesterov: the paper mentions none
    batch_size: int = 64
    image_px: int = 224  # not stated in the paper; the authors' code and published weights use it
    seed: int = 0
    precision: str = "auto"  # fp32 or bf16; auto is resolved before training and kept
    splits: tuple[str, ...] = ("train", "val")  # of each task; never test, which judges transfer
    adaptation_batches: int = (
        20  # 0: leave batch norm as it comes; not used on random weights, which have nothing to keep
    )

    def __post_init__(self) -> None:
        Preprocessing(image_px=self.image_px)
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
        if not self.splits or not set(self.splits) <= set(SPLITS) or len(set(self.splits)) < len(self.splits):
            raise UsageError(f"splits {','.join(self.splits)!r}", f"use some of {', '.join(SPLITS)}, each once")


def pretrain(
    tasks: Sequence[Task],
    config: PretrainConfig,
    out: Path,
    *,
    resume: bool = False,
    checkpoint_every_s: float = 300.0,
    cache_bytes: int = 4 << 30,
    quiet: bool = False,
) -> Path:
    """Pre-trains one network on all tasks together.

    Args:
        tasks: the pool; every task has images in `config.splits`.
        out: the run's folder, made if need be.
        resume: go on from the run's last saved state, to the same weights as an uninterrupted run (bit for bit on a
            CPU with the same number of threads); start anew if there is none. Only `iterations` may differ.
        cache_bytes: memory for decoded images.

    Returns:
        The path of the final checkpoint.

    Raises:
        UsageError: the folder holds another run, or a task has no image in these splits.
        CheckpointError: the saved state is of another configuration or of other images.
        TrainingDiverged: the loss is not finite any more; the last saved state is kept.
        Interrupted: SIGINT or SIGTERM came; the state was saved.
    """
    saved = _read_saved(out, resume)
    device = best_device()
    config = _resolve(config, saved, device)
    data = [task.of(config.splits) for task in tasks]
    dataset = {task.name: task.summary(config.splits) for task in tasks}
    _check_data(tasks, data, config, saved, dataset)
    keep_freed_memory()

    net, origin = _build_net(tasks, config, saved, out)
    preprocessing = native_preprocessing(net.backbone, config.image_px)
    net.to(device).to(memory_format=torch.channels_last)
    normalise = Normalise(preprocessing).to(device)
    cache = ImageCache(config.image_px, cache_bytes, preprocessing.interpolation)
    start = 0 if saved is None else int(saved.data["iteration"])

    def save(iteration: int, optimizer: torch.optim.Optimizer) -> None:
        training = {
            "config": asdict(config),
            "init": origin.to_json(),
            "tasks": dataset,
            "versions": current_versions(),
        }
        info = CheckpointInfo(config.arch, net.class_names, preprocessing, training, iteration)
        _write_saved(out, net, optimizer, info)
        save_checkpoint(out / CHECKPOINT_NAME, net, info)

    with (
        TrainingLog(out / METRICS_NAME, start, config.iterations, quiet=quiet) as log,
        _signals() as caught,
        torch.random.fork_rng(),
    ):
        log.say(_describe(tasks, data, config, device, start, origin))
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
            _restore_momentum(net, optimizer, saved)
        _set_phase(net, start, config)
        saved_at_s = time.monotonic()
        stream = batches(
            data,
            cache,
            seed=config.seed,
            stream=TRAINING,
            iterations=range(start, config.iterations),
            batch_size=config.batch_size,
        )
        for iteration, batch in enumerate(stream, start):
            if iteration == config.warmup and iteration != start:
                # Paper: after the warm-up everything is trained; the momentum starts anew (not stated).
                optimizer = _optimizer(net, config, iteration)
                _set_phase(net, iteration, config)
            images = batch.images.to(device, non_blocking=True)  # uint8 (B, P, P, 3)
            sample_tasks, labels = batch.tasks.to(device), batch.labels.to(device)  # (B,)
            warming = iteration < config.warmup
            with autocast(config.precision, device), torch.set_grad_enabled(not warming):
                features = net.backbone(normalise(images))  # (B, P, P, 3) -> (B, D)
            # Paper: mean cross-entropy over the batch, each sample through its own task's head.
            loss, shares = routed_loss(net, features.float(), sample_tasks, labels)
            if not torch.isfinite(loss):
                raise TrainingDiverged(
                    f"the loss is {float(loss.detach())} at iteration {iteration + 1}",
                    f"use a lower learning rate (--lr below {config.lr:g}); the paper found rates above 1e-3 unstable",
                )
            # Heads without a sample keep grad None, so the optimiser leaves them and their momentum alone.
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            rescale_head_gradients(net, shares)  # paper: head gradients times B / B_t, before the step
            optimizer.step()

            done = iteration + 1
            log.batch(done, _phase(iteration, config), shares)
            if caught or done == config.iterations or time.monotonic() - saved_at_s >= checkpoint_every_s:
                save(done, optimizer)
                saved_at_s = time.monotonic()
            if caught and done < config.iterations:
                log.flush(done, _phase(iteration, config))
                raise Interrupted(
                    caught[0],
                    f"stopped at iteration {done} of {config.iterations}; saved in {out}",
                    "go on with --resume",
                )
    return out / CHECKPOINT_NAME


def _phase(iteration: int, config: PretrainConfig) -> str:
    return "warm-up" if iteration < config.warmup else "training"


def _set_phase(net: MultiTaskNet, iteration: int, config: PretrainConfig) -> None:
    # Paper: in warm-up neither the backbone's weights nor its batch-norm statistics move.
    warming = iteration < config.warmup
    net.train()
    net.backbone.train(not warming)
    net.backbone.requires_grad_(not warming)


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
    tasks: Sequence[Task], config: PretrainConfig, saved: "_Saved | None", out: Path
) -> tuple[MultiTaskNet, WeightsOrigin]:
    backbone = build_backbone(config.arch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # of the heads, which start at random
        net = MultiTaskNet(backbone, {task.name: task.classes for task in tasks})
    if saved is None:
        return net, load_backbone_weights(backbone, config.arch, config.init, config.seed)
    state = {name.removeprefix("network."): t for name, t in saved.tensors.items() if name.startswith("network.")}
    fill_net(net, state, out / STATE_NAME)
    return net, WeightsOrigin.from_json(saved.data["training"]["init"])


@dataclass(frozen=True, slots=True)
class _Saved:
    """A run's saved state: tensors `network.*`, `momentum.*` and `rng`, and its JSON."""

    tensors: dict[str, torch.Tensor]
    data: dict[str, Any]


def _read_saved(out: Path, resume: bool) -> _Saved | None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out} cannot be made: {error}", "give another --out") from error
    path = out / STATE_NAME
    if not path.is_file():
        return None
    if not resume:
        raise UsageError(f"{out} holds a run already", "go on with --resume, or give another --out")
    return _Saved(*read_tensors_and_json(path))


def _write_saved(out: Path, net: MultiTaskNet, optimizer: torch.optim.Optimizer, info: CheckpointInfo) -> None:
    tensors = {f"network.{name}": tensor for name, tensor in net.state_dict().items()}
    for name, parameter in net.named_parameters():
        momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum.{name}"] = momentum
    tensors["rng"] = torch.get_rng_state()
    write_tensors(out / STATE_NAME, tensors, info.to_json())


def _restore_momentum(net: MultiTaskNet, optimizer: torch.optim.Optimizer, saved: _Saved) -> None:
    for name, parameter in net.named_parameters():
        momentum = saved.tensors.get(f"momentum.{name}")
        if momentum is not None:
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)


def _resolve(config: PretrainConfig, saved: _Saved | None, device: torch.device) -> PretrainConfig:
    """Fixes the precision, and holds the configuration against that of the saved state."""
    if saved is None:
        return replace(config, precision=choose_precision(config.precision, device))
    before = saved.data["training"]["config"]
    if config.precision == "auto":
        config = replace(config, precision=before["precision"])
    now = {**asdict(config), "splits": list(config.splits)}
    changed = [name for name in now if name != "iterations" and now[name] != before.get(name)]
    if changed:
        name = changed[0]
        raise CheckpointError(
            f"the run to resume had {name} {before.get(name)!r}, now it is {now[name]!r}",
            "give the same options, or another --out",
        )
    if config.iterations < saved.data["iteration"]:
        raise UsageError(
            f"the run has {saved.data['iteration']} iterations already, {config.iterations} were asked for"
        )
    if config.warmup >= config.iterations and config.iterations != before["iterations"]:
        raise UsageError("the warm-up takes all iterations")
    return config


def _check_data(
    tasks: Sequence[Task],
    data: Sequence[Sequence[Any]],
    config: PretrainConfig,
    saved: _Saved | None,
    dataset: dict[str, Any],
) -> None:
    if not tasks:
        raise UsageError("there is no task to train on")
    for task, samples in zip(tasks, data, strict=True):
        if not samples:
            raise UsageError(f"task {task.name!r} has no image in {','.join(config.splits)}", "give other --splits")
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


def _describe(
    tasks: Sequence[Task],
    data: Sequence[Sequence[Any]],
    config: PretrainConfig,
    device: torch.device,
    start: int,
    origin: WeightsOrigin,
) -> str:
    images = sum(len(samples) for samples in data)
    begin = f"resuming at iteration {start}" if start else f"from {origin.description}"
    return f"{config.arch} on {len(tasks)} tasks, {images} images, {device.type} {config.precision}, {begin}"


def _until_caught(
    stream: Iterator[Any], normalise: nn.Module, device: torch.device, caught: list[int]
) -> Iterator[torch.Tensor]:
    for batch in stream:
        if caught:
            return
        yield normalise(batch.images.to(device))


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM, so that an iteration can end; a second one has its usual effect."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def on_signal(number: int, _frame: FrameType | None) -> None:
        caught.append(number)
        signal.signal(number, before[signal.Signals(number)])

    try:
        for kind in kinds:
            signal.signal(kind, on_signal)
        yield caught
    finally:
        for kind in kinds:
            signal.signal(kind, before[kind])
