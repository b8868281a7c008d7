"""Training in fp16: what scaling the loss saves, what a step that is skipped leaves alone, and when it is divergence.

The values of fp16 end at 65504, and up to 2^-25 they round to zero. In networks of a few pixels a scale of 65536 makes
the gradients too large, so where a test does not start lower, the first steps after the warm-up are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

import mtdp.finetune
import mtdp.pretrain
from mtdp.checkpoint import load_checkpoint
from mtdp.devices import autocast, gradient_scaler, gradients_overflow, take_step
from mtdp.errors import LOWER_RATE, TrainingDiverged
from mtdp.finetune import FinetuneConfig, finetune, finetune_best
from mtdp.multitask import MultiTaskNet, TaskShare, rescale_head_gradients, routed_loss
from mtdp.pretrain import pretrain
from mtdp.pretrain_config import PretrainConfig
from mtdp.sampling import TRAINING, draw
from mtdp.tasks import Task, load_pool, load_task
from mtdp.transfer import extract_features, load_extractor, probe_task

CPU = torch.device("cpu")
Make = Callable[..., Path]
TINY = PretrainConfig(
    arch="timm:test_resnet",
    init="random",
    iterations=3,
    warmup=1,
    lr=1e-3,
    warmup_lr=1e-2,
    head_lr_multiplier=2.0,
    batch_size=6,
    image_px=32,
    seed=3,
    precision="fp16",
    splits=("train",),
)
TUNE = FinetuneConfig(
    arch="timm:test_resnet", init="random", epochs=3, batch_size=4, image_px=32, lr=1e-2, precision="fp16"
)


@pytest.fixture
def tasks(pool_file: Path) -> tuple[Task, ...]:
    return load_pool(pool_file)


@pytest.fixture
def task(tmp_path: Path, make_task: Make) -> Task:
    return load_task(make_task(tmp_path / "colour", ("blue", "green", "red"), per_class=4))


def scales_from(monkeypatch: pytest.MonkeyPatch, **options: float) -> None:
    """Scalers start elsewhere than at 65536, or grow faster."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, **options))


def described(path: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(safe_open(path, framework="pt").metadata()["mtdp"])
    return told


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """Momentum and what is trained: batch norm's statistics come from the forward pass."""
    tensors = load_file(run / "state.safetensors")
    return {name: t for name, t in tensors.items() if "running" not in name and "tracked" not in name and name != "rng"}


def equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize(("precision", "moved"), [("fp16", 1.0), ("unscaled", 0.0), ("fp32", 1.0)])
def test_what_vanishes_in_fp16_is_saved_by_scaling(precision: str, moved: float) -> None:
    """The gradient is 2^-26, which rounds to zero in fp16; scaled by 65536 it is 2^-10. The rate makes a step of 1."""
    weight = torch.nn.Parameter(torch.ones(1, 1))
    optimizer = torch.optim.SGD([weight], lr=2.0**26)
    scaler = gradient_scaler("fp32" if precision == "unscaled" else precision, CPU)
    with autocast("fp16" if precision == "unscaled" else precision, CPU):
        output = F.linear(torch.ones(1, 1), weight)
    assert output.dtype == (torch.float32 if precision == "fp32" else torch.float16)
    loss = output.float().sum() * 2.0**-26
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    take_step(scaler, optimizer)
    assert weight.item() == 1.0 - moved


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_of_another_precision_there_is_no_scaler(precision: str, tasks: tuple[Task, ...], tmp_path: Path) -> None:
    scaler = gradient_scaler(precision, CPU)
    loss = torch.ones((), requires_grad=True)
    assert scaler.scale(loss) is loss
    assert not gradients_overflow(scaler)
    pretrain(tasks, replace(TINY, iterations=1, precision=precision), tmp_path / "run", quiet=True)
    assert "scaler" not in described(tmp_path / "run/state.safetensors")


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_gradients_that_are_not_finite_make_no_step(bad: float) -> None:
    """By hand: scale 65536, then 32768; the gradient is 1, so with momentum 0.5 the buffer is 1, then 1.5."""
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.5)
    scaler = gradient_scaler("fp16", CPU)

    def step(factor: float) -> tuple[list[float], list[float], float]:
        optimizer.zero_grad(set_to_none=True)
        scaler.scale((weight * torch.tensor([1.0, factor])).sum()).backward()  # type: ignore[no-untyped-call]
        take_step(scaler, optimizer)
        return weight.tolist(), optimizer.state[weight]["momentum_buffer"].tolist(), scaler.get_scale()

    assert step(1.0) == ([-1.0, -1.0], [1.0, 1.0], 65536.0)
    assert step(bad) == ([-1.0, -1.0], [1.0, 1.0], 32768.0)
    assert step(1.0) == ([-2.5, -2.5], [1.5, 1.5], 32768.0)


