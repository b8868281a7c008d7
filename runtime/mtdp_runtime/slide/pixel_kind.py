"""The kind of a TIFF directory's pixels: 8-bit RGB in three samples, or what we know how to make of it.

One check for every reader, on what the directory says and whatever the file is called. What the colours of anything
else mean is not for us to guess. Tags: TIFF 6.0, and libtiff's description of its extensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import tifffile

from mtdp_runtime.slide.probe import UnknownKind

JPEG: Final = 7
JPEG_2000: Final = frozenset({33003, 33004, 33005, 34712})
OLD_JPEG: Final = 6
_PREMULTIPLIED, _ALPHA = 1, 2  # values of ExtraSamples
_SAMPLE_FORMATS: Final = {
    2: "signed integers",
    3: "floating-point numbers",
    5: "complex integers",
    6: "complex numbers",
}
_COLOURS: Final = {0: "inverted grey", 1: "grey", 2: "rgb", 3: "palette", 6: "ycbcr"}  # PhotometricInterpretation
_SAMPLES: Final = {"inverted grey": 1, "grey": 1, "rgb": 3, "palette": 1, "ycbcr": 3}


@dataclass(frozen=True, slots=True)
class PixelKind:
    """8-bit samples, and what they mean."""

    colours: str  # "rgb", "ycbcr", "grey", "inverted grey" or "palette"
    samples: int
    alpha: int  # the ExtraSamples value of a fourth sample; 0 where there is none
    planes: bool  # each sample lies in a plane of its own
    compression: int

    @property
    def premultiplied(self) -> bool:
        """Say whether the colours are multiplied with the fourth sample already."""
        return self.alpha == _PREMULTIPLIED

    @property
    def is_grey(self) -> bool:
        """Say whether it is one channel, from black to white or from white to black."""
        return self.colours in ("grey", "inverted grey")

    @property
    def openslide_errs(self) -> str:
        """Say why OpenSlide shows such pixels in wrong colours, or not; empty where it does not."""
        if self.planes:
            return "OpenSlide does not read colours in separate planes"
        if self.is_grey:
            return "OpenSlide takes any grey channel for a picture"
        if self.colours == "ycbcr" and self.compression != JPEG and self.compression not in JPEG_2000:
            return "OpenSlide does not convert YCbCr that is not JPEG"
        return ""


def kind_of(page: Any) -> PixelKind:
    """Return the kind of a tifffile page.

    Raises:
        UnknownKind: it is not known what the pixels mean, or how they are packed.
    """
    _check_orientation(page)
    samples, photometric = int(page.samplesperpixel), int(page.photometric)
    if page.tags.get("PhotometricInterpretation") is None:
        raise UnknownKind("it does not say what its samples mean (no PhotometricInterpretation)")
    _check_samples(page)
    colours = _COLOURS.get(photometric)
    if colours is None:
        raise UnknownKind(f"its colours are {_name(page.photometric)}, not RGB")
    if page.imagedepth != 1:
        raise UnknownKind(f"a volume of {page.imagedepth} slices, not a picture")
    if int(page.fillorder) != 1:
        raise UnknownKind("its bits are stored in reverse (FillOrder 2)")
    alpha = _fourth_sample(page) if samples == 4 and photometric in (2, 6) else 0
    if samples != _SAMPLES[colours] + (alpha > 0):
        of_grey = " (several channels, as of fluorescence)" if _SAMPLES[colours] == 1 else ""
        raise UnknownKind(f"its pixels are {samples} x uint8{of_grey}, not 8-bit RGB")
    compression = int(page.compression)
    if compression == OLD_JPEG:
        raise UnknownKind("old-style JPEG (TIFF compression 6), which no two readers decode alike")
    if colours == "ycbcr" and alpha:
        raise UnknownKind("YCbCr with a fourth channel, not RGB")
    return PixelKind(colours, samples, alpha, int(page.planarconfig) == 2 and samples > 1, compression)


def _check_orientation(page: Any) -> None:
    tag = page.tags.get("Orientation")
    if tag is not None and tag.value not in (0, 1):  # 0 is no value; those who write it mean nothing by it
        raise UnknownKind(f"the picture is to be turned or mirrored before it is seen (Orientation {tag.value})")


def _check_samples(page: Any) -> None:
    """Raise UnknownKind unless every sample is an unsigned integer of 8 bits."""
    samples = int(page.samplesperpixel)
    formats, bits = (_values(page, name) for name in ("SampleFormat", "BitsPerSample"))
    for value in formats:
        if value not in (1, 4):  # 4 is "void": unstated
            raise UnknownKind(f"its pixels are {_SAMPLE_FORMATS.get(value, f'of format {value}')}, not 8-bit RGB")
    odd = [value for value in bits or (1,) if value != 8]
    if odd:
        kind = f"uint{odd[0]}" if odd[0] in (16, 32, 64) else f"{odd[0]} bits"
        raise UnknownKind(f"its pixels are {samples} x {kind}, not 8-bit RGB")


def _values(page: Any, name: str) -> tuple[int, ...]:
    tag = page.tags.get(name)
    if tag is None:
        return ()
    return tuple(tag.value) if isinstance(tag.value, tuple) else (int(tag.value),)


def _fourth_sample(page: Any) -> int:
    """Return what the fourth sample is: alpha with which the colours are multiplied (1), or alpha alone (2).

    Anything else is data of somebody's own, which must neither hide the colours nor be thrown away unasked.
    """
    extra = tuple(int(value) for value in page.extrasamples)
    if extra not in ((_PREMULTIPLIED,), (_ALPHA,)):
        raise UnknownKind(f"it does not say what its fourth channel is (ExtraSamples {extra or 'missing'})")
    return extra[0]


def _name(value: Any) -> str:
    try:
        return str(tifffile.PHOTOMETRIC(int(value)).name)
    except ValueError:
        return f"of kind {int(value)}"
