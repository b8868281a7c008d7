"""Fine-tuning: choice of rate and epoch on val, one look at test, and resumption."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

import mtdp.finetune as module
from mtdp.backbones import build_backbone, native_preprocessing
from mtdp.checkpoint import load_checkpoint, save_checkpoint
from mtdp.choices import finetuning_choices
from mtdp.errors import CheckpointError, Interrupted, TaskError, TrainingDiverged, UsageError
from mtdp.finetune import FinetuneConfig, finetune, finetune_best
from mtdp.images import ImageCache
from mtdp.multitask import MultiTaskNet
from mtdp.preprocess import Normalise
from mtdp.pretrain import pretrain
from mtdp.pretrain_config import PretrainConfig
from mtdp.sampling import draw_epoch, epoch_batches
from mtdp.scores import score
from mtdp.tasks import Task, load_pool, load_task
from mtdp.weights import load_backbone_weights

Make = Callable[..., Path]
ARCH = "timm:test_resnet"
TINY = FinetuneConfig(arch=ARCH, init="random", epochs=3, batch_size=4, image_px=32, lr=1e-2, precision="fp32")


@pytest.fixture
def task(tmp_path: Path, make_task: Make) -> Task:
    return load_task(make_task(tmp_path / "colour", ("blue", "green", "red"), per_class=4))


@given(st.integers(2, 60), st.integers(2, 16), st.integers(0, 5))
def test_an_epoch_shows_every_image_once(size: int, batch_size: int, epoch: int) -> None:
    draws = draw_epoch(0, epoch, size, batch_size)
    seen = np.concatenate([draw.images for draw in draws])
    left = size - size % batch_size if size % batch_size == 1 else size  # a last batch of one is left out
    assert len(seen) == len(set(seen.tolist())) == left
    assert max(len(draw.images) for draw in draws) <= batch_size


def test_epochs_differ_and_repeat_by_seed() -> None:
    first, again, second = (draw_epoch(0, epoch, 50, 50)[0].images.tolist() for epoch in (0, 0, 1))
    assert first == again != second


def test_scores_are_the_tasks_metric() -> None:
    logits = np.array([[0.2, 0.1], [0.0, 3.0], [1.0, 0.95], [0.5, 0.1]], np.float32)
    labels = np.array([0, 1, 1, 0])
    assert score(logits, labels, "accuracy") == 0.75
    margins = logits[:, 1] - logits[:, 0]
    assert score(logits, labels, "roc_auc") == roc_auc_score(labels, margins) == 1.0
    assert roc_auc_score(labels, margins > 0) == 0.75, "of predicted classes it would be another"


def test_the_best_rate_on_val_is_judged_on_test(task: Task, tmp_path: Path) -> None:
    rates = (1e-2, 1e-6)
    result = finetune_best(task, TINY, tmp_path / "run", rates, quiet=True)
    assert result.lr == max(rates, key=lambda lr: result.val_of_each_lr[f"{lr:g}"])
    assert result.val == max(result.val_of_each_lr.values())
    assert json.loads((tmp_path / "run/result.json").read_text())["test"] == result.test
    net, info = load_checkpoint(tmp_path / "run")
    assert (info.iteration, info.origin.description) == (result.epoch, result.weights)
    assert "random" in result.weights
    assert net.class_names == {"colour": ("blue", "green", "red")}
    lines = [json.loads(line) for line in (tmp_path / f"run/lr-{result.lr:g}/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert max(line["val"] for line in lines) == pytest.approx(result.val, abs=1e-4)


def test_starting_weights_are_those_of_the_run_that_is_named(task: Task, pool_file: Path, tmp_path: Path) -> None:
    config = PretrainConfig(
        arch=ARCH, init="random", iterations=1, warmup=0, batch_size=4, image_px=32, precision="fp32"
    )
    pretrain(load_pool(pool_file), config, tmp_path / "pre", quiet=True)
    started = replace(TINY, init=str(tmp_path / "pre"), lr=1e-12, epochs=1)
    finetune(task, started, tmp_path / "run", quiet=True)
    origin = load_checkpoint(tmp_path / "run")[1].origin
    assert origin.description == "1 iterations of pre, from random initialisation, seed 0"
    name = "backbone.trunk.layer1.0.conv1.weight"
    before = load_file(tmp_path / "pre/checkpoint.safetensors")[name]
    torch.testing.assert_close(load_file(tmp_path / "run/checkpoint.safetensors")[name], before)


def test_a_resumed_run_ends_with_the_same_weights(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = finetune(task, TINY, tmp_path / "whole", quiet=True)
    real = module.head_scores
    calls = []

    def stop_after_two(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise Interrupted(15, "stopped")
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "head_scores", stop_after_two)
    monkeypatch.setattr(module, "SAVE_EVERY_S", 0.0)
    with pytest.raises(Interrupted):
        finetune(task, TINY, tmp_path / "killed", quiet=True)
    monkeypatch.setattr(module, "head_scores", real)
    with pytest.raises(UsageError, match="holds a run already"):
        finetune(task, TINY, tmp_path / "killed", quiet=True)
    assert finetune(task, TINY, tmp_path / "killed", resume=True, quiet=True) == whole
    one, other = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_configuration_does_not_resume(task: Task, tmp_path: Path) -> None:
    finetune(task, TINY, tmp_path / "run", quiet=True)
    with pytest.raises(CheckpointError, match="batch_size"):
        finetune(task, replace(TINY, batch_size=6), tmp_path / "run", resume=True, quiet=True)


def test_a_rate_that_diverges_does_not_end_the_others(task: Task, tmp_path: Path) -> None:
    result = finetune_best(task, replace(TINY, epochs=2), tmp_path / "run", (1e30, 1e-3), quiet=True)
    assert list(result.val_of_each_lr) == ["0.001"]
    with pytest.raises(TrainingDiverged):
        finetune_best(task, TINY, tmp_path / "all", (1e30,), quiet=True)


def test_a_task_without_val_is_refused(tmp_path: Path, make_task: Make) -> None:
    folder = make_task(tmp_path / "t")
    (folder / "val").rename(tmp_path / "elsewhere")
    with pytest.raises(TaskError, match="no val split"):
        finetune_best(load_task(folder), TINY, tmp_path / "run", quiet=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"adaptation_batches": -1}, "adaptation_batches is -1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"lr": 0.0}, "lr is 0"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_wrong_usage(change: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        replace(TINY, **change)  # type: ignore[arg-type]


def test_divergence_in_the_last_step_gives_no_score(task: Task, tmp_path: Path) -> None:
    """One step of one epoch: the loss before it is finite; the network after it is not."""
    with pytest.raises(TrainingDiverged, match="not finite") as caught:
        finetune(task, replace(TINY, epochs=1, batch_size=12, lr=1e30), tmp_path / "run", quiet=True)
    assert "lower learning rate" in caught.value.hint


def pretrained(pool_file: Path, out: Path, seed: int = 0) -> Path:
    config = PretrainConfig(ARCH, "random", 1, 0, batch_size=4, image_px=32, seed=seed, precision="fp32")
    pretrain(load_pool(pool_file), config, out, quiet=True)
    return out


def test_another_runs_checkpoint_is_not_overwritten(task: Task, pool_file: Path, tmp_path: Path) -> None:
    run = pretrained(pool_file, tmp_path / "run")
    before = (run / "checkpoint.safetensors").read_bytes()
    with pytest.raises(UsageError, match=r"holds another run's checkpoint\.safetensors"):
        finetune_best(task, replace(TINY, init=str(run)), run, (1e-3,), quiet=True)
    (run / "state.safetensors").unlink()
    with pytest.raises(UsageError, match="holds another run's"):
        finetune_best(task, replace(TINY, init=str(run)), run, (1e-3,), quiet=True)
    with pytest.raises(UsageError, match="holds another run's"):
        pretrained(pool_file, run)
    assert (run / "checkpoint.safetensors").read_bytes() == before
    finetune(task, TINY, tmp_path / "tuned", quiet=True)
    with pytest.raises(UsageError, match="holds a fine-tuning run, not a pre-training run"):
        pretrain(load_pool(pool_file), PretrainConfig(ARCH, "random"), tmp_path / "tuned", resume=True, quiet=True)


def test_the_state_is_of_the_checkpoints_epoch(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed in the second epoch has the first's checkpoint, and a state that says so."""
    real = module.head_scores
    calls: list[int] = []

    def die_in_the_second(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("killed")
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "head_scores", die_in_the_second)
    with pytest.raises(RuntimeError):
        finetune(task, TINY, tmp_path / "run", quiet=True)
    told = json.loads(safe_open(tmp_path / "run/state.safetensors", framework="pt").metadata()["mtdp"])
    assert told["best_epoch"] == told["epoch"] == load_checkpoint(tmp_path / "run")[1].iteration == 1


