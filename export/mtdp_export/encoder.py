"""A network by its library's constructor, and which of its values is the feature."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import nn

from mtdp.backbones import Backbone
from mtdp_export.catalogue import CLASS_NAMES, Library
from mtdp_export.errors import ExportError, ExportUsageError

TOKEN_FEATURES: Final = ("cls", "mean", "cls+mean")
FEATURES: Final = (*TOKEN_FEATURES, "pooled", "projection")
TRANSFORMERS: Final = ("Dinov2Model", "Dinov2WithRegistersModel", "ViTModel", "CLIPVisionModelWithProjection")
_STAGE: Final = re.compile(r"stage([1-9])")
_LEAST_ON_META: Final = 100_000_000  # parameters: smaller networks are built as they are


@dataclass(frozen=True, slots=True)
class Built:
    """A network without weights: on the meta device where it is large, with random ones otherwise."""

    library: Library
    arch: str
    trunk: nn.Module
    feature: str  # which of its values are the feature
    prefix_tokens: int  # class token and registers, before those of the patches
    stages: tuple[int, ...] = ()  # of a convolutional network: the channels of each stage's map


class Encoder(Backbone):
    """float32[N, 3, P, P] -> float32[N, D]: a network and the part of it that is the feature."""

    def __init__(self, built: Built, features_dim: int = 0) -> None:
        super().__init__(built.arch, built.trunk, features_dim)
        self.feature = built.feature
        self.library = built.library
        self.prefix_tokens = built.prefix_tokens

    def feature_map(self, x: torch.Tensor) -> torch.Tensor:
        """The tokens [N, T, D], or a map [N, D, h, w] or [N, h, w, D], as the library gives them."""
        t: Any = self.trunk
        if self.library == "transformers":
            tokens: torch.Tensor = t(pixel_values=x, **self.options()).last_hidden_state
            return tokens
        last: torch.Tensor = t.forward_features(x)
        return last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t: Any = self.trunk
        stage = _STAGE.fullmatch(self.feature)
        features: torch.Tensor
        if self.feature == "projection":
            features = t(pixel_values=x, **self.options()).image_embeds
        elif stage is not None:
            features = _at_stage(t, x, int(stage[1])).float().mean((2, 3))
        elif self.feature == "pooled":
            features = t(pixel_values=x, **self.options()).pooler_output if self.library == "transformers" else t(x)
        else:
            features = self.of_tokens(self.feature_map(x))
        return features.float()

    def of_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Make the feature of the tokens [N, T, D], where it is one of TOKEN_FEATURES."""
        parts = []
        if self.feature != "mean":
            parts.append(tokens[:, 0])
        if self.feature != "cls":
            parts.append(tokens[:, self.prefix_tokens :].mean(1))
        return torch.cat(parts, dim=-1)

    def options(self) -> dict[str, Any]:
        """Positions for an input of another size than the table's, where the model must be told."""
        takes = inspect.signature(type(self.trunk).forward).parameters
        return {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}


def _at_stage(trunk: Any, x: torch.Tensor, stage: int) -> torch.Tensor:
    """The map after a stage of a ResNet of timm."""
    x = trunk.maxpool(trunk.act1(trunk.bn1(trunk.conv1(x))))
    for number in range(1, stage + 1):
        x = getattr(trunk, f"layer{number}")(x)
    return x


