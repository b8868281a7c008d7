"""The end of a run that a kill in the middle of it cannot spoil.

The attributes that only the end knows change the structure of the HDF5 file, in several writes. All of the file but its
rows is saved beside it before; a run that was killed in between is undone by the next.
"""

from __future__ import annotations

import json
import os
from pathlib import Path


def save_structure(file: int, undo: Path, rows: list[tuple[list[int], int, int]]) -> None:
    """Write all of a file but its rows to `undo`: a line of JSON (size, ranges), then the bytes of the ranges.

    Args:
        file: descriptor of the open file.
        undo: where to.
        rows: of each dataset of rows, as `layout.places_of` gives them.

    Raises:
        OSError: the disk is full or gone.
    """
    size = os.fstat(file).st_size
    ranges, end = [], 0
    for start, length in sorted((offset, length) for offsets, _, length in rows for offset in offsets):
        ranges.append((end, start - end))
        end = start + length
    ranges.append((end, size - end))
    scratch = undo.with_name(f"{undo.name}.new")
    with scratch.open("wb") as stream:
        stream.write(json.dumps([size, ranges]).encode() + b"\n")
        for start, length in ranges:
            stream.write(os.pread(file, length, start))
        stream.flush()
        os.fsync(stream.fileno())
    scratch.replace(undo)
    sync_folder(undo.parent)


def restore_structure(partial: Path, undo: Path) -> None:
    """Undo the end of a run that was killed there. The rows are complete then, and stay."""
    if not undo.exists():
        return
    if partial.exists():
        with undo.open("rb") as stream, partial.open("r+b") as file:
            size, ranges = json.loads(stream.readline())
            for start, length in ranges:
                file.seek(start)
                file.write(stream.read(length))
            file.truncate(size)
            file.flush()
            os.fsync(file.fileno())
    undo.unlink()


def sync_folder(folder: Path) -> None:
    """Make what was renamed in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