def test_a_checkpoint_of_another_epoch_is_not_judged(task: Task, tmp_path: Path) -> None:
    finetune_best(task, TINY, tmp_path / "run", (1e-3,), quiet=True)
    path = tmp_path / "run/lr-0.001/checkpoint.safetensors"
    net, info = load_checkpoint(path)
    save_checkpoint(path, net, replace(info, iteration=info.iteration + 1))
    with pytest.raises(CheckpointError, match="the checkpoint is of epoch"):
        finetune_best(task, TINY, tmp_path / "run", (1e-3,), resume=True, quiet=True)


def test_the_weights_count_and_not_the_spelling_of_their_path(
    task: Task, pool_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = pretrained(pool_file, tmp_path / "pre")
    started = replace(TINY, init=str(run), epochs=1)
    whole = finetune(task, started, tmp_path / "run", quiet=True)
    monkeypatch.chdir(tmp_path)
    assert finetune(task, replace(started, init="pre"), Path("run"), resume=True, quiet=True) == whole
    pretrained(pool_file, tmp_path / "other", seed=1)
    (run / "checkpoint.safetensors").write_bytes((tmp_path / "other/checkpoint.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="differs in init"):
        finetune(task, started, tmp_path / "run", resume=True, quiet=True)


def test_rates_differ_and_the_process_is_one(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="given twice"):
        finetune_best(task, TINY, tmp_path / "run", (1e-3, 0.001), quiet=True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="fine-tuning was started as 4 processes"):
        finetune_best(task, TINY, tmp_path / "run", (1e-3,), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_says_what_was_chosen_where_the_paper_is_silent(task: Task, tmp_path: Path) -> None:
    for momentum, words in ((0.9, "momentum 0.9"), (0.0, "no momentum")):
        config = replace(TINY, epochs=1, momentum=momentum)
        finetune(task, config, tmp_path / words, quiet=True)
        told = load_checkpoint(tmp_path / words)[1].training["choices"]
        assert told == finetuning_choices(config)
        assert words in told["optimiser"]


@pytest.mark.parametrize("without", ["", "momentum", "train mode", "the backbone"])
def test_fine_tuning_is_sgd_on_the_whole_network(task: Task, tmp_path: Path, without: str) -> None:
    """Written out; one of its rules left out gives other weights."""
    config = replace(TINY, epochs=2, lr=1e-3, seed=3)
    finetune(task, config, tmp_path / "run", quiet=True)
    backbone = build_backbone(ARCH)
    torch.manual_seed(3)
    net = MultiTaskNet(backbone, {"colour": task.classes})
    load_backbone_weights(backbone, ARCH, "random", 3)
    native = native_preprocessing(backbone, 32)
    normalise, cache = Normalise(native), ImageCache(32, 1 << 20, native.interpolation)
    velocity = {name: torch.zeros_like(parameter) for name, parameter in net.named_parameters()}
    for epoch in range(2):
        net.train(without != "train mode" or epoch == 0)
        for batch in epoch_batches(task.of(("train",)), cache, seed=3, epoch=epoch, batch_size=4):
            net.zero_grad()
            F.cross_entropy(net.heads["colour"](net.backbone(normalise(batch.images))), batch.labels).backward()
            with torch.no_grad():
                for name, parameter in net.named_parameters():
                    assert parameter.grad is not None
                    if without == "the backbone" and name.startswith("backbone."):
                        continue
                    velocity[name] = (0.0 if without == "momentum" else 0.9) * velocity[name] + parameter.grad
                    parameter -= 1e-3 * velocity[name]
    found = load_file(tmp_path / "run/state.safetensors")
    same = [
        torch.allclose(found[f"network.{name}"], tensor, rtol=1e-3, atol=1e-5)
        for name, tensor in net.state_dict().items()
    ]
    assert all(same) == (without == "")