def spoil(at: int, head: str = "two") -> Callable[[MultiTaskNet, Mapping[str, TaskShare]], None]:
    """`rescale_head_gradients`, of which call number `at` leaves a gradient that is not finite (-1: every call)."""
    calls: list[int] = []

    def rescale(net: MultiTaskNet, shares: Mapping[str, TaskShare]) -> None:
        rescale_head_gradients(net, shares)
        gradient = net.heads[head].weight.grad
        assert isinstance(gradient, torch.Tensor)
        if at in (-1, len(calls)):
            gradient[0, 0] = float("inf")
        calls.append(1)

    return rescale


@pytest.mark.parametrize("warmup", [0, 3], ids=["training", "warm-up"])
def test_pretraining_goes_on_after_a_step_that_is_skipped(
    warmup: int, tasks: tuple[Task, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales_from(monkeypatch, init_scale=1024.0)  # no step but the one that is spoilt is skipped
    runs = []
    for iterations in (1, 2, 3):
        with monkeypatch.context() as patch:
            patch.setattr(mtdp.pretrain, "rescale_head_gradients", spoil(at=1))
            run = tmp_path / str(iterations)
            pretrain(tasks, replace(TINY, iterations=iterations, warmup=min(warmup, iterations)), run, quiet=True)
        runs.append((state_of(run), described(run / "state.safetensors")["scaler"]["scale"]))
    (one, scale_1), (two, scale_2), (three, scale_3) = runs
    assert any(name.startswith("momentum.heads") for name in one)
    assert equal(one, two), "weights or momentum moved in the step that was skipped"
    assert not three["network.heads.two.weight"].equal(two["network.heads.two.weight"])
    assert (scale_1, scale_2, scale_3) == (1024.0, 512.0, 512.0)


def test_idle_heads_are_left_alone(tasks: tuple[Task, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scales_from(monkeypatch, init_scale=1024.0)
    config = replace(TINY, arch="resnet18", batch_size=4, seed=4, warmup=0)  # of which every weight moves
    drawn = [set(draw(config.seed, TRAINING, i, (8, 12), config.batch_size).tasks.tolist()) for i in range(3)]
    assert drawn == [{1}, {0, 1}, {0}], "task 1, `three`, has no sample in the third batch"
    for iterations in (2, 3):
        pretrain(tasks, replace(config, iterations=iterations), tmp_path / str(iterations), quiet=True)
    two, three = (state_of(tmp_path / str(iterations)) for iterations in (2, 3))
    idle = [name for name in two if "heads.three" in name]
    assert len(idle) == 4, "weights and biases, and the momentum of both"
    assert all(two[name].equal(three[name]) for name in idle)
    moved = [name for name in two if "heads.three" not in name]
    assert not any(two[name].equal(three[name]) for name in moved)


def test_the_scale_is_taken_out_before_the_step(
    tasks: tuple[Task, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the warm-up no gradient is fp16, and a scale is a power of two: to the bit the heads of a run without one."""
    config = replace(TINY, warmup=3)
    pretrain(tasks, config, tmp_path / "scaled", quiet=True)
    scales_from(monkeypatch, init_scale=1.0)
    pretrain(tasks, config, tmp_path / "plain", quiet=True)
    told = [described(tmp_path / name / "state.safetensors")["scaler"]["scale"] for name in ("scaled", "plain")]
    assert told == [65536.0, 1.0]
    assert equal(state_of(tmp_path / "scaled"), state_of(tmp_path / "plain"))


def small_loss(*arguments: Any) -> tuple[torch.Tensor, dict[str, TaskShare]]:
    loss, shares = routed_loss(*arguments)
    return loss * 2.0**-28, shares


def weights_moved(before: Path, after: Path) -> bool:
    """Whether the first convolution moved, which is the last to be reached by a gradient."""
    name = "backbone.trunk.conv1.0.weight"
    return not load_file(before)[name].equal(load_file(after)[name])


def test_pretraining_scales_its_loss(tasks: tuple[Task, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss times 2^-28 at a rate times 2^28: all gradients that are fp16 would be zero."""
    config = replace(TINY, lr=1e-3 * 2.0**28, warmup=0)
    monkeypatch.setattr(mtdp.pretrain, "routed_loss", small_loss)
    scales_from(monkeypatch, init_scale=2.0**28)
    first = pretrain(tasks, replace(config, lr=1e-30, iterations=1), tmp_path / "start", quiet=True)
    assert weights_moved(first, pretrain(tasks, config, tmp_path / "run", quiet=True))


def test_fine_tuning_scales_its_loss(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtdp.finetune, "routed_loss", small_loss)
    scales_from(monkeypatch, init_scale=2.0**28)
    finetune(task, replace(TUNE, lr=1e-30, epochs=1), tmp_path / "start", quiet=True)
    finetune(task, replace(TUNE, lr=1e-4 * 2.0**28, epochs=1), tmp_path / "run", quiet=True)
    assert weights_moved(*(tmp_path / name / "checkpoint.safetensors" for name in ("start", "run")))


@pytest.mark.parametrize(
    ("init_scale", "stop", "scaling"),
    [(2.0**8, 1, (2.0**8, 1)), (2.0**8, 3, (2.0**9, 1)), (2.0**40, 3, (2.0**38, 0))],
    ids=["at the end of the warm-up", "while the scale grows", "while steps are skipped"],
)
def test_a_resumed_run_ends_with_the_same_bits(
    init_scale: float,
    stop: int,
    scaling: tuple[float, int],
    tasks: tuple[Task, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The scale doubles after two steps, the warm-up's one included; from 2^40 none after it is finite."""
    scales_from(monkeypatch, init_scale=init_scale, growth_interval=2)
    config = replace(TINY, iterations=5)
    whole = pretrain(tasks, config, tmp_path / "whole", quiet=True)
    pretrain(tasks, replace(config, iterations=stop), tmp_path / "parts", quiet=True)
    half = described(tmp_path / "parts/state.safetensors")["scaler"]
    assert (half["scale"], half["_growth_tracker"]) == scaling
    parts = pretrain(tasks, config, tmp_path / "parts", resume=True, quiet=True)
    assert whole.read_bytes() == parts.read_bytes()
    one, two = (tmp_path / name / "state.safetensors" for name in ("whole", "parts"))
    assert described(one) == described(two)
    assert equal(load_file(one), load_file(two))


def test_a_resumed_fine_tuning_ends_with_the_same_bits(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales_from(monkeypatch, init_scale=256.0, growth_interval=2)
    monkeypatch.setattr(mtdp.finetune, "SAVE_EVERY_S", 0.0)
    whole = finetune(task, TUNE, tmp_path / "whole", quiet=True)
    real, calls = mtdp.finetune.head_scores, []

    def die_in_the_second(*args: Any, **options: Any) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("killed")
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(mtdp.finetune, "head_scores", die_in_the_second)
        with pytest.raises(RuntimeError, match="killed"):
            finetune(task, TUNE, tmp_path / "killed", quiet=True)
    half = described(tmp_path / "killed/state.safetensors")["scaler"]
    assert (half["scale"], half["_growth_tracker"]) == (512.0, 1), "after an epoch of three steps"
    assert finetune(task, TUNE, tmp_path / "killed", resume=True, quiet=True) == whole
    one, two = (tmp_path / name / "state.safetensors" for name in ("whole", "killed"))
    assert described(one) == described(two)
    assert equal(load_file(one), load_file(two))


def test_gradients_that_are_never_finite_are_divergence(
    tasks: tuple[Task, ...], task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 65536 it takes 17 halvings to come below 1; without an end, no step would be made for ever."""
    monkeypatch.setattr(mtdp.pretrain, "rescale_head_gradients", spoil(at=-1))
    with pytest.raises(TrainingDiverged, match="the gradients are not finite at iteration 17") as caught:
        pretrain(tasks, replace(TINY, iterations=30, warmup=30, batch_size=16), tmp_path / "pre", quiet=True)
    assert caught.value.hint.startswith("use a lower learning rate (--warmup-lr below 0.01)")

    def endless(*arguments: Any) -> tuple[torch.Tensor, dict[str, TaskShare]]:
        loss, shares = routed_loss(*arguments)
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss, shares

    monkeypatch.setattr(mtdp.finetune, "routed_loss", endless)
    with pytest.raises(TrainingDiverged, match="colour: the gradients are not finite in epoch 6"):  # of 3 batches each
        finetune(task, replace(TUNE, epochs=9), tmp_path / "fine", quiet=True)


def test_a_loss_that_is_not_finite_is_divergence(
    tasks: tuple[Task, ...], task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hint names the other cause that there may be: a sound network may have values that fp16 has not."""
    scales_from(monkeypatch, init_scale=256.0)
    other = "; or use --precision fp32, since in fp16 what is above 65504 is not finite"
    with pytest.raises(TrainingDiverged, match="the loss is nan") as caught:
        pretrain(tasks, replace(TINY, lr=1e30, iterations=9, warmup=0), tmp_path / "pre", quiet=True)
    assert "--lr below 1e+30" in caught.value.hint
    assert caught.value.hint.endswith(other)
    assert not (tmp_path / "pre/checkpoint.safetensors").exists()
    with pytest.raises(TrainingDiverged, match="the loss is nan in epoch 1") as caught:
        finetune(task, replace(TUNE, lr=1e30), tmp_path / "fine", quiet=True)
    assert caught.value.hint == f"use a learning rate below 1e+30{other}"
    with pytest.raises(TrainingDiverged, match="the trained network gives values that are not finite") as caught:
        finetune(task, replace(TUNE, lr=1e30, batch_size=12, epochs=1), tmp_path / "one step", quiet=True)
    assert caught.value.hint == f"{LOWER_RATE}{other}"


def test_what_is_trained_in_fp16_is_judged_in_fp16(tasks: tuple[Task, ...], task: Task, tmp_path: Path) -> None:
    run = tmp_path / "run"
    net, info = load_checkpoint(pretrain(tasks, replace(TINY, iterations=6), run, quiet=True))
    assert info.training["config"]["precision"] == "fp16"
    assert {tensor.dtype for tensor in net.state_dict().values()} == {torch.float32, torch.int64}
    result = finetune_best(task, replace(TUNE, init=str(run)), tmp_path / "tuned", (1e-3,), quiet=True)
    assert 0.0 <= result.test <= 1.0
    extractor = load_extractor(str(run), None, 0, 32)
    assert 0.0 <= probe_task(extractor, task, precision="fp16").score <= 1.0
    exact, half = (extract_features(extractor, task.of(("test",)), precision) for precision in ("fp32", "fp16"))
    assert not np.array_equal(exact, half), "computed in fp16"
    assert np.abs(half - exact).max() < 0.02 * np.abs(exact).max()


def test_features_beyond_fp16_say_so(task: Task) -> None:
    extractor = load_extractor("random", "resnet18", 0, 32)
    with torch.no_grad():
        extractor.backbone.trunk.layer4[1].bn2.weight.fill_(1e6)  # type: ignore[operator,union-attr,index]
    assert np.isfinite(extract_features(extractor, task.of(("test",)), "fp32")).all()
    with pytest.raises(TrainingDiverged, match="not finite") as caught:
        extract_features(extractor, task.of(("test",)), "fp16")
    assert "--precision fp32" in caught.value.hint


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fp16_trains_on_a_gpu(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    config = replace(TINY, iterations=40, warmup=0, lr=2e-3, batch_size=12, head_lr_multiplier=1.0)
    pretrain(tasks, config, tmp_path / "run", quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text("utf-8").splitlines()]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert 1.0 <= described(tmp_path / "run/state.safetensors")["scaler"]["scale"] <= 2.0**16
    pretrain(tasks, replace(config, iterations=41), tmp_path / "run", resume=True, quiet=True)
