"""Which DICOM files belong together: as much of the format (PS3.10, PS3.5) as it takes to read a series' number."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO, Final

from mtdp_runtime.errors import SlideUnreadable

SUFFIX: Final = ".dcm"
_SERIES: Final = (0x0020, 0x000E)  # Series Instance UID
_TRANSFER_SYNTAX: Final = (0x0002, 0x0010)
_IMPLICIT: Final = "1.2.840.10008.1.2"
_UNDEFINED: Final = 0xFFFFFFFF
_LONG: Final = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_ITEM_END: Final = (0xFFFE, 0xE00D)
_SEQUENCE_END: Final = (0xFFFE, 0xE0DD)
_DEEPEST: Final = 20


def series_of(path: Path) -> str:
    """Return the Series Instance UID of a file; empty where it is no DICOM file, or has none."""
    try:
        with path.open("rb") as stream:
            stream.seek(128)
            if stream.read(4) != b"DICM":
                return ""
            return _find_series(stream)
    except (OSError, struct.error, ValueError):
        return ""


def is_dicom(path: Path) -> bool:
    """Say whether a file is one of a series: by its suffix; where it has none, or its name is a UID, by its content.

    An archive's DICOMDIR is DICOM, too, and of no series.
    """
    kind = path.suffix.lower()
    return kind == SUFFIX or ((not kind or kind[1:].isdigit()) and path.is_file() and bool(series_of(path)))


def series_in(folder: Path) -> dict[str, list[Path]]:
    """Return the DICOM files of a folder (not of folders in it) by their series."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(".") and path.is_file() and is_dicom(path):
            found.setdefault(series_of(path) or str(path), []).append(path)
    return found


def the_series(folder: Path) -> Path:
    """Return a file of the only series in a folder: OpenSlide finds the others by it.

    Raises:
        SlideUnreadable: there is none, or more than one.
    """
    found = series_in(folder)
    if len(found) != 1:
        what = f"{len(found)} DICOM series" if found else "a folder, not a slide"
        raise SlideUnreadable(f"{folder}: {what}", hint="Name the slide file in it.")
    (files,) = found.values()
    return max(files, key=lambda path: (path.stat().st_size, path.name))


def _find_series(stream: BinaryIO) -> str:
    implicit = False
    while True:
        tag, size = _header(stream, implicit)
        if tag == _TRANSFER_SYNTAX:
            implicit = _text(stream, size) == _IMPLICIT
        elif tag == _SERIES:
            return _text(stream, size)
        elif tag > _SERIES:
            return ""
        else:
            _skip(stream, size, implicit, 0)


def _header(stream: BinaryIO, implicit: bool) -> tuple[tuple[int, int], int]:
    group, element = struct.unpack("<HH", stream.read(4))
    if group == 0xFFFE or (implicit and group != 2):
        return (group, element), struct.unpack("<I", stream.read(4))[0]
    kind = stream.read(2)
    if kind in _LONG:
        return (group, element), struct.unpack("<2xI", stream.read(6))[0]
    return (group, element), struct.unpack("<H", stream.read(2))[0]


def _skip(stream: BinaryIO, size: int, implicit: bool, depth: int) -> None:
    """Skip a value; one of undefined length is a sequence or an item, which ends with a mark of its own."""
    if size != _UNDEFINED:
        stream.seek(size, 1)
        return
    if depth > _DEEPEST:
        raise ValueError("too deep")
    while True:
        tag, inner = _header(stream, implicit)
        if tag in (_ITEM_END, _SEQUENCE_END):
            return
        _skip(stream, inner, implicit, depth + 1)


def _text(stream: BinaryIO, size: int) -> str:
    return stream.read(min(size, 64)).rstrip(b"\0 ").decode("ascii", "replace")
