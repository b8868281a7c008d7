"""Batch-norm adaptation: the paper's formulas, and outputs that stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mtdp.backbones import build_backbone
from mtdp.batchnorm import adapt_batch_norm
from mtdp.weights import load_backbone_weights


@pytest.mark.parametrize("eps", [0.0, 7.0])
def test_the_formulas_by_hand(eps: float) -> None:
    """Epsilon belongs to both roots: with 7, sqrt(9 + 7) = 4 and sqrt(4 + 7)."""
    layer = nn.BatchNorm2d(1, eps=eps)
    with torch.no_grad():
        layer.weight.fill_(3.0)
        layer.bias.fill_(1.0)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.fill_(2.0)
        layer.running_var.fill_(4.0)
    # Two batches of two values: means 5 and 7, unbiased variances 2 and 16: together 6 and 9.
    batches = [torch.tensor([4.0, 6.0]).view(2, 1, 1, 1), torch.tensor([7 - 8**0.5, 7 + 8**0.5]).view(2, 1, 1, 1)]
    assert adapt_batch_norm(layer, batches) == 2
    values = {name: float(tensor) for name, tensor in layer.state_dict().items()}
    assert abs(values["running_mean"] - 6.0) < 1e-6
    assert abs(values["running_var"] - 9.0) < 1e-5
    new, old = (9.0 + eps) ** 0.5, (4.0 + eps) ** 0.5
    assert abs(values["weight"] - 3.0 * new / old) < 1e-5
    assert abs(values["bias"] - (1.0 + 3.0 * (6.0 - 2.0) / old)) < 1e-5
    assert values["num_batches_tracked"] == 2


def test_outputs_stay_and_statistics_become_those_of_the_input() -> None:
    backbone = build_backbone("resnet18")
    load_backbone_weights(backbone, "resnet18", "random", seed=3)
    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.weight.uniform_(0.5, 2.0)
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    torch.manual_seed(0)
    batches = [torch.randn(8, 3, 64, 64) * 3 + 1 for _ in range(3)]
    backbone.eval()
    with torch.no_grad():
        before = backbone(batches[0])
        train_before = backbone.train()(batches[0])  # also moves the running statistics, as training would
    load = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    backbone.eval()
    with torch.no_grad():
        before = backbone(batches[0])
    adapt_batch_norm(backbone, batches)
    with torch.no_grad():
        after = backbone(batches[0])
        train_after = backbone.train()(batches[0])
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
    # And that is what it is for: in train mode the features are now near those of eval mode.
    assert (train_after - before).norm() < 0.2 * (train_before - before).norm()
    assert not backbone.state_dict()["trunk.bn1.running_mean"].equal(load["trunk.bn1.running_mean"])


def test_no_batch_changes_nothing() -> None:
    layer = nn.BatchNorm2d(2)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert adapt_batch_norm(layer, []) == 0
    assert all(tensor.equal(before[name]) for name, tensor in layer.state_dict().items())


def test_hooks_are_gone_afterwards() -> None:
    layer = nn.BatchNorm2d(2)
    adapt_batch_norm(layer, [torch.randn(4, 2, 3, 3)])
    assert not layer._forward_pre_hooks
