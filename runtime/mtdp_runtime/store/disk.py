"""Files that are written by our own calls: each is looked at, and what is written, synced and renamed is our own file.

A path may come to name another process's file at any moment: a run that slept past its claim finds its successor's
there. A descriptor does not change, so all is written through one, and a name is only used after it was compared.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import ClaimLost


@dataclass(frozen=True, slots=True)
class Place:
    """Where the rows of a dataset lie in a file."""

    offsets: tuple[int, ...]  # of its chunks, in order
    rows_per_chunk: int
    row_bytes: int

    def ranges(self) -> list[tuple[int, int]]:
        """Offset and length of each chunk."""
        return [(offset, self.rows_per_chunk * self.row_bytes) for offset in self.offsets]

    def pieces(self, start: int, count: int) -> list[tuple[int, int]]:
        """Return where some rows lie: offset and length of each piece, in order."""
        found, done = [], 0
        while done < count:
            chunk, within = divmod(start + done, self.rows_per_chunk)
            rows = min(self.rows_per_chunk - within, count - done)
            found.append((self.offsets[chunk] + within * self.row_bytes, rows * self.row_bytes))
            done += rows
        return found


def own_file(path: Path) -> int:
    """Make a file that nobody else has open, whatever stood under the name; return its descriptor.

    Raises:
        OSError: it cannot be made.
    """
    with suppress(FileNotFoundError):
        path.unlink()
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)


def reserve(file: int, size_bytes: int) -> None:
    """Give a new file its size and its space, so that a disk that is full says so before any work."""
    if not size_bytes:
        return
    try:
        os.posix_fallocate(file, 0, size_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        os.ftruncate(file, size_bytes)


def write_at(file: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of it, however many calls that takes."""
    left = memoryview(data)
    while left:
        written = os.pwrite(file, left, offset)
        if written == 0:
            raise OSError(errno.EIO, "nothing was written")
        left, offset = left[written:], offset + written


def read_at(file: int, length: int, offset: int) -> bytes:
    """Read exactly so many bytes.

    Raises:
        OSError: the disk fails, or the file ends before.
    """
    parts = []
    while length:
        part = os.pread(file, length, offset)
        if not part:
            raise OSError(errno.EIO, "the file is shorter than it was")
        parts.append(part)
        length, offset = length - len(part), offset + len(part)
    return b"".join(parts)


def write_rows(file: int, place: Place, start: int, data: bytes) -> None:
    """Write whole rows to their places in an open file, from row `start` on."""
    done = 0
    for offset, length in place.pieces(start, len(data) // place.row_bytes):
        write_at(file, memoryview(data)[done : done + length], offset)
        done += length


def read_rows(file: int, place: Place, start: int, count: int) -> bytes:
    """Return the bytes of rows of an open file, from row `start` on."""
    return b"".join(read_at(file, length, offset) for offset, length in place.pieces(start, count))


def rows_bytes(rows: NDArray[Any]) -> bytes:
    """Return rows as they are stored: little-endian, one after the other."""
    return np.ascontiguousarray(rows, rows.dtype.newbyteorder("<")).tobytes()


def is_own(file: int, path: Path) -> bool:
    """Say whether a path still names the file that is open.

    Raises:
        OSError: there is nothing under that name.
    """
    return os.path.samestat(os.fstat(file), path.lstat())


def rename_own(file: int, path: Path, target: Path) -> None:
    """Rename the file that is open.

    Raises:
        ClaimLost: the path names another process's file.
        OSError: it cannot be renamed.
    """
    if not is_own(file, path):
        raise ClaimLost(f"{path}: another process has replaced it", hint="It finishes this slide.")
    path.replace(target)


def unlink_own(file: int, path: Path) -> None:
    """Remove the file that is open; another one under its name stays."""
    with suppress(FileNotFoundError):
        if is_own(file, path):
            path.unlink()
