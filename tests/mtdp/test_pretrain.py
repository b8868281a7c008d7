"""Pre-training: against the paper's algorithm written out plainly, and across interruptions."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import warm
from mtdp.backbones import build_backbone
from mtdp.checkpoint import load_checkpoint
from mtdp.choices import pretraining_choices
from mtdp.errors import CheckpointError, Interrupted, TrainingDiverged, UsageError
from mtdp.images import ImageCache
from mtdp.multitask import MultiTaskNet
from mtdp.pretrain import pretrain
from mtdp.pretrain_config import PretrainConfig
from mtdp.sampling import TRAINING, draw, load_batch
from mtdp.tasks import Task, load_pool
from mtdp.weights import load_backbone_weights

ARCH = "timm:test_resnet"
TINY = PretrainConfig(
    arch=ARCH,
    init="random",
    iterations=4,
    warmup=1,
    lr=1e-2,
    warmup_lr=1e-1,
    head_lr_multiplier=2.0,
    batch_size=6,
    image_px=32,
    seed=3,
    precision="fp32",
    splits=("train",),
)
TEST = ("test",)


@pytest.fixture
def tasks(pool_file: Path) -> tuple[Task, ...]:
    return load_pool(pool_file)


RULES = ("rescaled heads", "idle heads rest", "momentum", "fresh momentum", "head multiplier", "frozen statistics")


def reference(
    tasks: Sequence[Task], config: PretrainConfig, iterations: int, without: str = ""
) -> dict[str, torch.Tensor]:
    """The paper's algorithm, head by head and sample by sample, with SGD written out; one of RULES may be left out."""
    backbone = build_backbone(config.arch)
    torch.manual_seed(config.seed)
    net = MultiTaskNet(backbone, {task.name: task.classes for task in tasks})
    load_backbone_weights(backbone, config.arch, config.init, config.seed)
    data = [task.of(config.splits) for task in tasks]
    cache = ImageCache(config.image_px, 1 << 24)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    velocity: dict[str, torch.Tensor] = {}
    for iteration in range(iterations):
        choice = draw(config.seed, TRAINING, iteration, [len(samples) for samples in data], config.batch_size)
        batch = load_batch(data, choice, cache)
        x = (batch.images.permute(0, 3, 1, 2) / 255 - mean) / std
        warming = iteration < config.warmup
        if iteration == config.warmup and without != "fresh momentum":
            velocity = {}
        net.train()
        if warming:
            net.backbone.train(without == "frozen statistics")
            with torch.no_grad():
                features = net.backbone(x)
        else:
            features = net.backbone(x)
        losses = []
        counts = dict.fromkeys(net.task_names, 0)
        for row in range(config.batch_size):
            name = net.task_names[int(batch.tasks[row])]
            counts[name] += 1
            losses.append(F.cross_entropy(net.heads[name](features[row : row + 1]), batch.labels[row : row + 1]))
        net.zero_grad(set_to_none=True)
        torch.stack(losses).mean().backward()
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                head = name.split(".")[1] if name.startswith("heads.") else None
                if parameter.grad is None:
                    assert warming or (head is not None and counts[head] == 0)
                    if without != "idle heads rest" or head is None:
                        continue
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                rate = config.lr
                if head is not None:
                    if without != "rescaled heads" and counts[head]:
                        gradient = gradient * config.batch_size / counts[head]
                    multiplier = 1.0 if without == "head multiplier" else config.head_lr_multiplier
                    rate = config.warmup_lr if warming else config.lr * multiplier
                momentum = 0.0 if without == "momentum" else config.momentum
                velocity[name] = gradient + momentum * velocity.get(name, torch.zeros_like(gradient))
                parameter.sub_(rate * velocity[name])
    return dict(net.state_dict())


# Low rates: a network of ReLUs and small-batch norms turns rounding into differences within a few large steps.
SPELT_OUT = replace(TINY, arch="resnet18", iterations=3, batch_size=4, image_px=64, lr=1e-4, warmup_lr=1e-3, seed=4)
# One ReLU that rounding turns over moves a layer by thousandths: seen on one of three kinds of CPU.
TOLERANCE = 1e-2


def furthest(
    found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], begin: dict[str, torch.Tensor]
) -> tuple[float, str]:
    """The largest difference of a tensor as a part of the way that it should have moved, and its name."""
    ways = {}
    for name, tensor in wanted.items():
        way = float((tensor - begin[name]).float().norm())
        assert way > 0 or name.endswith("num_batches_tracked"), name
        off = float((found[name] - tensor).float().norm())
        ways[name] = off / way if way else off
    name = max(ways, key=lambda name: ways[name])
    return ways[name], name


