"""Backbones: what they give for what they are given."""

from __future__ import annotations

import pytest
import torch
from torchvision import models

from mtdp.backbones import ARCHITECTURES, FEATURES_DIM, build_backbone
from mtdp.errors import UsageError


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_has_the_stated_features(arch: str) -> None:
    with torch.device("meta"):  # shapes without arithmetic
        backbone = build_backbone(arch).eval()
        x = torch.empty(2, 3, 64, 64)
        assert backbone.feature_map(x).shape == (2, FEATURES_DIM[arch], 2, 2)
        assert backbone(x).shape == (2, backbone.features_dim)
    assert backbone.features_dim == FEATURES_DIM[arch]


def test_resnet_features_are_those_before_the_classifier() -> None:
    torch.manual_seed(0)
    reference = models.resnet18(weights=None).eval()
    backbone = build_backbone("resnet18").eval()
    backbone.trunk.load_state_dict({k: v for k, v in reference.state_dict().items() if not k.startswith("fc.")})
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(reference.fc(backbone(x)), reference(x))


def test_densenet_features_are_pooled_without_the_last_relu() -> None:
    torch.manual_seed(0)
    reference = models.densenet121(weights=None).eval()
    backbone = build_backbone("densenet121").eval()
    backbone.trunk.load_state_dict({k: v for k, v in reference.state_dict().items() if not k.startswith("classifier.")})
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = backbone(x)
        torch.testing.assert_close(features, reference.features(x).mean((2, 3)))
        torch.testing.assert_close(reference.classifier(torch.relu(backbone.feature_map(x)).mean((2, 3))), reference(x))
    assert (features < 0).any()


def test_features_are_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert build_backbone("resnet18").eval()(torch.randn(1, 3, 32, 32)).dtype == torch.float32


def test_an_unknown_architecture_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="'resnet51'") as caught:
        build_backbone("resnet51")
    assert "densenet121" in caught.value.hint


def test_timm_is_asked_for_by_name() -> None:
    try:
        import timm  # noqa: F401
    except ImportError:
        with pytest.raises(UsageError, match="timm, which is not installed") as caught:
            build_backbone("timm:resnet18")
        assert caught.value.hint == "pip install timm"
    else:
        assert build_backbone("timm:resnet18").features_dim == 512
        with pytest.raises(UsageError, match="no model 'nothing'"):
            build_backbone("timm:nothing")
