"""What an image becomes before the backbone sees it: the one code path of training and of the exported graph.

Images travel as uint8; everything numerical happens in `Normalise`, inside the network, so that what was trained and
what is deployed cannot drift apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from mtdp.errors import UsageError

# The statistics of ImageNet, which every published weight of this family expects (paper, training details).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LARGEST_PX = 16_384  # of the input's side: 3 GB as float32
INTERPOLATIONS = ("bilinear", "bicubic", "lanczos")


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """The input contract of a network.

    Side of the square input, per-channel RGB statistics on the scale 0..1, and the interpolation by which images of
    another size come to that side.
    """

    image_px: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.image_px > LARGEST_PX:
            raise UsageError(f"image_px {self.image_px} is too large", f"{LARGEST_PX} at most")
        if self.image_px < 32:  # five halvings: below this the last feature map is empty
            raise UsageError(f"image_px {self.image_px} is too small", "use at least 32; the paper's networks use 224")
        finite = all(math.isfinite(value) for value in (*self.mean, *self.std))
        if len(self.mean) != 3 or len(self.std) != 3 or not finite or min(self.std) <= 0:
            raise UsageError(f"mean {self.mean} and std {self.std} must have 3 finite values, std above 0")
        if self.interpolation not in INTERPOLATIONS:
            raise UsageError(f"interpolation {self.interpolation!r} is unknown", f"one of {', '.join(INTERPOLATIONS)}")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Preprocessing:
        mean: Any = tuple(float(value) for value in data["mean"])
        std: Any = tuple(float(value) for value in data["std"])
        # Files from before other interpolations do not state theirs.
        return Preprocessing(int(data["image_px"]), mean, std, str(data.get("interpolation", "bilinear")))


class Normalise(nn.Module):
    """uint8[N, P, P, 3] -> float32[N, 3, P, P], equal to (x / 255 - mean) / std.

    The cast comes first because inference engines refuse any other operation on a uint8 input. The result of the
    permutation keeps the bytes in place, so it is channels-last without a copy. Scale and shift are folded to one
    multiply-add. They are derived, not learnt, so they are not part of a state dict.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocessing = preprocessing
        mean = torch.tensor(preprocessing.mean, dtype=torch.float64).view(1, 3, 1, 1)
        std = torch.tensor(preprocessing.std, dtype=torch.float64).view(1, 3, 1, 1)
        self.register_buffer("scale", (1.0 / (255.0 * std)).float(), persistent=False)
        self.register_buffer("shift", (-mean / std).float(), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.to(torch.float32).permute(0, 3, 1, 2)
        return pixels * self.scale + self.shift
