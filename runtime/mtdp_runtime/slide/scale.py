"""How many micrometres a pixel covers: from the vendor's metadata, else from resolution tags, else unknown.

What the user says (--slide-mpp, a manifest) stands above both; it is never guessed from a magnification.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping
from typing import Any, Final

import openslide

LEAST_MPP: Final = 0.01
MOST_MPP: Final = 100.0
# No slide is scanned finer or coarser than this, and numbers ten times too small are a known error of converters: such
# a scale is not believed, and the user is asked to state it.
LEAST_USUAL_MPP: Final = 0.05
MOST_USUAL_MPP: Final = 20.0
MAX_ANISOTROPY: Final = 0.01
# 10 µm per pixel is 2540 dpi: no slide scanner is so coarse, and printers' 72, 96, 150, 300, 600, 1200, 2400 dpi are.
_MOST_MPP_OF_TAGS: Final = 10.0
_UM_PER_UNIT: Final = {"centimeter": 1e4, "inch": 25_400.0}
_UM_PER_INCH: Final = 25_400.0
_TIFF_UNITS: Final = {2: "inch", 3: "centimeter"}  # TIFF 6.0, ResolutionUnit
# OME-XML 2016-06, Pixels/@PhysicalSizeX: a length whose unit is µm unless PhysicalSizeXUnit says otherwise. ImageJ
# writes words, and others what they like; what is no length ("pixel", "reference frame") is left out here.
_UM_OF: Final = {
    **dict.fromkeys(("µm", "um", "micron", "microns", "micrometer", "micrometers", "micrometre", "micrometres"), 1.0),
    **dict.fromkeys(("nm", "nanometer", "nanometers"), 1e-3),
    **dict.fromkeys(("mm", "millimeter", "millimeters"), 1e3),
    **dict.fromkeys(("cm", "centimeter", "centimeters"), 1e4),
    **dict.fromkeys(("m", "meter", "meters"), 1e6),
    **dict.fromkeys(("in", "inch", "inches", '"'), _UM_PER_INCH),
    "km": 1e9,
    "dm": 1e5,
    "pm": 1e-6,
    "fm": 1e-9,
    "å": 1e-4,
    "angstrom": 1e-4,
    "thou": _UM_PER_INCH / 1000,
    "li": _UM_PER_INCH / 12,
    "pt": _UM_PER_INCH / 72,
    "ft": 12 * _UM_PER_INCH,
    "yd": 36 * _UM_PER_INCH,
}
_PIXELS: Final = re.compile(r"<(?:\w{1,32}:)?Pixels\s[^<>]{0,4096}>")
# "46920x33014 [0,100 46000x32914] (256x256) -> 1024x732 JPEG/RGB": the scan, the part of it, a tile, what it became
_APERIO_LINE: Final = re.compile(
    r"(\d{1,9}x\d{1,9})\s*\[\d{1,9}[, ]\d{1,9}[, ](\d{1,9}x\d{1,9})\]"
    r"(?:\s*\(\d{1,9}x\d{1,9}\))?(?:\s*->\s*(\d{1,9}x\d{1,9}))?"
)
_SAME_SHAPE: Final = 0.01  # rounding of the sides of a picture that is not tiny
_RESIZED: Final = 1.2
_NUMBER_AND_UNIT: Final = re.compile(
    r"\s*([-+]?[0-9.,]{1,32}(?:[eE][-+]?[0-9]{1,3})?)\s*([^\s;\d/]*)(?:/\s?(?:px|pixels?))?[\s;]*"
)

Scale = tuple[float | None, str]  # micrometres per pixel, None where unknown; and what said so, or why it is unknown


def is_scale(mpp: float) -> bool:
    """Say whether a number can be micrometres per pixel: no microscope gives 0.01, no slide scanner 100."""
    return LEAST_MPP <= mpp <= MOST_MPP


def um_of(unit: str) -> float | None:
    r"""Return how many micrometres a unit of length is, however it is written; None where it is no length.

    >>> um_of("&#181;m"), um_of(r"\u00B5m"), um_of("Micron"), um_of("in"), um_of("pixel")
    (1.0, 1.0, 1.0, 25400.0, None)
    """
    text = re.sub(r"\\\\?u00[bB]5|\\\\?u03[bB][cC]", "µ", html.unescape(html.unescape(unit))).strip()
    for other in ("\u03bc", "Âµ", "Î¼"):  # Greek letter mu; UTF-8 read as Latin-1
        text = text.replace(other, "µ")
    text = text.replace("\u212b", "å").replace("A\u030a", "å").replace("Ã\x85", "å")
    return _UM_OF.get(text.lower()) if text not in ("Mm", "Pm", "MM") else None  # mega- and peta- are no small lengths


def scale_of(properties: Mapping[str, str], vendor: str, size: tuple[int, int] | None = None) -> Scale:
    """Return a slide's scale from its properties as OpenSlide gives them; `size` is level 0's.

    Where the vendor's number cannot be, the resolution tags are asked.
    """
    said = None if vendor == "generic-tiff" else _of_vendor(properties, vendor)
    description = properties.get("tiff.ImageDescription", "")
    x, y = properties.get("tiff.XResolution", ""), properties.get("tiff.YResolution", "")
    tags = scale_of_tags(x, y, properties.get("tiff.ResolutionUnit", ""))
    if said is not None and said[0] is not None:
        return _of_this_size(said, _aperio_sizes(description) if vendor == "aperio" else [], size, tags)
    described = scale_of_tiff(description, x, y, properties.get("tiff.ResolutionUnit", ""), size)
    return described if said is None or described[0] is not None else said


def scale_of_tiff(description: str, x: str, y: str, unit: str, size: tuple[int, int] | None) -> Scale:
    """Return the scale of a TIFF of no vendor's: from OME-XML, ImageJ's words, or resolution tags as texts."""
    tags = scale_of_tags(x, y, unit)
    ome = ome_scale(description, size)
    if ome is not None:
        return _of_this_size(ome, _ome_sizes(description), size, tags)
    return imagej_scale(description, x, y) or tags


def _of_this_size(said: Scale, described: list[tuple[int, int]], size: tuple[int, int] | None, tags: Scale) -> Scale:
    """Return what a description says, unless it is of this picture before it was resized, as tools hand it on.

    A part that was cut out has the scale of the whole, and mostly another shape.
    """
    if said[0] is None or size is None or not described or size in described:
        return said
    for width, height in described:
        factors = width / size[0], height / size[1]
        factor = math.sqrt(factors[0] * factors[1])
        if abs(factors[0] / factors[1] - 1) < _SAME_SHAPE and max(factor, 1 / factor) > _RESIZED:
            if tags[0] is not None and abs(tags[0] / (said[0] * factor) - 1) < _SAME_SHAPE:
                return tags
            return None, (
                f"{said[1]} say {said[0]:.4g} µm/px of a picture of {width} x {height} px, "
                f"and this one has {size[0]} x {size[1]}: it was resized"
            )
    return said


def _aperio_sizes(description: str) -> list[tuple[int, int]]:
    """Return the sizes that Aperio's first line names: of the scan, of the part of it, and of what that became."""
    line = _APERIO_LINE.search(description)
    sizes = [] if line is None else [size.split("x") for size in line.groups() if size]
    return [(int(width), int(height)) for width, height in sizes]


