"""Backbones: a network without its classifier, that gives a feature map and pooled features.

The trunks keep torchvision's own parameter names, so every weight file in that layout loads without a table of names.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn
from torchvision import models

from mtdp.errors import UsageError
from mtdp.preprocess import Preprocessing

FEATURES_DIM: Final = {
    "densenet121": 1024,
    "densenet161": 2208,
    "densenet169": 1664,
    "densenet201": 1920,
    "resnet18": 512,
    "resnet34": 512,
    "resnet50": 2048,
    "resnet101": 2048,
    "resnet152": 2048,
}
ARCHITECTURES: Final = tuple(sorted(FEATURES_DIM))


class Backbone(nn.Module):
    """A trunk and its pooling: float32[N, 3, H, W] -> float32[N, D], with D = `features_dim`."""

    def __init__(self, arch: str, trunk: nn.Module, features_dim: int) -> None:
        super().__init__()
        self.arch = arch
        self.trunk = trunk
        self.features_dim = features_dim

    def feature_map(self, x: torch.Tensor) -> torch.Tensor:
        """The last feature map, [N, D, h, w], before pooling."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Global average pooling in float32 whatever the precision before it (paper: it replaces the classifier).
        return self.feature_map(x).float().mean(dim=(2, 3))


class _ResNet(Backbone):
    def feature_map(self, x: torch.Tensor) -> torch.Tensor:
        t: Any = self.trunk
        stem = t.maxpool(t.relu(t.bn1(t.conv1(x))))
        last: torch.Tensor = t.layer4(t.layer3(t.layer2(t.layer1(stem))))
        return last


class _DenseNet(Backbone):
    def feature_map(self, x: torch.Tensor) -> torch.Tensor:
        # Without torchvision's ReLU after the last batch norm, as the authors' library has it: features may be
        # negative, and their published weights expect it (their densenet.py).
        t: Any = self.trunk
        last: torch.Tensor = t.features(x)
        return last


class _Timm(Backbone):
    def feature_map(self, x: torch.Tensor) -> torch.Tensor:
        t: Any = self.trunk
        last: torch.Tensor = t.forward_features(x)
        return last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Transformers pool tokens, each in its own way: timm knows how.
        pooled: torch.Tensor = self.trunk(x)
        return pooled.float()


def build_backbone(arch: str) -> Backbone:
    """A backbone of this architecture with the library's default random weights.

    Args:
        arch: one of `ARCHITECTURES`, or `timm:NAME` for any model of timm.

    Raises:
        UsageError: the name is unknown, or timm is not installed.
    """
    if arch.startswith("timm:"):
        return _timm_backbone(arch)
    if arch not in FEATURES_DIM:
        raise UsageError(
            f"unknown architecture {arch!r}", f"use one of {', '.join(ARCHITECTURES)}, or timm:NAME for a timm model"
        )
    trunk: Any = models.get_model(arch, weights=None)
    if arch.startswith("resnet"):
        trunk.fc = nn.Identity()
        return _ResNet(arch, trunk, FEATURES_DIM[arch])
    trunk.classifier = nn.Identity()
    return _DenseNet(arch, trunk, FEATURES_DIM[arch])


def native_preprocessing(backbone: Backbone, image_px: int | None = None) -> Preprocessing:
    """The input that an architecture's published weights were trained for.

    For torchvision's it is ImageNet's; timm's models state theirs (timm.data.resolve_data_config).

    Args:
        backbone: what `build_backbone` gave.
        image_px: side of the input; the architecture's own, or 224, where None.

    Raises:
        UsageError: the architecture takes no input of this side, as a transformer of patches that do not divide it.
    """
    if not isinstance(backbone, _Timm):
        return Preprocessing() if image_px is None else Preprocessing(image_px)
    import timm.data

    resolve: Any = timm.data.resolve_data_config  # type: ignore[attr-defined]  # re-exported without saying so
    stated: dict[str, Any] = resolve({}, model=backbone.trunk)
    own_px = int(stated["input_size"][-1])
    preprocessing = Preprocessing(
        own_px if image_px is None else image_px, tuple(stated["mean"]), tuple(stated["std"]), stated["interpolation"]
    )
    if preprocessing.image_px != own_px:
        _check_side(backbone, preprocessing.image_px, own_px)
    return preprocessing


def _check_side(backbone: Backbone, image_px: int, own_px: int) -> None:
    """Run one black image: every network says by itself what it cannot take, and each in its own way."""
    training = backbone.training
    try:
        with torch.no_grad():
            backbone.eval()(torch.zeros(1, 3, image_px, image_px))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).split("\n", 1)[0].rstrip(".")
        raise UsageError(
            f"{backbone.arch} takes no images of {image_px} px: {reason}", f"use its own side, {own_px} px"
        ) from error
    finally:
        backbone.train(training)


def _timm_backbone(arch: str) -> Backbone:
    name = arch.removeprefix("timm:")
    try:
        import timm
        from timm.models import is_model_in_modules
    except ImportError:
        raise UsageError(f"{arch} needs timm, which is not installed", "pip install timm") from None
    if name not in timm.list_models() and name.split(".")[0] not in timm.list_models():
        raise UsageError(f"timm {timm.__version__} has no model {name!r}", "see timm.list_models()")
    # A vision transformer's table of positions is then fitted to the side of the image, whatever it was trained with;
    # at its own side nothing changes, and its parameters keep their shapes.
    any_side = is_model_in_modules(name.split(".")[0], ["vision_transformer"])
    settings: dict[str, Any] = {"dynamic_img_size": True} if any_side else {}
    trunk: Any = timm.create_model(name, pretrained=False, num_classes=0, **settings)
    # Some networks (MobileNetV3, EfficientViT) widen their features between the pooling and the classifier.
    return _Timm(arch, trunk, int(getattr(trunk, "head_hidden_size", None) or trunk.num_features))
