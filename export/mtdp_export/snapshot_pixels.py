"""What a folder of Hugging Face says of pixels: the side, the resize before it, mean, std and interpolation.

What is said there and would not be computed so is refused, unless the user states it: pixels that are not divided by
255, numbers for another scale, a resize that Pillow calls otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mtdp.preprocess import INTERPOLATIONS, Preprocessing
from mtdp_export.errors import ExportError, ExportUsageError
from mtdp_export.pixels import Stated, Triple

_PIL: Final = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers
_SIDES: Final = ("height", "width", "shortest_edge", "longest_edge")
_TIMM_CROP: Final = 0.875  # timm's own where its configuration says none
_PER_GREY_LEVEL: Final = 1 / 255
_AS_ITS_CARD: Final = "add --mean and --std, as the encoder's card states them"
_BY_HAND: Final = "say it by --tile-px, --resize and --crop, as the encoder's card states it"


@dataclass(frozen=True, slots=True)
class FolderPixels:
    """What a folder and the user say."""

    preprocessing: Preprocessing
    resize_px: int  # before the centre is cut out


def pixels_of_timm(
    folder: Path, config: Mapping[str, Any], arguments: Mapping[str, Any], stated: Stated
) -> FolderPixels:
    """Read timm's `pretrained_cfg`, or a config.json that is one.

    Raises:
        ExportUsageError: it says too little, or what is not computed here.
        ExportError: it is damaged.
    """
    said: Any = config.get("pretrained_cfg") or config
    if not isinstance(said, Mapping):
        raise ExportError(f"{folder}: pretrained_cfg is no object but {said!r}", "copy the folder again")
    mean, std = _numbers(folder, said.get("mean"), said.get("std"), stated)
    own = arguments.get("img_size") or 224
    size = said.get("input_size") or (3, *(own if isinstance(own, list) else (own, own)))
    if not isinstance(size, list | tuple) or len(size) != 3 or size[0] != 3 or size[1] != size[2]:
        raise ExportUsageError(f"{folder}: its input is {size!r}: not square, or not of R, G and B", "use --onnx")
    side = _side(folder, size[1])
    part = said.get("crop_pct") or (_TIMM_CROP if "mean" in said else 1.0)
    if not isinstance(part, int | float) or not 0 < part <= 1:
        if stated.resize_px is None and stated.crop_px is None:
            raise ExportUsageError(f"{folder}: crop_pct {part!r} is not computed here", _BY_HAND)
        part = 1.0
    how = _interpolation(folder, said.get("interpolation") or "bicubic", stated)
    return FolderPixels(Preprocessing(side, mean, std, how), math.floor(side / part))


def pixels_of_transformers(
    folder: Path, said: Mapping[str, Any] | None, own_px: int, bilinear: bool, stated: Stated
) -> FolderPixels:
    """Read what preprocessor_config.json says.

    Args:
        folder: for messages.
        said: its content; None where there is none.
        own_px: the side that the model's configuration states.
        bilinear: whether that is how such a model's own processor resizes where the file does not say it; else bicubic.
        stated: what the user says goes before it.

    Raises:
        ExportUsageError: it says too little, or what is not computed here.
    """
    if said is None:
        mean, std = _numbers(folder, None, None, stated)
        return FolderPixels(Preprocessing(own_px, mean, std, stated.interpolation or "bilinear"), own_px)
    mean, std = _numbers(folder, *_normalised(folder, said, stated), stated)
    size, crop = None, None
    if stated.resize_px is None and stated.crop_px is None:
        resizes, cuts = said.get("do_resize", True), said.get("do_center_crop", said.get("crop_size") is not None)
        size = _square(folder, said, "size") if resizes else None
        crop = _square(folder, said, "crop_size") if cuts else None
        if size is not None and crop is not None and crop > size:
            raise ExportUsageError(f"{folder}: it resizes to {size} px and cuts out {crop} px", _BY_HAND)
    side = crop or size or own_px
    named = str(said.get("image_processor_type", said.get("feature_extractor_type", "")))
    number = said.get("resample")
    if number is None:
        number = 2 if (named.startswith("ViT") if named else bilinear) else 3
    how = _interpolation(folder, _PIL.get(number, number) if isinstance(number, int) else number, stated)
    return FolderPixels(Preprocessing(side, mean, std, how), size or side)


def _normalised(folder: Path, said: Mapping[str, Any], stated: Stated) -> tuple[Any, Any]:
    """The mean and std that a preprocessor applies to pixels of 0..1."""
    if stated.mean is not None and stated.std is not None:
        return None, None
    divides, factor = said.get("do_rescale", True), said.get("rescale_factor", _PER_GREY_LEVEL)
    if not (divides and isinstance(factor, float) and math.isclose(factor, _PER_GREY_LEVEL, rel_tol=1e-3)):
        what = f"rescale_factor {factor}" if divides else "do_rescale false"
        raise ExportUsageError(
            f"{folder}: its preprocessor does not divide pixels by 255 ({what}): on which scale its mean and std are "
            "is not known",
            "add --mean and --std, on the scale 0..1",
        )
    if not said.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return said.get("image_mean"), said.get("image_std")


def _numbers(folder: Path, mean: Any, std: Any, stated: Stated) -> tuple[Triple, Triple]:
    """Mean and std: as the user states them, else as the folder does."""
    if (mean is None and stated.mean is None) or (std is None and stated.std is None):
        raise ExportUsageError(f"{folder}: it does not say how its network's pixels were normalised", _AS_ITS_CARD)
    found = [given or _rgb(own, folder) for given, own in ((stated.mean, mean), (stated.std, std))]
    shown = " and std ".join(" ".join(f"{value:g}" for value in values) for values in found)
    values = [value for triple in found for value in triple]
    if not all(math.isfinite(value) for value in values) or min(found[1]) <= 0:
        raise ExportUsageError(f"{folder}: it states mean {shown}, which are of nothing", _AS_ITS_CARD)
    if min(values) < 0 or max(values) > 1:
        m, s = (" ".join(f"{value / 255:.6g}" for value in triple) for triple in found)
        hint = f"if they are for pixels of 0..255: --mean {m} --std {s}" if max(values) > 1 else _AS_ITS_CARD
        raise ExportUsageError(f"{folder}: it states mean {shown}, and pixels are 0..1", hint)
    return found[0], found[1]


def _interpolation(folder: Path, said: Any, stated: Stated) -> str:
    if stated.interpolation is not None:
        return stated.interpolation
    if said not in INTERPOLATIONS:
        raise ExportUsageError(
            f"{folder}: it says that images are resized by {said!r}, which is not done here",
            f"add --interpolation, one of {', '.join(INTERPOLATIONS)}; tiles of the network's own side are not resized",
        )
    return str(said)


def _square(folder: Path, said: Mapping[str, Any], name: str) -> int:
    """A side: a number, {shortest_edge}, or {height, width}; tiles are squares."""
    value = said.get(name)
    sides = [value]
    if isinstance(value, Mapping):
        sides = [side for side in map(value.get, _SIDES) if side is not None]
    elif isinstance(value, list):
        sides = value
    if not sides or value is None:
        raise ExportUsageError(f"{folder}: its preprocessor_config.json names no {name}", _BY_HAND)
    if any(side != sides[0] for side in sides):
        raise ExportUsageError(f"{folder}: {name} {value!r} is no square", _BY_HAND)
    return _side(folder, sides[0])


def _side(folder: Path, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ExportError(f"{folder}: {value!r} is no side in pixels", "copy the folder again")
    return value


def _rgb(values: Any, folder: Path) -> Triple:
    try:
        red, green, blue = (float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise ExportError(f"{folder}: mean and std are not three numbers: {values!r}", "copy it again") from error
    return (red, green, blue)
