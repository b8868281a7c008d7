"""The tokens of a transformer's patches, beside the feature that is made of them: which networks have them, and how.

They are what the library gives after its own final norm, where it has one there: the same values of which a mean is
taken. Class and register tokens are left out.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch

from mtdp.backbones import Backbone
from mtdp_export.encoder import Encoder
from mtdp_export.errors import ExportUsageError
from mtdp_runtime.bundle.manifest import Tokens

GOLDEN_TILES: Final = 4  # whose tokens golden.npz keeps: they are large
_NO_TOKENS: Final = "leave --tokens out; of the encoders (--list-encoders) transformers have patch tokens"


def tokens_of(backbone: Backbone, side_px: int) -> Tokens:
    """Return the grid of a network's patch tokens for images of this side; one black image says so.

    Raises:
        ExportUsageError: it has none.
    """
    if not _may_have_tokens(backbone):
        raise ExportUsageError(f"--tokens: {backbone.arch} is no transformer: it has no patch tokens", _NO_TOKENS)
    with torch.no_grad():
        _, tokens = features_and_tokens(backbone, torch.zeros(1, 3, side_px, side_px))
    return grid_of(tuple(tokens.shape), backbone.arch)


def grid_of(shape: tuple[int, ...], arch: str) -> Tokens:
    """Return the grid of tokens [N, T, D] of square images.

    Raises:
        ExportUsageError: they are no square: what is left are not the patches.
    """
    _, count, dim = shape
    side = math.isqrt(count)
    if side * side != count:
        raise ExportUsageError(
            f"--tokens: {arch} gives {count} tokens, which are no square of patches", "leave --tokens out"
        )
    return Tokens(count, dim, (side, side))


def features_and_tokens(backbone: Backbone, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute both at once: float32[N, D] as the network alone gives it, and float32[N, T, D] of the patches.

    A map [N, h, w, D], as window transformers give, becomes tokens row by row.
    """
    trunk: Any = backbone.trunk
    features: torch.Tensor
    if isinstance(backbone, Encoder) and backbone.library == "transformers":
        given = trunk(pixel_values=x, **backbone.options())
        last: torch.Tensor = given.last_hidden_state
        own = {"projection": "image_embeds", "pooled": "pooler_output"}.get(backbone.feature)
        features = backbone.of_tokens(last) if own is None else getattr(given, own)
        prefix = backbone.prefix_tokens
    else:
        last = trunk.forward_features(x)
        encoder = backbone if isinstance(backbone, Encoder) and backbone.feature != "pooled" else None
        features = trunk.forward_head(last) if encoder is None else encoder.of_tokens(last)
        prefix = int(getattr(trunk, "num_prefix_tokens", 0) or 0)
    tokens = last.flatten(1, 2) if last.dim() == 4 else last[:, prefix:]
    return features.float(), tokens.float()


def _may_have_tokens(backbone: Backbone) -> bool:
    if isinstance(backbone, Encoder) and backbone.library == "transformers":
        return True
    trunk: Any = backbone.trunk
    maps = getattr(trunk, "output_fmt", None)  # timm's: of networks that give maps; only transformers give NHWC
    return hasattr(trunk, "forward_features") and (hasattr(trunk, "num_prefix_tokens") or str(maps).endswith("NHWC"))