def test_it_is_the_algorithm_of_the_paper(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    config = SPELT_OUT
    drawn = [set(draw(config.seed, TRAINING, i, (8, 12), config.batch_size).tasks.tolist()) for i in range(3)]
    assert drawn == [{1}, {0, 1}, {0}], "the case has inactive heads, in the warm-up and after it"
    net, info = load_checkpoint(pretrain(tasks, config, tmp_path / "run", quiet=True))
    assert info.iteration == 3
    begin, wanted = (reference(tasks, config, iterations) for iterations in (0, 3))
    off, name = furthest(dict(net.state_dict()), wanted, begin)
    assert off <= TOLERANCE, name


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_of_the_paper_left_out_would_be_seen(rule: str, tasks: tuple[Task, ...]) -> None:
    begin, wanted = (reference(tasks, SPELT_OUT, iterations) for iterations in (0, 3))
    off, name = furthest(reference(tasks, SPELT_OUT, 3, without=rule), wanted, begin)
    assert off > 5 * TOLERANCE, name


def test_the_warm_up_moves_only_the_heads(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    config = replace(TINY, iterations=3, warmup=3)
    net, _ = load_checkpoint(pretrain(tasks, config, tmp_path / "run", quiet=True))
    start = build_backbone(config.arch)
    load_backbone_weights(start, config.arch, "random", config.seed)
    for name, tensor in net.backbone.state_dict().items():  # batch-norm statistics and counters too
        assert tensor.equal(start.state_dict()[name]), name
    torch.manual_seed(config.seed)
    fresh = MultiTaskNet(build_backbone(config.arch), net.class_names)
    assert not net.heads["two"].weight.equal(fresh.heads["two"].weight)


def test_a_learnable_pool_is_learnt(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    config = replace(TINY, iterations=40, warmup=0, lr=2e-3, batch_size=12, head_lr_multiplier=1.0)
    pretrain(tasks, config, tmp_path / "run", quiet=True)
    first, *_, last = metrics(tmp_path / "run")
    assert last["loss"] < 0.7 * first["loss"]
    assert min(share["accuracy"] for share in last["tasks"].values()) > 0.8


def metrics(run: Path) -> list[dict[str, object]]:  # type: ignore[explicit-any]
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("stop", [1, 2, 3], ids=["at the end of the warm-up", "just after it", "later"])
def test_a_resumed_run_ends_with_the_same_bits(tasks: tuple[Task, ...], tmp_path: Path, stop: int) -> None:
    config = replace(TINY, iterations=5, warmup=1)
    whole = pretrain(tasks, config, tmp_path / "whole", quiet=True)
    pretrain(tasks, replace(config, iterations=stop), tmp_path / "parts", quiet=True)
    parts = pretrain(tasks, config, tmp_path / "parts", resume=True, quiet=True)
    assert whole.read_bytes() == parts.read_bytes()
    one, two = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "parts"))
    assert one.keys() == two.keys()
    assert any(name.startswith("momentum.backbone") for name in one)
    assert all(one[name].equal(two[name]) for name in one)


def test_two_runs_of_one_seed_are_equal_and_of_two_seeds_not(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    a, b = (pretrain(tasks, replace(TINY, iterations=2), tmp_path / name, quiet=True) for name in "ab")
    c = pretrain(tasks, replace(TINY, iterations=2, seed=4), tmp_path / "c", quiet=True)
    assert a.read_bytes() == b.read_bytes()
    torch.manual_seed(TINY.seed)  # of what a backbone draws itself, such as dropout; this one draws nothing
    assert load_file(tmp_path / "a" / "state.safetensors")["rng"].equal(torch.get_rng_state())
    assert not load_file(a)["heads.two.weight"].equal(load_file(c)["heads.two.weight"])


def test_batch_norm_is_adapted_only_to_weights_that_were_trained(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    backbone = build_backbone("resnet18")
    torch.save(backbone.trunk.state_dict(), tmp_path / "trained.pth")
    config = replace(TINY, arch="resnet18", init=str(tmp_path / "trained.pth"), iterations=1, adaptation_batches=3)
    adapted = load_file(pretrain(tasks, config, tmp_path / "with", quiet=True))
    plain = load_file(pretrain(tasks, replace(config, adaptation_batches=0), tmp_path / "without", quiet=True))
    name = "backbone.trunk.bn1.running_mean"
    assert plain[name].equal(backbone.trunk.state_dict()["bn1.running_mean"])  # the warm-up moves no statistics
    assert not adapted[name].equal(plain[name])
    random = load_file(pretrain(tasks, replace(config, init="random"), tmp_path / "random", quiet=True))
    assert not random[name].any()


def test_a_checkpoint_tells_how_it_was_made(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    net, info = load_checkpoint(pretrain(tasks, TINY, tmp_path / "run", quiet=True))
    assert info.heads == {"two": ("blue", "red"), "three": ("blue", "green", "red")}
    assert info.preprocessing.image_px == 32
    assert info.training["config"]["seed"] == 3
    assert info.training["tasks"]["three"]["images"] == 12
    assert info.training["tasks"]["two"]["metric"] == "roc_auc"
    assert info.origin.source == "random"
    assert info.training["choices"] == pretraining_choices(TINY)
    assert info.training["versions"]["torch"] == torch.__version__
    assert net.task_names == ("two", "three")


def test_metrics_are_one_line_each_ten_iterations_without_doubles(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    config = replace(TINY, iterations=12, batch_size=2, warmup=12)
    pretrain(tasks, config, tmp_path / "run", quiet=True)
    path = tmp_path / "run" / "metrics.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write('{"iteration": 20, "loss": 0}\n{"iterat')  # lines that a killed run wrote after its last state
    pretrain(tasks, replace(config, iterations=13), tmp_path / "run", resume=True, quiet=True)
    lines = metrics(tmp_path / "run")
    assert [line["iteration"] for line in lines] == [10, 12, 13]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert sum(share["samples"] for share in lines[0]["tasks"].values()) == 20


def test_a_signal_saves_and_stops(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    config = replace(TINY, iterations=100_000, warmup=0)
    run = tmp_path / "run"

    def when_it_trains() -> None:
        while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").stat().st_size:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    killer = threading.Thread(target=when_it_trains)
    killer.start()
    with pytest.raises(Interrupted, match="saved in") as caught:
        pretrain(tasks, config, run, quiet=True)
    killer.join()
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    _, info = load_checkpoint(run)
    assert 10 <= info.iteration < 100_000
    pretrain(tasks, replace(config, iterations=info.iteration + 1), run, resume=True, quiet=True)
    assert load_checkpoint(run)[1].iteration == info.iteration + 1


def test_a_killed_process_resumes_from_its_last_state(tasks: tuple[Task, ...], pool_file: Path, tmp_path: Path) -> None:
    """SIGKILL leaves no time for anything: what counts is that the last saved state is whole."""
    script = (
        "import sys; from pathlib import Path; from mtdp.pretrain import *; from mtdp.tasks import load_pool;"
        f"pretrain(load_pool(Path(sys.argv[1])), PretrainConfig(arch='{ARCH}', init='random', iterations=100000,"
        "warmup=0, batch_size=4, image_px=32, precision='fp32'), Path(sys.argv[2]), checkpoint_every_s=0.0, quiet=True)"
    )
    run = tmp_path / "run"
    process = warm.start(script, pool_file, run, imports=warm.TRAINING)
    while not (run / "checkpoint.safetensors").is_file():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)
    process.kill()
    process.communicate()
    _, before = load_checkpoint(run)
    config = PretrainConfig(ARCH, "random", 100_000, 0, batch_size=4, image_px=32, precision="fp32")
    # The state is written first, so it may be one iteration ahead of the checkpoint.
    pretrain(tasks, replace(config, iterations=before.iteration + 2), run, resume=True, quiet=True)
    assert load_checkpoint(run)[1].iteration == before.iteration + 2


def test_divergence_is_said_and_keeps_the_last_state(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    pretrain(tasks, TINY, tmp_path / "good", quiet=True)
    with pytest.raises(TrainingDiverged, match="the loss is") as caught:
        pretrain(tasks, replace(TINY, lr=1e30, iterations=9, warmup=0), tmp_path / "bad", quiet=True)
    assert "--lr below 1e+30" in caught.value.hint
    assert not (tmp_path / "bad" / "checkpoint.safetensors").exists()
    warming = replace(TINY, arch="resnet18", warmup_lr=1e38, iterations=9, warmup=9)
    with pytest.raises(TrainingDiverged) as caught:
        pretrain(tasks, warming, tmp_path / "warming", quiet=True)
    assert "--warmup-lr below 1e+38" in caught.value.hint


def test_weights_that_are_not_finite_are_not_saved(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    """The loss of the last iteration is finite, its step is not; what was saved before stays."""
    config = replace(TINY, iterations=1, warmup=0, lr=1e-3)
    pretrain(tasks, config, tmp_path / "run", quiet=True)
    before = (tmp_path / "run/state.safetensors").read_bytes()
    real = torch.optim.SGD.step

    def explode(self: torch.optim.SGD, closure: None = None) -> None:
        real(self, closure)
        self.param_groups[0]["params"][0].data.fill_(float("inf"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", explode)
        with pytest.raises(TrainingDiverged, match="the weights are not finite after iteration 2"):
            pretrain(tasks, replace(config, iterations=2), tmp_path / "run", resume=True, quiet=True)
    assert (tmp_path / "run/state.safetensors").read_bytes() == before


def test_bf16_trains_too(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    net, info = load_checkpoint(
        pretrain(tasks, replace(TINY, iterations=2, precision="bf16"), tmp_path / "r", quiet=True)
    )
    assert info.training["config"]["precision"] == "bf16"
    assert all(tensor.dtype != torch.bfloat16 for tensor in net.state_dict().values())


def test_auto_precision_is_fixed_by_the_first_run(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    auto = replace(TINY, iterations=1, precision="auto")
    _, info = load_checkpoint(pretrain(tasks, auto, tmp_path / "run", quiet=True))
    assert info.training["config"]["precision"] in ("fp32", "bf16")
    pretrain(tasks, replace(auto, iterations=2), tmp_path / "run", resume=True, quiet=True)


def test_another_run_in_the_folder_is_refused(tasks: tuple[Task, ...], pool_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(tasks, replace(TINY, iterations=2), run, quiet=True)
    with pytest.raises(UsageError, match="holds a run already"):
        pretrain(tasks, TINY, run, quiet=True)
    with pytest.raises(CheckpointError, match=r"lr 0\.01, now it is 0\.1"):
        pretrain(tasks, replace(TINY, lr=0.1), run, resume=True, quiet=True)
    with pytest.raises(UsageError, match="2 iterations already"):
        pretrain(tasks, replace(TINY, iterations=1), run, resume=True, quiet=True)
    with pytest.raises(CheckpointError, match="in the order two, three"):
        pretrain(tasks[::-1], TINY, run, resume=True, quiet=True)
    next((pool_file.parent / "three" / "train" / "red").iterdir()).unlink()
    with pytest.raises(CheckpointError, match="other images: three"):
        pretrain(load_pool(pool_file), TINY, run, resume=True, quiet=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"iterations": 0}, "iterations is 0"),
        ({"warmup": 5}, "warmup is 5"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"batch_size": 1}, "batch norm needs"),
        ({"image_px": 5}, "image_px 5"),
        ({"precision": "int8"}, "'int8'"),
        ({"splits": ("train", "dev")}, "'train,dev'"),
        ({"splits": ()}, "splits"),
        ({"seed": -1}, "seed is -1"),
        ({"adaptation_batches": -1}, "adaptation_batches is -1"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_wrong_usage(change: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        replace(TINY, **change)  # type: ignore[arg-type]
    assert words in caught.value.message


def test_the_weights_count_and_not_the_spelling_of_their_path(
    tasks: tuple[Task, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = (tmp_path / name for name in ("first.pth", "other.pth"))
    for path in (first, other):
        torch.save(build_backbone(ARCH).trunk.state_dict(), path)
    config = replace(TINY, iterations=2, init=str(first), adaptation_batches=0)
    whole = pretrain(tasks, config, tmp_path / "whole", quiet=True)
    for run in ("run", "gone"):
        pretrain(tasks, replace(config, iterations=1), tmp_path / run, quiet=True)
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        again = pretrain(tasks, replace(config, init="first.pth"), Path("run"), resume=True, quiet=True)
        assert again.read_bytes() == whole.read_bytes()
    first.write_bytes(other.read_bytes())
    with pytest.raises(CheckpointError, match="the run to resume had other starting weights"):
        pretrain(tasks, config, tmp_path / "gone", resume=True, quiet=True)
    first.unlink()  # a run that goes on does not need them
    assert pretrain(tasks, config, tmp_path / "gone", resume=True, quiet=True).read_bytes() == whole.read_bytes()


def test_no_task_and_no_image_are_wrong_usage(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no task"):
        pretrain((), TINY, tmp_path / "run", quiet=True)
    empty = replace(tasks[0], samples={**tasks[0].samples, "val": ()})
    with pytest.raises(UsageError, match="'two' has no image in val"):
        pretrain((empty,), replace(TINY, splits=("val",)), tmp_path / "run", quiet=True)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be made"):
        pretrain(tasks, TINY, tmp_path / "file" / "run", quiet=True)
