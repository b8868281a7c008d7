"""Opens a slide with the reader that suits it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from mtdp_runtime.errors import SlideUnreadable
from mtdp_runtime.slide import Slide
from mtdp_runtime.slide.dicom import is_dicom, series_of, the_series
from mtdp_runtime.slide.dicom_slide import DicomReader
from mtdp_runtime.slide.image import ImageReader, NotAnImage, kind_of_file
from mtdp_runtime.slide.mirax import with_its_folder
from mtdp_runtime.slide.openslide import REFERENCE, OpenSlideReader
from mtdp_runtime.slide.probe import UnknownKind
from mtdp_runtime.slide.tiff_check import check_tiff
from mtdp_runtime.slide.tiff_survey import Survey, survey
from mtdp_runtime.slide.tiled_level import NotUnderstood
from mtdp_runtime.slide.tiled_tiff import BROKEN_TIFF, TiledTiffReader

_EXPORT: Final = "Export it as 8-bit RGB."
_CHECKED: Final = frozenset({"aperio", "generic-tiff"})  # what OpenSlide calls the TIFFs whose directories are levels


def open_slide(path: Path | str, slide_mpp: float | None = None, given_by: str = "the caller") -> Slide:
    """Open a slide.

    Args:
        path: the file (for a multi-file format, the one that names the others), or a folder: one DICOM series, or an
            OME-Zarr.
        slide_mpp: micrometres a level-0 pixel covers; overrides what the file says.
        given_by: who says so, for the record.

    Raises:
        SlideUnreadable: no such file, no reader understands it, its pixels are not 8-bit RGB, or it declares what it
            cannot hold.
    """
    file = Path(path)
    if not file.exists():
        raise SlideUnreadable(f"{file}: no such file", hint="Check the path.")
    if not (file.is_file() or file.is_dir()):
        raise SlideUnreadable(f"{file}: no file, but a pipe, a socket or a device", hint="Name a slide.")
    if kind_of_file(file) == "OME-Zarr":
        return _image(file, slide_mpp, given_by, "OpenSlide does not read OME-Zarr")
    if file.is_dir():
        file = the_series(file)
    if file.stat().st_size == 0:
        raise SlideUnreadable(f"{file}: the file is empty (0 bytes)", hint="Copy it again.")
    series = series_of(file) if is_dicom(file) else ""
    if series:
        return DicomReader(file, series, slide_mpp, given_by)
    file = with_its_folder(file)
    check_tiff(file)
    try:
        reference = OpenSlideReader(file, slide_mpp, given_by)
    except SlideUnreadable as refusal:
        if not kind_of_file(file):
            raise
        try:
            return ImageReader(file, slide_mpp, given_by, "OpenSlide does not read this file")
        except NotAnImage as reason:
            hint = _EXPORT if isinstance(reason.__cause__, UnknownKind) else refusal.hint
            raise SlideUnreadable(f"{refusal}; and {reason}", hint=hint) from refusal
    found = None
    if reference.info.vendor in _CHECKED:
        found = _survey(reference)
        if found.openslide_errs:
            reference.close()
            return _image(file, slide_mpp, given_by, found.openslide_errs)
    return _fast_or_openslide(reference, found, slide_mpp, given_by)


def _survey(reference: OpenSlideReader) -> Survey:
    """Check what OpenSlide takes for levels.

    Raises:
        SlideUnreadable: the pixels are of a kind that is not read, or nothing can be known of them.
    """
    try:
        return survey(reference.info)
    except UnknownKind as kind:
        reference.close()
        raise SlideUnreadable(f"{reference.info.path}: {kind}", hint=_EXPORT) from kind
    except SlideUnreadable:
        reference.close()
        raise
    except BROKEN_TIFF as error:
        if reference.info.vendor != "generic-tiff":  # a scanner's own files are 8-bit RGB
            return Survey("", strict_in_openslide=True)
        reference.close()
        raise SlideUnreadable(
            f"{reference.info.path}: the TIFF is damaged: {error}",
            hint="Compare the file's checksum with the original and copy it again.",
        ) from error


def _fast_or_openslide(
    reference: OpenSlideReader, found: Survey | None, slide_mpp: float | None, given_by: str
) -> Slide:
    try:
        return TiledTiffReader(reference)
    except NotUnderstood as reason:
        why = f"the fast reader does not read this: {reason}"
    except SlideUnreadable:
        reference.close()
        raise
    if reference.info.vendor == "generic-tiff" and found is not None and not found.strict_in_openslide:
        reference.close()
        return _image(reference.info.path, slide_mpp, given_by, f"{why}; and OpenSlide does not tell damage in it")
    left_out = reference.info.reader_reason.removeprefix(REFERENCE)
    reference.info = replace(reference.info, reader_reason=f"{why}{left_out}")
    return reference


def _image(path: Path, slide_mpp: float | None, given_by: str, why: str) -> Slide:
    try:
        return ImageReader(path, slide_mpp, given_by, why)
    except NotAnImage as reason:
        raise SlideUnreadable(f"{path}: {reason}", hint=_EXPORT) from reason
