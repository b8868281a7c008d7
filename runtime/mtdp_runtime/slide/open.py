"""Opens a slide with the reader that suits it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

import tifffile

from mtdp_runtime.errors import SlideUnreadable
from mtdp_runtime.slide import Slide
from mtdp_runtime.slide.dicom import is_dicom, series_of, the_series
from mtdp_runtime.slide.dicom_slide import DicomReader
from mtdp_runtime.slide.image import PLAIN_SUFFIXES, TIFF_SUFFIXES, ImageReader, NotAnImage, odd_channel
from mtdp_runtime.slide.mirax import with_its_folder
from mtdp_runtime.slide.openslide import REFERENCE, OpenSlideReader
from mtdp_runtime.slide.tiff_check import check_tiff
from mtdp_runtime.slide.tiled_tiff import BROKEN_TIFF, NotUnderstood, TiledTiffReader

_EXPORT: Final = "Export it as 8-bit RGB."


def open_slide(path: Path | str, slide_mpp: float | None = None, given_by: str = "the caller") -> Slide:
    """Open a slide.

    Args:
        path: the file (for a multi-file format, the one that names the others), or a folder with one DICOM series.
        slide_mpp: micrometres a level-0 pixel covers; overrides what the file says.
        given_by: who says so, for the record.

    Raises:
        SlideUnreadable: no such file, no reader understands it, or it declares what it cannot hold.
    """
    file = Path(path)
    if not file.exists():
        raise SlideUnreadable(f"{file}: no such file", hint="Check the path.")
    if file.is_dir():
        file = the_series(file)
    if file.stat().st_size == 0:
        raise SlideUnreadable(f"{file}: the file is empty (0 bytes)", hint="Copy it again.")
    series = series_of(file) if is_dicom(file) else ""
    if series:
        return DicomReader(file, series, slide_mpp, given_by)
    file = with_its_folder(file)
    check_tiff(file)
    kind = file.suffix.lower()
    try:
        reference = OpenSlideReader(file, slide_mpp, given_by)
    except SlideUnreadable as refusal:
        if kind not in TIFF_SUFFIXES | PLAIN_SUFFIXES:
            raise
        try:
            return ImageReader(file, slide_mpp, given_by, "OpenSlide does not read this file")
        except NotAnImage as reason:
            raise SlideUnreadable(f"{refusal}; and {reason}", hint=refusal.hint) from refusal
    if kind in TIFF_SUFFIXES and reference.info.vendor == "generic-tiff":
        is_ome, odd = _hidden_from_openslide(file)
        if is_ome or odd:
            reference.close()
        if is_ome:
            said = "OpenSlide does not know an OME-TIFF's levels and channels"
            try:
                return ImageReader(file, slide_mpp, given_by, said)
            except NotAnImage as reason:
                raise SlideUnreadable(f"{file}: {reason}", hint=_EXPORT) from reason
        if odd:
            raise SlideUnreadable(f"{file}: {odd}", hint=_EXPORT)
    try:
        return TiledTiffReader(reference)
    except NotUnderstood as reason:
        left_out = reference.info.reader_reason.removeprefix(REFERENCE)
        reference.info = replace(
            reference.info, reader_reason=f"the fast reader does not read this: {reason}{left_out}"
        )
        return reference


def _hidden_from_openslide(path: Path) -> tuple[bool, str]:
    """Say whether a TIFF is an OME-TIFF, and what is wrong with a fourth channel.

    Of the first, OpenSlide takes channels for levels, and does not see the levels that lie in SubIFDs; the second it
    takes for transparency, whatever it is.
    """
    try:
        with tifffile.TiffFile(path) as tiff:
            return bool(tiff.is_ome), next((odd_channel(page.aspage()) for page in tiff.pages if page.is_tiled), "")
    except BROKEN_TIFF:
        return False, ""
