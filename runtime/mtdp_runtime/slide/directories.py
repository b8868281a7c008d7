"""Whether a TIFF's chain of directories ends: libraries that follow a loop never come back."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final

_MOST_DIRECTORIES: Final = 10_000  # a slide has tens
_MOST_ENTRIES: Final = 1 << 16


def endless_directories(path: Path) -> str:
    """Return what is wrong with the chain of a TIFF or BigTIFF; empty where it ends, or where this is no TIFF.

    Only the links are followed: an entry count, and the offset of the next directory after the entries.
    """
    with path.open("rb") as file:
        header = file.read(16)
        size_bytes = os.fstat(file.fileno()).st_size
        order = {b"II": "<", b"MM": ">"}.get(header[:2])
        if order is None or len(header) < 16:
            return ""
        (magic,) = struct.unpack(f"{order}H", header[2:4])
        if magic == 42:
            count_format, entry_bytes, link_format, link = f"{order}H", 12, f"{order}I", header[4:8]
        elif magic == 43:
            count_format, entry_bytes, link_format, link = f"{order}Q", 20, f"{order}Q", header[8:16]
        else:
            return ""
        seen: set[int] = set()
        (place,) = struct.unpack(link_format, link)
        while 0 < place < size_bytes:
            if place in seen:
                return f"its directories form a loop: number {len(seen)} leads back to an earlier one"
            if len(seen) == _MOST_DIRECTORIES:
                return f"it has more than {_MOST_DIRECTORIES} directories"
            seen.add(place)
            file.seek(place)
            count_bytes = file.read(struct.calcsize(count_format))
            if len(count_bytes) < struct.calcsize(count_format):
                return ""
            (entries,) = struct.unpack(count_format, count_bytes)
            if entries > _MOST_ENTRIES:
                return ""
            file.seek(entries * entry_bytes, os.SEEK_CUR)
            link = file.read(struct.calcsize(link_format))
            if len(link) < struct.calcsize(link_format):
                return ""
            (place,) = struct.unpack(link_format, link)
    return ""
