"""How many micrometres a pixel covers: from the vendor's metadata, else from resolution tags, else unknown.

What the user says (--slide-mpp, a manifest) stands above both; it is never guessed from a magnification.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import openslide

from mtdp_runtime.errors import SlideUnreadable

LEAST_MPP: Final = 0.01
MOST_MPP: Final = 100.0
MAX_ANISOTROPY: Final = 0.01
# 20 µm a pixel is 1270 dpi: no slide scanner is so coarse, and printers' 72, 96, 150, 300, 600 and 1200 dpi all are.
_MOST_MPP_OF_TAGS: Final = 20.0
_UM_PER_UNIT: Final = {"centimeter": 1e4, "inch": 25_400.0}
# OME-XML 2016-06, Pixels/@PhysicalSizeX: a length whose unit is µm unless PhysicalSizeXUnit says otherwise
_OME_UNITS: Final = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}

Scale = tuple[float | None, str]  # micrometres a pixel, None where unknown; and what said so, or why it is unknown


def is_scale(mpp: float) -> bool:
    """Say whether a number can be micrometres a pixel: no microscope gives 0.01, no slide scanner 100."""
    return LEAST_MPP <= mpp <= MOST_MPP


def scale_of(path: Path, properties: Mapping[str, str], vendor: str) -> Scale:
    """Return a slide's scale from its properties as OpenSlide gives them.

    Raises:
        SlideUnreadable: the pixels are not square.
    """
    texts = (properties.get(openslide.PROPERTY_NAME_MPP_X), properties.get(openslide.PROPERTY_NAME_MPP_Y))
    if vendor != "generic-tiff" and texts[0] is not None and texts[1] is not None:
        try:
            mpp_x, mpp_y = float(texts[0]), float(texts[1])
        except ValueError:
            return None, f"the slide says {texts[0]!r} x {texts[1]!r}, which are no numbers"
        return checked(path, mpp_x, mpp_y, f"{vendor} metadata (openslide.mpp-x, -y)")
    ome = ome_scale(path, properties.get("tiff.ImageDescription", ""))
    if ome is not None:
        return ome
    return scale_of_tags(
        path,
        properties.get("tiff.XResolution", ""),
        properties.get("tiff.YResolution", ""),
        properties.get("tiff.ResolutionUnit", ""),
    )


def scale_of_tags(path: Path, x: str, y: str, unit: str) -> Scale:
    """Return the scale that resolution tags state, as texts: pixels per centimetre or inch.

    Raises:
        SlideUnreadable: the pixels are not square.
    """
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
    return checked(path, mpp_x, mpp_y, "TIFF resolution tags")


def ome_scale(path: Path, description: str) -> Scale | None:
    """Return the scale that an OME-XML states; None where there is no OME-XML, or none in it.

    Raises:
        SlideUnreadable: the pixels are not square.
    """
    pixels = re.search(r"<(?:\w+:)?Pixels\b[^>]*>", description) if "<OME" in description else None
    if pixels is None:
        return None
    sides = []
    for axis in "XY":
        size = re.search(rf"\bPhysicalSize{axis}\s*=\s*[\"']([^\"']+)[\"']", pixels[0])
        unit = re.search(rf"\bPhysicalSize{axis}Unit\s*=\s*[\"']([^\"']+)[\"']", pixels[0])
        um = _OME_UNITS.get(unit[1] if unit else "µm")
        if size is None or um is None:
            return None
        try:
            sides.append(float(size[1]) * um)
        except ValueError:
            return None, f"the OME-XML says {size[1]!r}, which is no number"
    return checked(path, sides[0], sides[1], "OME-XML (PhysicalSizeX, -Y)")


def checked(path: Path, mpp_x: float, mpp_y: float, source: str) -> Scale:
    """Return one scale for both directions.

    Raises:
        SlideUnreadable: they differ by more than MAX_ANISOTROPY.
    """
    if not (is_scale(mpp_x) and is_scale(mpp_y)):
        return None, f"{source} say {mpp_x:g} x {mpp_y:g} µm/px, which cannot be"
    if abs(mpp_x / mpp_y - 1) > MAX_ANISOTROPY:
        raise SlideUnreadable(
            f"{path}: pixels are not square ({mpp_x} x {mpp_y} µm, {source})",
            hint="Give the scale with --slide-mpp if you know that this is an error of the file.",
        )
    return math.sqrt(mpp_x * mpp_y), source
