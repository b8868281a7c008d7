"""The optimiser and its rates: the paper's SGD at constant rates, or what transformers are trained with, by option.

By option, all off for the paper: AdamW with weight decay, a linear rise of the rate and its fall by a cosine, lower
rates for earlier layers (layer decay, Clark et al. 2020; Bao et al. 2022), and stochastic depth (drop path, Huang et
al. 2016).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from mtdp.backbones import Backbone
from mtdp.errors import UsageError
from mtdp.multitask import MultiTaskNet

if TYPE_CHECKING:
    from mtdp.pretrain_config import PretrainConfig

OPTIMISERS: Final = ("sgd", "adamw")
SCHEDULES: Final = ("constant", "cosine")
BASE_RATE: Final = "base_lr"  # of a group of parameters, before the schedule

_RESNET: Final = re.compile(r"^trunk\.layer(\d)\.")
_DENSENET: Final = re.compile(r"^trunk\.features\.(?:denseblock|transition)(\d)")
_BLOCK: Final = re.compile(r"^trunk\.blocks\.(\d+)\.")
_LAST: Final = re.compile(r"^trunk\.(features\.norm5|norm|fc_norm|attn_pool)\b")


def build_optimiser(net: MultiTaskNet, config: PretrainConfig, iteration: int) -> torch.optim.Optimizer:
    """The optimiser of the phase that an iteration is in; heads alone in the warm-up."""
    heads = list(net.heads.named_parameters())
    if iteration < config.warmup:
        groups = list(_groups(heads, config.warmup_lr, config))
    else:
        groups = list(_groups(heads, config.lr * config.head_lr_multiplier, config))
        for scale, parameters in _by_layer(net.backbone, config.layer_decay).items():
            groups += _groups(parameters, config.lr * scale, config)
    optimiser: torch.optim.Optimizer
    if config.optimiser == "adamw":
        optimiser = torch.optim.AdamW(groups, lr=config.lr)
    else:
        optimiser = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    set_rates(optimiser, config, iteration)
    return optimiser


def set_rates(optimiser: torch.optim.Optimizer, config: PretrainConfig, iteration: int) -> None:
    """Set the rates that hold at an iteration, counted from 0."""
    factor = rate_factor(config, iteration)
    for group in optimiser.param_groups:
        group["lr"] = group[BASE_RATE] * factor


def rate_at(config: PretrainConfig, iteration: int) -> float:
    """The rate at an iteration, counted from 0: of the heads in the warm-up, then of the backbone's last layers."""
    base = config.warmup_lr if iteration < config.warmup else config.lr
    return base * rate_factor(config, iteration)


def rate_factor(config: PretrainConfig, iteration: int) -> float:
    """What the rates of an iteration, counted from 0, are multiplied with: 1 in the warm-up of the heads.

    After it they rise linearly over `lr_rise` iterations, the last of which has the whole rate; then they stay, or fall
    to 0 by half a cosine, which they would reach after the last iteration.
    """
    since = iteration - config.warmup
    if since < 0:
        return 1.0
    if since < config.lr_rise:
        return (since + 1) / config.lr_rise
    if config.schedule == "constant":
        return 1.0
    whole = config.iterations - config.warmup - config.lr_rise
    return 0.5 * (1 + math.cos(math.pi * (since - config.lr_rise) / whole))


def _groups(
    parameters: list[tuple[str, nn.Parameter]], rate: float, config: PretrainConfig
) -> Iterator[dict[str, Any]]:
    """Matrices decay; biases, norms, scales, tokens and tables of positions do not (as in timm)."""
    if config.weight_decay == 0:
        yield {"params": [p for _, p in parameters], "lr": rate, BASE_RATE: rate, "weight_decay": 0.0}
        return
    kept = [p for name, p in parameters if _is_kept(name, p)]
    decayed = [p for name, p in parameters if not _is_kept(name, p)]
    for some, decay in ((decayed, config.weight_decay), (kept, 0.0)):
        if some:
            yield {"params": some, "lr": rate, BASE_RATE: rate, "weight_decay": decay}


def _is_kept(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim < 2 or name.rsplit(".", 1)[-1] in ("pos_embed", "cls_token", "reg_token", "dist_token")


def _by_layer(backbone: Backbone, decay: float) -> dict[float, list[tuple[str, nn.Parameter]]]:
    """Factor of the rate -> its parameters: 1 of the last norm, `decay` of the layer before it, and so on."""
    parameters = list(backbone.named_parameters())
    if decay == 1.0:
        return {1.0: parameters}
    numbers = {name: _layer_of(name) for name, _ in parameters}
    top = max((number for number in numbers.values() if number is not None), default=0)
    if top == 0:
        raise UsageError(
            f"layer_decay: the layers of {backbone.arch} are not known",
            "leave it at 1: it is for ViT, ResNet, DenseNet",
        )
    found: dict[float, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in parameters:
        number = numbers[name]
        steps = 0 if number is None else top + 1 - number
        found.setdefault(decay**steps, []).append((name, parameter))
    return found


def _layer_of(name: str) -> int | None:
    """0: the stem, 1 and more: a stage or block, counted from the input; None: what follows the last one."""
    for pattern, first in ((_RESNET, 0), (_DENSENET, 0), (_BLOCK, 1)):
        found = pattern.match(name)
        if found:
            return int(found[1]) + first
    return None if _LAST.match(name) else 0


def set_drop_path(backbone: Backbone, rate: float) -> None:
    """Leave out residual branches at random in training: with chance `rate` in the last block, linearly less before.

    Raises:
        UsageError: the architecture has no blocks with such branches.
    """
    if rate == 0:
        return
    trunk: Any = backbone.trunk
    blocks = list(getattr(trunk, "blocks", []))
    if not blocks or not all(hasattr(block, "drop_path1") and hasattr(block, "drop_path2") for block in blocks):
        raise UsageError(f"drop_path: {backbone.arch} has no residual blocks of a vision transformer", "leave it at 0")
    from timm.layers import DropPath  # type: ignore[attr-defined]  # re-exported without saying so

    for number, block in enumerate(blocks):
        chance = rate * number / max(len(blocks) - 1, 1)
        block.drop_path1, block.drop_path2 = DropPath(chance), DropPath(chance)
