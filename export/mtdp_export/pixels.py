"""From the tile that is read to the network's input, inside the graph: resized, cut to its centre, normalised.

The resize is the one of Pillow and torchvision, antialiased: a weighted mean over the pixels that an output pixel
covers, columns first and then rows, each rounded to whole grey levels. As two products with constant matrices it is the
same in every engine; ONNX's own `Resize` is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mtdp.preprocess import INTERPOLATIONS, Normalise, Preprocessing
from mtdp_export.errors import ExportUsageError

Triple = tuple[float, float, float]
_MOST_PX: Final = 16_384
_ONE: Final = 2.0**22


@dataclass(frozen=True, slots=True)
class Stated:
    """What the user says of the pixels; None: as the source has it."""

    mean: Triple | None = None
    std: Triple | None = None
    interpolation: str | None = None
    tile_px: int | None = None
    resize_px: int | None = None
    crop_px: int | None = None

    def check(self, input_range: int = 1) -> None:
        """Find numbers that cannot be right.

        Args:
            input_range: of the pixels that mean and std are for: 0..1, or 0..255.

        Raises:
            ExportUsageError: naming the option.
        """
        for option, side in (("tile-px", self.tile_px), ("resize", self.resize_px), ("crop", self.crop_px)):
            if side is not None and not 1 <= side <= _MOST_PX:
                what = "no side of a tile" if option == "tile-px" else "no side of an image"
                raise ExportUsageError(f"--{option} {side}: {what}", "pixels, for example 224")
        if self.interpolation not in (None, *INTERPOLATIONS):
            raise ExportUsageError(
                f"--interpolation {self.interpolation}: unknown", f"one of {', '.join(INTERPOLATIONS)}"
            )
        for option, values in (("mean", self.mean), ("std", self.std)):
            if values is None:
                continue
            shown = f"--{option} {' '.join(f'{value:g}' for value in values)}"
            if not all(math.isfinite(value) for value in values) or (option == "std" and min(values) <= 0):
                raise ExportUsageError(f"{shown}: not the {option} of anything", "three numbers, those of std above 0")
            if min(values) < 0 or max(values) > input_range:
                raise ExportUsageError(
                    f"{shown}: pixels are 0..{input_range}, and so is their {option}",
                    "divide by 255, or with --onnx add --input-range 255" if input_range == 1 else "check the numbers",
                )
            if input_range == 255 and (0 < max(values) <= 1 if option == "mean" else max(values) < 1):
                raise ExportUsageError(
                    f"{shown}: with --input-range 255 the {option} is on the scale 0..255", "leave --input-range out"
                )


@dataclass(frozen=True, slots=True)
class Pixels:
    """How a tile of `tile_px` becomes the network's input, of the side `preprocessing.image_px`."""

    preprocessing: Preprocessing
    tile_px: int
    resize_px: int
    numbers_from: str  # who says mean, std and interpolation

    @property
    def margin_px(self) -> int:
        """From the edge of the resized tile to the centre that is cut out, rounded as torchvision's CenterCrop does."""
        return round((self.resize_px - self.preprocessing.image_px) / 2.0)


def as_it_is(preprocessing: Preprocessing, numbers_from: str = "") -> Pixels:
    """Return the pixels of a network that takes the tile as it is read."""
    return Pixels(preprocessing, preprocessing.image_px, preprocessing.image_px, numbers_from)


def arranged(stated: Stated, native: Preprocessing, numbers_from: str) -> Pixels:
    """Return what the user states, and for the rest what the source has.

    Args:
        stated: it is checked here.
        native: of the source.
        numbers_from: who says the numbers in it.

    Raises:
        ExportUsageError: what is stated cannot be.
    """
    stated.check()
    tile_px = stated.tile_px or (native.image_px if stated.resize_px is None else stated.resize_px)
    resize_px = stated.resize_px or tile_px
    image_px = stated.crop_px or resize_px
    if image_px > resize_px:
        raise ExportUsageError(
            f"--crop {image_px}: the tile has {resize_px} px by then", "cut out no more than there is, or add --resize"
        )
    preprocessing = Preprocessing(
        image_px,
        stated.mean or native.mean,
        stated.std or native.std,
        stated.interpolation or native.interpolation,
    )
    named = [name for name in ("mean", "std", "interpolation") if getattr(stated, name) is not None]
    said = f"{_list(named)} stated by who exported the bundle" if named else ""
    rest = [name for name in ("mean", "std", "interpolation") if name not in named]
    if rest:
        said += f"{'; ' if said else ''}{f'{_list(rest)}: ' if named else ''}{numbers_from}"
    return Pixels(preprocessing, tile_px, resize_px, said)


