"""Which image of a TIFF is the slide, and what the file says of that image's scale."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any, Final

from mtdp_runtime.slide.probe import UnknownKind
from mtdp_runtime.slide.scale import Scale, resolution_of, scale_of_tiff

# What scanners' software and Bio-Formats call the images of a slide that are not the slide.
_FILE_NAME: Final = re.compile(r"""\bFileName\s{0,9}=\s{0,9}["']([^"']+)["']""")  # OME-XML, TiffData/UUID/@FileName
_ASIDE: Final = re.compile(r"\b(label|macro|overview|thumbnail|barcode)\b", re.IGNORECASE)


def the_slide(tiff: Any) -> Any:
    """Return tifffile's series that is the slide: the largest that is not called label or macro.

    The first may be another one: Bio-Formats puts the macro of Leica's SCN there. A series whose pixels lie in another
    file, which is not here, is taken only where there is no other.

    Raises:
        UnknownKind: its OME-XML names what is no file beside it, which tifffile would open.
    """
    if tiff.is_ome:
        _check_named_files(Path(tiff.filehandle.dirname), tiff.ome_metadata or "")
    here = [one for one in tiff.series if all(page is not None for page in one.levels[0].pages)] or list(tiff.series)
    named = [one for one in here if not _ASIDE.search(one.name or "")] or here
    return max(named, key=lambda one: _size_px(one.levels[0].pages[0]))


def _check_named_files(folder: Path, xml: str) -> None:
    for said in _FILE_NAME.findall(xml):
        name = html.unescape(said)
        plain = name == Path(name).name and "\\" not in name and "\0" not in name
        if not plain or ((folder / name).exists() and not (folder / name).is_file()):
            raise UnknownKind(f"its OME-XML names {name[:100]!r}, which is no file in its own folder")


def scale_in(tiff: Any, page: Any) -> Scale:
    """Return what the file says of the scale of level 0, which `page` is."""
    description = tiff.pages[0].description or ""
    x, y, unit = resolution_of(page)
    return scale_of_tiff(description, x, y, unit, (int(page.imagewidth), int(page.imagelength)))


def _size_px(page: Any) -> int:
    if page is None:
        return 0
    whole = page.aspage()  # where the planes are in another order, tifffile keeps but the outline of the first
    return int(whole.imagewidth) * int(whole.imagelength)
