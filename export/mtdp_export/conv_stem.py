"""The stem of CTransPath: convolutions where a Swin transformer of timm cuts patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class ConvStem(nn.Module):
    """float32[N, 3, H, W] -> float32[N, H/4, W/4, D], with the names of the published file (`proj.0` ... `proj.6`).

    Two convolutions of stride 2, each with batch norm and ReLU, then one of 1 x 1 (Wang et al. 2022, and the code
    published with it). timm hands over what its own stem takes; an input of another side is not checked.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        norm_layer: Callable[..., nn.Module] | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        if patch_size != 4 or embed_dim % 8:
            raise ValueError("the stem of CTransPath has patches of 4 px and a multiple of 8 channels")
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size = (height, width)
        self.patch_size = (4, 4)
        self.grid_size = (height // 4, width // 4)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        layers: list[nn.Module] = []
        channels = in_chans
        for wider in (embed_dim // 8, embed_dim // 4):
            layers += [
                nn.Conv2d(channels, wider, kernel_size=3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(wider),
                nn.ReLU(inplace=True),
            ]
            channels = wider
        layers.append(nn.Conv2d(channels, embed_dim, kernel_size=1))
        self.proj = nn.Sequential(*layers)
        self.norm = norm_layer(embed_dim) if norm_layer is not None else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return normed