def _ome_sizes(description: str) -> list[tuple[int, int]]:
    sides = [(_attribute(one, "SizeX"), _attribute(one, "SizeY")) for one in _PIXELS.findall(description)]
    return [(int(x), int(y)) for x, y in sides if x.isdecimal() and y.isdecimal()]


def _of_vendor(properties: Mapping[str, str], vendor: str) -> Scale | None:
    """Return what the vendor's metadata say; None where they say nothing."""
    texts = (properties.get(openslide.PROPERTY_NAME_MPP_X), properties.get(openslide.PROPERTY_NAME_MPP_Y))
    if texts[0] is not None and texts[1] is not None:
        try:
            mpp_x, mpp_y = float(texts[0]), float(texts[1])
        except ValueError:
            return None, f"the slide says {texts[0]!r} x {texts[1]!r}, which are no numbers"
        return checked(mpp_x, mpp_y, f"{vendor} metadata (openslide.mpp-x, -y)")
    # OpenSlide takes Aperio's number only where nothing follows it, and by one spelling of its name.
    written = [text for name, text in properties.items() if name.lower() == "aperio.mpp"] if vendor == "aperio" else []
    for text in written:
        found = _NUMBER_AND_UNIT.fullmatch(text)
        um = um_of(found[2] or "µm") if found else None
        if found is None or um is None:
            return None, f"the slide says MPP = {text!r}, which is no number"
        try:
            mpp = float(found[1].replace(",", ".")) * um
        except ValueError:
            return None, f"the slide says MPP = {text!r}, which is no number"
        return checked(mpp, mpp, "aperio metadata (MPP)")
    return None


def resolution_of(page: Any) -> tuple[str, str, str]:
    """Return a tifffile page's pixels per unit along x and y, and the unit, as OpenSlide words them."""
    texts = []
    for name in ("XResolution", "YResolution"):
        tag = page.tags.get(name)
        texts.append(str(tag.value[0] / tag.value[1]) if tag is not None and tag.value[1] else "")
    unit = page.tags.get("ResolutionUnit")
    return texts[0], texts[1], _TIFF_UNITS.get(int(unit.value) if unit is not None else 2, "")