def _list(names: list[str]) -> str:
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]


def resize_matrix(from_px: int, to_px: int, interpolation: str) -> NDArray[np.float64]:
    """Return float64[to_px, from_px]: the weights by which Pillow resizes a row, each row summing to 1.

    Shrinking widens the filter by the scale, which is what "antialias" means; enlarging does not narrow it.
    """
    kernel, support = _KERNELS[interpolation]
    scale = from_px / to_px
    widened = max(scale, 1.0)
    reach = support * widened
    centres = (np.arange(to_px) + 0.5) * scale
    weights = np.zeros((to_px, from_px))
    for row, centre in enumerate(centres):
        # Pillow cuts the filter to whole pixels like this.
        first = max(int(centre - reach + 0.5), 0)
        last = min(int(centre + reach + 0.5), from_px)
        at = (np.arange(first, last) - centre + 0.5) / widened
        values = np.array([kernel(float(x)) for x in at])
        # And it takes whole numbers of 22 bits, which decide where a value lies halfway between two grey levels.
        weights[row, first:last] = np.round(values / values.sum() * _ONE) / _ONE
    return weights


def _triangle(x: float) -> float:
    return max(0.0, 1.0 - abs(x))


def _cubic(x: float) -> float:
    a, x = -0.5, abs(x)
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    return (((x - 5.0) * x + 8.0) * x - 4.0) * a if x < 2.0 else 0.0


def _lanczos(x: float) -> float:
    return float(np.sinc(x) * np.sinc(x / 3.0)) if -3.0 <= x < 3.0 else 0.0


_KERNELS: Final[dict[str, tuple[Callable[[float], float], float]]] = {
    "bilinear": (_triangle, 1.0),
    "bicubic": (_cubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}


class Prepared(nn.Module):
    """uint8[N, T, T, 3] -> float32[N, 3, P, P]: the tile as the network takes it.

    Without a resize and a cut it is the code path of training, `mtdp.preprocess.Normalise`.
    """

    columns: torch.Tensor
    rows: torch.Tensor

    def __init__(self, pixels: Pixels) -> None:
        super().__init__()
        self.pixels = pixels
        self.normalise = Normalise(pixels.preprocessing)
        self.resizes = pixels.resize_px != pixels.tile_px
        if self.resizes:
            weights = resize_matrix(pixels.tile_px, pixels.resize_px, pixels.preprocessing.interpolation)
            side = slice(pixels.margin_px, pixels.margin_px + pixels.preprocessing.image_px)
            rows = torch.from_numpy(weights[side]).float()  # what is cut off need not be computed
            self.register_buffer("rows", rows.contiguous(), persistent=False)
            self.register_buffer("columns", rows.T.contiguous(), persistent=False)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        # The cast comes first because inference engines refuse any other operation on a uint8 input.
        if self.pixels.preprocessing.image_px == self.pixels.tile_px and not self.resizes:
            normalised: torch.Tensor = self.normalise(tiles)
            return normalised
        planes = tiles.to(torch.float32).permute(0, 3, 1, 2)
        if self.resizes:
            planes = _grey_levels(torch.matmul(planes, self.columns))
            planes = _grey_levels(torch.matmul(self.rows, planes))
        else:
            first, end = self.pixels.margin_px, self.pixels.margin_px + self.pixels.preprocessing.image_px
            planes = planes[:, :, first:end, first:end]
        return planes * self.normalise.scale + self.normalise.shift


def _grey_levels(values: torch.Tensor) -> torch.Tensor:
    """Round halves up, as Pillow does: its images are of whole grey levels after each pass."""
    return torch.clamp(torch.floor(values + 0.5), 0.0, 255.0)
