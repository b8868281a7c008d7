"""The options that transformers are trained with, against the rules written out, and that the paper is left alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mtdp.backbones import build_backbone
from mtdp.checkpoint import load_checkpoint
from mtdp.errors import CheckpointError, UsageError
from mtdp.multitask import MultiTaskNet
from mtdp.optimiser import build_optimiser, rate_at, rate_factor, set_drop_path
from mtdp.pretrain import pretrain
from mtdp.pretrain_config import PretrainConfig
from mtdp.tasks import load_pool

VIT = "timm:vit_tiny_patch16_224"
TINY = PretrainConfig(
    "timm:test_resnet", "random", 6, 1, lr=1e-3, head_lr_multiplier=5.0, batch_size=4, image_px=32, precision="fp32"
)
FULL = replace(TINY, optimiser="adamw", weight_decay=0.05, schedule="cosine", lr_rise=2, layer_decay=0.5)


def rates_and_decays(net: MultiTaskNet, config: PretrainConfig, iteration: int) -> dict[str, tuple[float, float]]:
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    optimiser = build_optimiser(net, config, iteration)
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimiser.param_groups
        for parameter in group["params"]
    }


def test_the_papers_rates_are_constant_and_of_two_groups() -> None:
    net = MultiTaskNet(build_backbone("resnet18"), {"t": ("a", "b")})
    for iteration in (1, 3, 5):
        optimiser = build_optimiser(net, TINY, iteration)
        assert isinstance(optimiser, torch.optim.SGD)
        found = rates_and_decays(net, TINY, iteration)
        assert set(found) == {name for name, _ in net.named_parameters()}
        assert all(value == ((5e-3 if name.startswith("heads.") else 1e-3), 0.0) for name, value in found.items())
        assert all(group["momentum"] == 0.9 for group in optimiser.param_groups)
    warming = rates_and_decays(net, TINY, 0)
    assert warming == {"heads.t.weight": (1e-3, 0.0), "heads.t.bias": (1e-3, 0.0)}


def test_what_no_option_says_of_an_optimiser_is_what_checkpoints_say() -> None:
    net = MultiTaskNet(build_backbone("timm:test_resnet"), {"t": ("a", "b")})
    for group in build_optimiser(net, TINY, 3).param_groups:
        assert (group["momentum"], group["dampening"], group["nesterov"], group["weight_decay"]) == (0.9, 0, False, 0)
    adam = build_optimiser(net, replace(FULL, layer_decay=1.0), 3)
    assert isinstance(adam, torch.optim.AdamW)
    for group in adam.param_groups:
        assert (group["betas"], group["eps"], group["amsgrad"]) == ((0.9, 0.999), 1e-8, False)


def test_the_rate_rises_and_falls_after_the_warm_up_of_the_heads() -> None:
    config = replace(FULL, iterations=11, warmup=1, lr_rise=4)
    factors = [rate_factor(config, iteration) for iteration in range(11)]
    assert factors[0] == 1.0
    assert factors[1:5] == [0.25, 0.5, 0.75, 1.0]
    assert factors[5] == 1.0
    assert factors[5:] == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)])
    assert all(0 < factor <= 1 for factor in factors)
    assert {rate_factor(replace(config, schedule="constant"), iteration) for iteration in range(5, 11)} == {1.0}


@pytest.mark.parametrize(
    ("arch", "stem", "first", "last", "norm", "layers"),
    [
        ("resnet18", "trunk.conv1.weight", "trunk.layer1.0.conv1.weight", "trunk.layer4.1.conv2.weight", None, 4),
        (
            "densenet121",
            "trunk.features.conv0.weight",
            "trunk.features.denseblock1.denselayer1.conv1.weight",
            "trunk.features.denseblock4.denselayer16.conv2.weight",
            "trunk.features.norm5.weight",
            4,
        ),
        (
            VIT,
            "trunk.patch_embed.proj.weight",
            "trunk.blocks.0.mlp.fc1.weight",
            "trunk.blocks.11.mlp.fc1.weight",
            "trunk.norm.weight",
            12,
        ),
    ],
)
def test_each_layer_learns_at_a_part_of_the_rate_of_the_next(
    arch: str, stem: str, first: str, last: str, norm: str | None, layers: int
) -> None:
    net = MultiTaskNet(build_backbone(arch), {"t": ("a", "b")})
    found = rates_and_decays(net, replace(FULL, arch=arch, schedule="constant", lr_rise=0), 3)
    rate = {name.removeprefix("backbone."): value[0] for name, value in found.items()}
    assert set(found) == {name for name, _ in net.named_parameters()}
    assert rate[last] == pytest.approx(1e-3 * 0.5)
    assert rate[first] == pytest.approx(1e-3 * 0.5**layers)
    assert rate[stem] == pytest.approx(1e-3 * 0.5 ** (layers + 1))
    assert rate["heads.t.weight"] == pytest.approx(5e-3)
    if norm:
        assert rate[norm] == pytest.approx(1e-3)


def test_matrices_decay_and_nothing_else() -> None:
    net = MultiTaskNet(build_backbone(VIT), {"t": ("a", "b")})
    for name, (_, decay) in rates_and_decays(net, replace(FULL, arch=VIT), 3).items():
        matrix = name.endswith(".weight") and ".norm" not in name
        assert decay == (0.05 if matrix else 0.0), name


def test_drop_path_leaves_out_more_of_later_blocks_and_nothing_in_eval_mode() -> None:
    backbone = build_backbone(VIT)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        before = backbone.eval()(x)
        set_drop_path(backbone, 0.2)
        assert backbone.eval()(x).equal(before)
        torch.manual_seed(0)
        assert not backbone.train()(x).equal(before)
    chances = [block.drop_path1.drop_prob for block in backbone.trunk.blocks]  # type: ignore[union-attr]
    assert chances == pytest.approx([0.2 * number / 11 for number in range(12)])
    with pytest.raises(UsageError, match="drop_path: resnet18"):
        set_drop_path(build_backbone("resnet18"), 0.1)


def test_a_training_asks_its_network_for_drop_path(pool_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="drop_path: timm:test_resnet"):
        pretrain(load_pool(pool_file), replace(TINY, drop_path=0.1), tmp_path / "run", quiet=True)


def test_a_resumed_run_with_adamw_ends_with_the_same_bits(pool_file: Path, tmp_path: Path) -> None:
    tasks = load_pool(pool_file)
    constant = replace(FULL, schedule="constant")
    whole = pretrain(tasks, constant, tmp_path / "whole", quiet=True)
    pretrain(tasks, replace(constant, iterations=4), tmp_path / "parts", quiet=True)
    parts = pretrain(tasks, constant, tmp_path / "parts", resume=True, quiet=True)
    assert whole.read_bytes() == parts.read_bytes()
    state = load_file(tmp_path / "parts/state.safetensors")
    assert {name.split(".")[0] for name in state} == {"network", "exp_avg", "exp_avg_sq", "step", "rng"}
    sgd = pretrain(tasks, replace(constant, optimiser="sgd"), tmp_path / "sgd", quiet=True)
    assert not load_file(sgd)["heads.two.weight"].equal(load_file(whole)["heads.two.weight"])
    told = load_checkpoint(whole)[1].training["choices"]["optimiser"]
    assert told == "AdamW, betas 0.9 and 0.999, weight decay 0.05, a rise of 2 iterations, layer decay 0.5"


def test_every_step_is_taken_at_its_rate_and_the_length_of_a_cosine_cannot_change(
    pool_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, rates = load_pool(pool_file), []
    step = torch.optim.AdamW.step

    def recording(self: torch.optim.AdamW, closure: None = None) -> None:
        rates.append(self.param_groups[0]["lr"])  # of the heads
        step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", recording)
    pretrain(tasks, FULL, tmp_path / "run", quiet=True)
    assert rates == pytest.approx([1e-3, *(5e-3 * rate_factor(FULL, iteration) for iteration in range(1, 6))])
    told = [rate_at(FULL, iteration) for iteration in range(6)]
    assert told == pytest.approx([1e-3, *(rate / 5 for rate in rates[1:])]), "of the backbone's last layers"
    with pytest.raises(CheckpointError, match="had iterations 6, now it is 9"):
        pretrain(tasks, replace(FULL, iterations=9), tmp_path / "run", resume=True, quiet=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimiser": "adam"}, "unknown optimiser 'adam'"),
        ({"schedule": "step"}, "unknown schedule 'step'"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"layer_decay": 0.0}, "layer_decay is 0"),
        ({"drop_path": 1.0}, "drop_path is 1"),
        ({"lr_rise": 5}, "lr_rise is 5"),
    ],
)
def test_an_option_that_makes_no_sense_is_wrong_usage(change: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        replace(TINY, **change)  # type: ignore[arg-type]
