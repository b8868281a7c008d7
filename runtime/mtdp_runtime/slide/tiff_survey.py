"""A TIFF that OpenSlide opened, looked at before it is believed: are its pixels what OpenSlide takes them for?

OpenSlide makes something of nearly everything: a fourth channel is transparency, the first of several channels is the
picture, YCbCr is RGB, and a picture that is to be turned is shown with every tile turned in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import tifffile

from mtdp_runtime.slide import SlideInfo
from mtdp_runtime.slide.pixel_kind import PixelKind, kind_of
from mtdp_runtime.slide.probe import UnknownKind
from mtdp_runtime.slide.tiff_check import check_offsets

# Compressions that libtiff decodes strictly when OpenSlide calls it, and that hold no picture: none, LZW, Deflate,
# PackBits, Zstandard.
_STRICT_IN_OPENSLIDE: Final = frozenset({1, 5, 8, 32946, 32773, 50000})
_NONE: Final = 1  # Compression
_REDUCED: Final = 1  # NewSubfileType


@dataclass(frozen=True, slots=True)
class Survey:
    """What a TIFF's directories say."""

    openslide_errs: str  # why OpenSlide does not give the right pixels, or not all levels; empty where it does
    strict_in_openslide: bool  # OpenSlide tells damage in every level


def survey(info: SlideInfo) -> Survey:
    """Look at the directories of an Aperio SVS, or of a TIFF of no vendor's, that OpenSlide takes for levels.

    Raises:
        UnknownKind: the pixels of one are of a kind that is not read.
        SlideUnreadable: it names places that no file has.
        Exception: tifffile's, where it stumbles over the structure.
    """
    with tifffile.TiffFile(info.path) as tiff:
        if tiff.is_ome and info.vendor == "generic-tiff":
            return Survey("OpenSlide does not know an OME-TIFF's levels and channels", False)
        sizes = {(level.width, level.height) for level in info.levels}
        tiled = [page.aspage() for page in tiff.pages if page.is_tiled]
        pages = [page for page in tiled if (page.imagewidth, page.imagelength) in sizes]
        kinds = [kind_of(page) for page in pages]
        for page in pages:
            check_offsets(info.path, page.dataoffsets, page.databytecounts)
        errs = next((kind.openslide_errs for kind in kinds if kind.openslide_errs), "")
        if info.vendor == "generic-tiff":
            _check_one_picture(pages)
            if not errs and any(page.imagewidth > info.width and page.imagelength > info.height for page in tiled):
                errs = "OpenSlide takes the first directory for level 0, and another is larger"
            if not errs and any(page.subifds for page in pages):
                errs = "OpenSlide does not see the levels that lie in SubIFDs"
            if not errs and any(_refused_by_libtiff(page, kind) for page, kind in zip(pages, kinds, strict=True)):
                errs = "OpenSlide takes uncompressed tiles of such a size for damaged"
        elif errs:  # what else is not an Aperio slide of a picture: OpenSlide alone knows its levels
            raise UnknownKind(
                f"an Aperio slide whose pixels are {', '.join(sorted({k.colours for k in kinds}))}, not RGB"
            )
        return Survey(errs, all(kind.compression in _STRICT_IN_OPENSLIDE for kind in kinds))


def _refused_by_libtiff(page: Any, kind: PixelKind) -> bool:
    """Say whether libtiff compares a tile's bytes with its own count, which it has rounded up to whole kilobytes."""
    return kind.compression == _NONE and page.tilewidth * page.tilelength * kind.samples % 1024 != 0


def _check_one_picture(pages: Sequence[Any]) -> None:
    """Raise UnknownKind where several directories of one size make an image of channels, depths or times."""
    whole = [page for page in pages if not int(page.subfiletype) & _REDUCED]
    if len({(page.imagewidth, page.imagelength) for page in whole}) < len(whole):
        raise UnknownKind(f"an image of {len(whole)} planes (channels, depths or times), not RGB")
