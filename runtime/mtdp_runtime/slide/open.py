"""Opens a slide with the reader that suits it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mtdp_runtime.errors import SlideUnreadable
from mtdp_runtime.slide import Slide
from mtdp_runtime.slide.openslide import OpenSlideReader
from mtdp_runtime.slide.tiff_check import check_tiff
from mtdp_runtime.slide.tiled_jpeg import NotUnderstood, TiledJpegReader


def open_slide(path: Path | str, slide_mpp: float | None = None, given_by: str = "the caller") -> Slide:
    """Open a slide.

    Args:
        path: the file (for a multi-file format, the one that names the others).
        slide_mpp: micrometres a level-0 pixel covers; overrides what the file says.
        given_by: who says so, for the record.

    Raises:
        SlideUnreadable: no such file, no reader understands it, or it declares what it cannot hold.
    """
    file = Path(path)
    if not file.exists():
        raise SlideUnreadable(f"{file}: no such file", hint="Check the path.")
    if file.is_dir():
        raise SlideUnreadable(f"{file}: a folder, not a slide", hint="Name the slide file in it.")
    if file.stat().st_size == 0:
        raise SlideUnreadable(f"{file}: the file is empty (0 bytes)", hint="Copy it again.")
    check_tiff(file)
    reference = OpenSlideReader(file, slide_mpp, given_by)
    try:
        return TiledJpegReader(reference)
    except NotUnderstood as reason:
        reference.info = replace(reference.info, reader_reason=f"the fast reader does not read this: {reason}")
        return reference
