"""What a TIFF declares, against what the file can hold: asked before a library allocates memory for it.

A directory may say that its tiles have terabytes, that there are a billion of them, or that the next directory is the
one before. Libraries answer that with an abort, a long wait, or background where tiles are missing. Only what is surely
wrong is refused here; what this does not understand (NDPI, above all, which uses the fields of a TIFF in its own way)
is left to the readers, which say what they make of it. Layout: TIFF 6.0, section 2; BigTIFF: libtiff's description.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from mtdp_runtime.errors import SlideUnreadable

MOST_TILE_PX: Final = 1 << 28  # 1 GiB as decoders hold it; scanners write tiles of 2^16 to 2^20 pixels
MOST_PADDED_PX: Final = 8192  # a tile's side may be more than twice the image's only below this
MOST_DIRECTORIES: Final = 1 << 16
_TYPE_BYTES: Final = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
_INTEGERS: Final = {1: "B", 3: "H", 4: "I", 16: "Q"}
_WIDTH, _LENGTH, _STRIP_OFFSETS, _SAMPLES, _PLANAR = 256, 257, 273, 277, 284
_TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS = 322, 323, 324
_BEYOND_ANY_FILE: Final = 1 << 63  # no file system, and no call, has such a place
_DEPTH, _NDPI = 32997, 65420
_SEPARATE_PLANES: Final = 2


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the fields of a directory lie: TIFF has 32 bits for a place, BigTIFF 64."""

    order: str  # "<" or ">"
    count: str  # struct format of the number of entries
    place: str  # of an offset, and of the number of values
    entry_bytes: int
    first: int  # where the offset of the first directory stands


_CLASSIC: Final = {b"II*\0": "<", b"MM\0*": ">"}
_BIG: Final = {b"II+\0": "<", b"MM\0+": ">"}


@dataclass(frozen=True, slots=True)
class _Entry:
    values: int  # how many
    end: int  # where the values end in the file; 0 where they stand in the entry
    value: int | None  # the value, where it is one integer


def check_tiff(path: Path) -> None:
    """Pass a file that is no TIFF, or one whose directories declare nothing impossible.

    Raises:
        SlideUnreadable: they do.
    """
    try:
        with path.open("rb") as file:
            layout = _layout(file.read(4))
            if layout is not None:
                _check_directories(path, file, layout)
    except (OSError, struct.error):
        return  # cut short, or unreadable: the readers say it


def check_offsets(path: Path, offsets: Sequence[int], sizes_bytes: Sequence[int]) -> None:
    """Refuse a list of tiles or strips that names a place which no file has.

    Raises:
        SlideUnreadable: it does.
    """
    if max(offsets, default=0) + max(sizes_bytes, default=0) < _BEYOND_ANY_FILE:
        return
    for number, (offset, size) in enumerate(zip(offsets, sizes_bytes, strict=False)):
        if offset + size >= _BEYOND_ANY_FILE:
            raise _impossible(path, f"tile or strip {number} lies at byte {offset}, which no file has")


def _layout(magic: bytes) -> _Layout | None:
    if magic in _CLASSIC:
        return _Layout(_CLASSIC[magic], "H", "I", 12, 4)
    if magic in _BIG:
        return _Layout(_BIG[magic], "Q", "Q", 20, 8)
    return None


def _check_directories(path: Path, file: BinaryIO, layout: _Layout) -> None:
    size_bytes = os.fstat(file.fileno()).st_size
    at, seen = _number(file, layout, layout.first, layout.place), set[int]()
    while at:
        if at >= _BEYOND_ANY_FILE:
            raise _impossible(path, f"directory {len(seen)} lies at byte {at}, which no file has")
        if at in seen:
            raise _impossible(path, f"directory {len(seen)} is followed by an earlier one, without end")
        if len(seen) == MOST_DIRECTORIES:
            raise _impossible(path, f"more than {MOST_DIRECTORIES} directories")
        seen.add(at)
        count = _number(file, layout, at, layout.count)
        start = at + struct.calcsize(layout.order + layout.count)
        if start + count * layout.entry_bytes > size_bytes:
            return
        entries = _entries(file.read(count * layout.entry_bytes), layout)
        if entries is None or _NDPI in entries:
            return
        problem = _problem(entries, size_bytes)
        if problem:
            raise _impossible(path, f"directory {len(seen) - 1} {problem}")
        at = _number(file, layout, start + count * layout.entry_bytes, layout.place)


def _number(file: BinaryIO, layout: _Layout, at: int, kind: str) -> int:
    file.seek(at)
    number: int = struct.unpack(layout.order + kind, file.read(struct.calcsize(layout.order + kind)))[0]
    return number


def _entries(content: bytes, layout: _Layout) -> dict[int, _Entry] | None:
    """Return the entries by tag; None where this is no directory."""
    found = {}
    place_bytes = struct.calcsize(layout.order + layout.place)
    for at in range(0, len(content), layout.entry_bytes):
        tag, kind, values = struct.unpack_from(f"{layout.order}HH{layout.place}", content, at)
        if kind not in _TYPE_BYTES:
            return None
        needed = values * _TYPE_BYTES[kind]
        field = at + layout.entry_bytes - place_bytes
        end, value = 0, None
        if needed > place_bytes:
            end = struct.unpack_from(layout.order + layout.place, content, field)[0] + needed
        elif values == 1 and kind in _INTEGERS:
            value = struct.unpack_from(layout.order + _INTEGERS[kind], content, field)[0]
        found[tag] = _Entry(values, end, value)
    return found


def _problem(entries: dict[int, _Entry], size_bytes: int) -> str:
    """Say what is impossible about a directory; nothing where it does not say enough."""
    far = next((tag for tag, entry in entries.items() if entry.end >= _BEYOND_ANY_FILE), None)
    if far is not None:
        return f"keeps the values of its tag {far} at a place which no file has"
    sides = [entries[tag].value if tag in entries else None for tag in (_WIDTH, _LENGTH, _TILE_WIDTH, _TILE_LENGTH)]
    width, length, tile_width, tile_length = sides
    if width is None or length is None or tile_width is None or tile_length is None:
        return ""
    beyond = any(tile > max(MOST_PADDED_PX, 2 * side) for side, tile in ((width, tile_width), (length, tile_length)))
    if not tile_width or not tile_length or tile_width * tile_length > MOST_TILE_PX or beyond:
        return f"says that a tile has {tile_width} x {tile_length} px, in an image of {width} x {length} px"
    tiles = -(-width // tile_width) * -(-length // tile_length)
    planar, samples = entries.get(_PLANAR), entries.get(_SAMPLES)
    if planar is not None and planar.value == _SEPARATE_PLANES and samples is not None and samples.value is not None:
        tiles *= samples.value
    offsets = entries.get(_TILE_OFFSETS, entries.get(_STRIP_OFFSETS))  # some writers list tiles where strips belong
    listed = 0 if offsets is None else offsets.values
    flat = _DEPTH not in entries or entries[_DEPTH].value == 1  # Aperio writes a depth of 1; volumes count otherwise
    if listed < tiles and flat:
        return f"says {width} x {length} px, which takes {tiles} tiles, and lists {listed}"
    if offsets is not None and offsets.end > size_bytes:
        return f"lists {listed} tiles, and the list ends beyond the end of the file"
    return ""


def _impossible(path: Path, what: str) -> SlideUnreadable:
    return SlideUnreadable(
        f"{path}: the TIFF is damaged: {what}",
        hint="Compare the file's checksum with the original and copy it again.",
    )