def build(
    library: Library,
    arch: str,
    arguments: Mapping[str, Any],
    feature: str,
    *,
    weights: Literal["none", "random"] = "none",
) -> Built:
    """Return a network without its weights, what the feature does not need left out.

    Args:
        library: timm or transformers.
        arch: a name of timm, or a class of transformers.
        arguments: of the constructor (transformers: of the class's configuration); classes by name.
        feature: what will be asked of it; of timm, where empty, what the network itself pools: its class token, where
            it is to give that or all tokens.
        weights: random ones of its library, or none: a large network is then on the meta device.

    Raises:
        ExportUsageError: there is no such architecture, or it takes no such argument, or has no such feature.
        ExportError: the library is not installed.
    """
    make = _transformers_maker(arch, arguments, feature) if library == "transformers" else _timm_maker(arch, arguments)
    try:
        with torch.device("meta"):
            trunk = make()
        count = sum(parameter.numel() for parameter in trunk.parameters())
        if weights == "random" or count < _LEAST_ON_META or any(True for _ in trunk.named_buffers()):
            trunk = make()
    except (TypeError, ValueError, AssertionError, RuntimeError, AttributeError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ExportUsageError(f"{arch} cannot be built with these arguments: {reason}", "check --arch-arg") from error
    _check_switches(trunk, arguments)
    prefix = _prefix_tokens(library, trunk)
    if not feature:
        feature = "cls" if prefix and getattr(trunk, "global_pool", None) in ("", "token") else "pooled"
    built = Built(library, arch, trunk, feature, prefix, _stages(trunk))
    _check_feature(built)
    stage = _STAGE.fullmatch(feature)
    if stage is not None:  # later stages would be weights that nothing reads
        kept: Any = trunk
        for number in range(int(stage[1]) + 1, len(built.stages) + 1):
            setattr(kept, f"layer{number}", nn.Identity())
    return built


def _check_switches(trunk: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Refuse a word where a constructor takes true or false: it would count as true."""
    takes = inspect.signature(type(trunk).__init__).parameters
    for name, value in arguments.items():
        if name in takes and isinstance(takes[name].default, bool) and not isinstance(value, bool):
            raise ExportUsageError(f"--arch-arg {name}={value}: it is a switch", "true or false")


def shape_given(network: nn.Module, side_px: int) -> tuple[int, ...]:
    """Return the shape of what a network in eval mode gives for one image of R, G and B.

    Raises:
        RuntimeError, AssertionError, ...: whatever it raises where it takes no such image.
    """
    size = (1, 3, side_px, side_px)
    with torch.no_grad():
        try:  # shapes alone, without the arithmetic
            named = [*network.named_parameters(), *network.named_buffers()]
            on_meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in named}
            given = torch.func.functional_call(network, on_meta, (torch.empty(size, device="meta"),))
        except Exception:  # of whatever cannot be done without values
            given = network(torch.zeros(size))
    return tuple(given.shape)


def _check_feature(built: Built) -> None:
    feature, tokens = built.feature, built.prefix_tokens > 0
    stage = _STAGE.fullmatch(feature)
    known = ["pooled"]
    if tokens:
        known = list(TOKEN_FEATURES) + (["pooled"] if built.library == "timm" else [])
    if built.stages:
        known += [f"stage{number}" for number in range(1, len(built.stages) + 1)]
    if built.arch == "CLIPVisionModelWithProjection":
        known = ["projection"]
    if (stage is not None and int(stage[1]) > len(built.stages)) or feature not in known:
        raise ExportUsageError(f"--feature {feature}: {built.arch} has no such feature", f"one of {', '.join(known)}")


def _prefix_tokens(library: Library, trunk: Any) -> int:
    if library == "timm":
        return int(getattr(trunk, "num_prefix_tokens", 0) or 0)
    return 1 + int(getattr(trunk.config, "num_register_tokens", 0) or 0)


def _stages(trunk: Any) -> tuple[int, ...]:
    """The channels after each stage, where a network has the stages of a ResNet."""
    if not all(hasattr(trunk, name) for name in ("conv1", "bn1", "act1", "maxpool", "layer1", "feature_info")):
        return ()
    return tuple(int(info["num_chs"]) for info in trunk.feature_info if str(info["module"]).startswith("layer"))


def _timm_maker(arch: str, arguments: Mapping[str, Any]) -> Any:
    try:
        import timm
    except ImportError:
        raise ExportError(f"timm:{arch} needs timm, which is not installed", "pip install timm") from None
    if not timm.is_model(arch):
        close = timm.list_models(f"*{arch}*")[:3]
        raise ExportUsageError(
            f"timm {timm.__version__} has no model {arch!r}",
            f"like it: {', '.join(close)}" if close else "see timm.list_models()",
        )
    foreign = [name for name in arguments if name in inspect.signature(timm.create_model).parameters]
    if foreign:
        raise ExportUsageError(
            f"--arch-arg {foreign[0]}: no argument of a network", "weights are given by --weights; leave it out"
        )
    given = {name: _value(name, value) for name, value in arguments.items()}

    def make() -> nn.Module:
        trunk: nn.Module = timm.create_model(arch, pretrained=False, num_classes=0, **given)
        return trunk

    return make


def _transformers_maker(arch: str, arguments: Mapping[str, Any], feature: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise ExportError(f"{arch} needs transformers, which is not installed", "pip install transformers") from None
    if arch not in TRANSFORMERS:
        raise ExportUsageError(
            f"{arch}: not an architecture of transformers that is known here", f"one of {', '.join(TRANSFORMERS)}"
        )
    kind = getattr(transformers, arch)
    config = kind.config_class(**arguments, attn_implementation="sdpa")

    def make() -> nn.Module:
        # A pooler that the feature does not need may be missing from the file.
        options = {"add_pooling_layer": feature == "pooled"} if arch == "ViTModel" else {}
        trunk: nn.Module = kind(config, **options)
        return trunk

    return make


def _value(name: str, value: Any) -> Any:
    """An argument as the constructor takes it: classes come by name."""
    if not name.endswith("_layer"):
        return value
    if value not in CLASS_NAMES:
        raise ExportUsageError(f"--arch-arg {name}={value}: no class of that name", f"one of {', '.join(CLASS_NAMES)}")
    if value == "silu":
        return nn.SiLU
    if value == "conv_stem":
        from mtdp_export.conv_stem import ConvStem

        return ConvStem
    from timm.layers import SwiGLUPacked  # type: ignore[attr-defined]  # re-exported without saying so

    return SwiGLUPacked


def resized_table(library: Library, arguments: Mapping[str, Any], tensors: Mapping[str, torch.Size]) -> dict[str, Any]:
    """Return the arguments of a transformers model with the image size of the file's own table of positions."""
    given = dict(arguments)
    if library != "transformers":
        return given
    for name, shape in tensors.items():
        if name.endswith(("position_embeddings", "position_embedding.weight")):
            given["image_size"] = round((shape[-2] - 1) ** 0.5) * int(given.get("patch_size", 16))
    return given
