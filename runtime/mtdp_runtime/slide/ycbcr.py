"""Luminance and colour differences that lie in a TIFF as they are, not within a JPEG: unpacked and converted to RGB.

TIFF 6.0, section 21: a data unit holds the Y of a block of pixels, then one Cb and one Cr for all of them;
YCbCrCoefficients and ReferenceBlackWhite say what the numbers mean. As libtiff does, the colour differences are
repeated over the block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.slide.probe import UnknownKind

_LUMA: Final = (0.299, 0.587, 0.114)  # the default coefficients, of CCIR 601-1
_REFERENCE: Final = (0.0, 255.0, 128.0, 255.0, 128.0, 255.0)  # the default of YCbCr, as everybody reads it
_FACTORS: Final = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class YCbCr:
    """How a directory's YCbCr becomes RGB."""

    across: int  # pixels that share a colour difference
    down: int
    luma: tuple[float, float, float]  # the weights of red, green and blue in Y
    reference: tuple[float, ...]  # black and white of Y, Cb and Cr

    @property
    def subsampled(self) -> bool:
        """Say whether pixels share colour differences; where they do not, they lie as any three samples do."""
        return (self.across, self.down) != (1, 1)

    def packed_bytes(self, rows: int, columns: int) -> int:
        """Return what so many pixels take."""
        return -(-rows // self.down) * -(-columns // self.across) * (self.across * self.down + 2)

    def unpack(self, packed: NDArray[np.uint8], rows: int, columns: int) -> NDArray[np.uint8]:
        """Return uint8[rows, columns, 3], Y, Cb and Cr of every pixel."""
        down, across = self.down, self.across
        units = packed[: self.packed_bytes(rows, columns)].reshape(-(-rows // down), -(-columns // across), -1)
        luma = units[..., :-2].reshape(*units.shape[:2], down, across).transpose(0, 2, 1, 3)
        out = np.empty((units.shape[0] * down, units.shape[1] * across, 3), np.uint8)
        out[..., 0] = luma.reshape(out.shape[:2])
        out[..., 1:] = units[..., -2:].repeat(down, axis=0).repeat(across, axis=1)
        return out[:rows, :columns]

    def to_rgb(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return uint8[H, W, 3] RGB of Y, Cb and Cr."""
        black, white = (np.array(self.reference[i::2], np.float32) for i in (0, 1))
        y, cb, cr = np.moveaxis((pixels - black) * (np.array((255, 127, 127), np.float32) / (white - black)), -1, 0)
        of_red, of_green, of_blue = self.luma
        red, blue = y + cr * (2 - 2 * of_red), y + cb * (2 - 2 * of_blue)
        green = (y - of_blue * blue - of_red * red) / of_green
        return np.asarray(np.rint(np.clip(np.stack([red, green, blue], axis=-1), 0, 255)), np.uint8)


def ycbcr_of(page: Any) -> YCbCr:
    """Return what a tifffile page says of its YCbCr.

    Raises:
        UnknownKind: what it says cannot be.
    """
    factors = tuple(int(value) for value in page.subsampling or (2, 2))  # the TIFF's default
    luma, reference = _ratios(page, "YCbCrCoefficients") or _LUMA, _ratios(page, "ReferenceBlackWhite") or _REFERENCE
    sane = len(luma) == 3 and min(luma) > 0 and abs(sum(luma) - 1) < 0.01
    sane = sane and len(reference) == 6 and all(reference[i] < reference[i + 1] for i in (0, 2, 4))
    if len(factors) != 2 or not set(factors) <= set(_FACTORS) or not sane:
        raise UnknownKind(f"YCbCr with subsampling {factors}, coefficients {luma} and black and white {reference}")
    return YCbCr(factors[0], factors[1], (luma[0], luma[1], luma[2]), reference)


def _ratios(page: Any, name: str) -> tuple[float, ...]:
    """Return a tag's rational numbers, which tifffile gives as numerators and denominators; () where there is none."""
    tag = page.tags.get(name)
    if tag is None:
        return ()
    numbers = [float(number) for number in tag.value]
    if int(tag.dtype) not in (5, 10):  # RATIONAL, SRATIONAL; some writers keep integers or floats
        return tuple(numbers)
    return tuple(up / down if down else 0.0 for up, down in zip(numbers[0::2], numbers[1::2], strict=True))