def scale_of_tags(x: str, y: str, unit: str) -> Scale:
    """Return the scale that resolution tags state, as texts: pixels per centimetre or inch."""
    um = _UM_PER_UNIT.get(unit)
    if um is None or not x or not y:
        return None, "the slide does not say"
    try:
        mpp_x, mpp_y = um / float(x), um / float(y)
    except (ValueError, ZeroDivisionError):
        return None, f"the TIFF resolution tags say {x} x {y} pixels per {unit}, which cannot be"
    if min(mpp_x, mpp_y) > _MOST_MPP_OF_TAGS:
        return None, (
            f"the TIFF resolution tags say {25_400 / mpp_x:.4g} dpi ({mpp_x:.4g} µm/px), "
            "which is for a printer or a screen"
        )
    return checked(mpp_x, mpp_y, "TIFF resolution tags")


def imagej_scale(description: str, x: str, y: str) -> Scale | None:
    """Return the scale of a TIFF that ImageJ wrote: pixels per the unit that its description names.

    None where it names none, or where that cannot be the unit that the resolution was meant in.
    """
    unit = re.search(r"^unit=(.{1,40}?)\s*$", description, re.MULTILINE) if description.startswith("ImageJ=") else None
    um = um_of(unit[1]) if unit is not None else None
    if um is None:
        return None
    try:
        mpp_x, mpp_y = um / float(x), um / float(y)
    except (ValueError, ZeroDivisionError):
        return None
    if not (is_scale(mpp_x) and is_scale(mpp_y)):
        return None
    return checked(mpp_x, mpp_y, "ImageJ description and TIFF resolution tags")


def ome_scale(description: str, size: tuple[int, int] | None = None) -> Scale | None:
    """Return the scale that an OME-XML states; None where there is no OME-XML, or none in it.

    Args:
        size: width and height of level 0. A file may describe several images, the macro first; where one is of this
            size, its scale is taken.
    """
    found = _PIXELS.findall(description) if "<OME" in description or ":OME" in description else []
    of_size = [one for one in found if size and (_attribute(one, "SizeX"), _attribute(one, "SizeY")) == _texts(size)]
    if not of_size and len(found) > 1 and size:
        return None  # several images, and none of them is this one
    pixels = (of_size or found or [""])[0]
    if not pixels or len({_sizes_of(one) for one in of_size}) > 1:
        return None
    sides = []
    for axis in "XY":
        text = _attribute(pixels, f"PhysicalSize{axis}")
        um = um_of(_attribute(pixels, f"PhysicalSize{axis}Unit") or "µm")
        if not text or um is None:
            return None
        try:
            sides.append(float(text.replace(",", ".")) * um)
        except ValueError:
            return None, f"the OME-XML says {text!r}, which is no number"
    return checked(sides[0], sides[1], "OME-XML (PhysicalSizeX, -Y)")


def _texts(size: tuple[int, int]) -> tuple[str, str]:
    return str(size[0]), str(size[1])


def _sizes_of(pixels: str) -> tuple[str, ...]:
    names = ("PhysicalSizeX", "PhysicalSizeY", "PhysicalSizeXUnit", "PhysicalSizeYUnit")
    return tuple(_attribute(pixels, name) for name in names)


def _attribute(element: str, name: str) -> str:
    """Return an attribute of an XML element's start tag; nothing where it has none of that name."""
    found = re.search(rf"\s{name}\s*=\s*(?:\"([^\"]*)\"|'([^']*)')", element)
    return html.unescape(found[1] or found[2] or "").strip() if found else ""


def checked(mpp_x: float, mpp_y: float, source: str) -> Scale:
    """Return one scale for both directions; None where they differ by more than MAX_ANISOTROPY, or cannot be."""
    if not (is_scale(mpp_x) and is_scale(mpp_y)):
        return None, f"{source} say {mpp_x:g} x {mpp_y:g} µm/px, which cannot be"
    if abs(mpp_x / mpp_y - 1) > MAX_ANISOTROPY:
        return None, f"{source} say {mpp_x:g} x {mpp_y:g} µm/px: the pixels are not square"
    mpp = math.sqrt(mpp_x * mpp_y)
    if not LEAST_USUAL_MPP <= mpp <= MOST_USUAL_MPP:
        return None, (
            f"{source} say {mpp:.4g} µm/px, and scanners give {LEAST_USUAL_MPP:g} to {MOST_USUAL_MPP:g}: "
            "most likely an error of the file"
        )
    return mpp, source
