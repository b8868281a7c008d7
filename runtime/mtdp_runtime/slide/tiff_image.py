"""The levels of a TIFF that OpenSlide does not read, or not rightly: found by tifffile, decoded piece by piece."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import tifffile

from mtdp_runtime.slide.channels import GREY, NO_NAMES, channels_of_ome, check_bright, named_rgb
from mtdp_runtime.slide.pixel_kind import kind_of
from mtdp_runtime.slide.probe import UnknownKind
from mtdp_runtime.slide.scale import Scale
from mtdp_runtime.slide.tiff_check import check_offsets
from mtdp_runtime.slide.tiff_pieces import Pieces, pieces_of, samples_of
from mtdp_runtime.slide.tiff_series import scale_in, the_slide


def levels_of_tiff(path: Path, file: int) -> tuple[tuple[Pieces, ...], Scale, str]:
    """Return a TIFF's levels, the finest first, its scale, and "ome-tiff" or "tiff".

    Args:
        file: the descriptor that the pieces are read from.

    Raises:
        UnknownKind: its pixels are of a kind that is not read here.
        SlideUnreadable: its pixels are not square, or it is damaged.
        Exception: tifffile's; a damaged structure finds many ways.
    """
    with tifffile.TiffFile(path) as tiff:
        description = tiff.pages[0].description or ""
        series = the_slide(tiff)
        if tiff.is_ome and "S" not in series.axes and len(series.levels[0].pages) == 1 and series.dtype == "uint8":
            raise UnknownKind("its pixels are 1 x uint8, not 8-bit RGB (one channel, as of fluorescence)")
        named = _check_planes(series, description if tiff.is_ome else "")
        levels = []
        for level in series.levels:
            pages = []
            for page in level.pages:
                _check_is_here(page, tiff)
                pages.append(page.aspage())
                check_offsets(path, pages[-1].dataoffsets, pages[-1].databytecounts)
            levels.append(pieces_of(pages, file))
        scale = scale_in(tiff, series.levels[0].pages[0].aspage())
        if not named:
            check_bright(samples_of(levels[-1]), NO_NAMES)
        elif len(series.levels[0].pages) == 1 and kind_of(series.levels[0].pages[0].aspage()).is_grey:
            check_bright(samples_of(levels[-1]), GREY)
        return tuple(levels), scale, "ome-tiff" if tiff.is_ome else "tiff"


def _check_planes(series: Any, xml: str) -> bool:
    """Say whether it is said that the planes of an image make RGB; also where they need not, as they lie together.

    Raises:
        UnknownKind: they do not.
    """
    counts = {len(level.pages) for level in series.levels}
    # ImageJ describes one directory and writes all planes behind each other.
    planes = math.prod(series.shape) // max(1, math.prod(series.pages[0].shape)) if series.pages[0] is not None else 1
    if counts == {1} and planes <= 1:
        return True
    channels = series.sizes.get("channel", 1)
    if not xml or counts != {3} or channels != 3 or "S" in series.axes:
        raise UnknownKind(f"an image of {max(*counts, planes)} planes (channels, depths or times), not RGB")
    return named_rgb(channels_of_ome(xml) or ())


def _check_is_here(page: Any, tiff: Any) -> None:
    """Raise UnknownKind where a page of a multi-file OME-TIFF lies in another file than the one that is open."""
    if page is None:
        raise UnknownKind("its pixels lie in another file, which is not there")
    if page.parent.filehandle.path != tiff.filehandle.path:
        raise UnknownKind(f"its pixels lie in another file: name that one, {page.parent.filename}")
