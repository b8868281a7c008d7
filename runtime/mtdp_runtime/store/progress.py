"""How far a partial file is known to be good: a few bytes behind the end of its HDF5, which HDF5 does not look at.

Two records take turns: how many rows were on the disk at a commit, and the checksum of all of them. Who goes on reads
the rows again and trusts them where the checksum is right; nothing else of a partial file is believed, and HDF5 does
not even open it. A key says of which run the rows are, and where in the file they lie.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from typing import Final

from mtdp_runtime.store.disk import read_at, write_at

_MAGIC: Final = b"mtdprow1"
_RECORD: Final = struct.Struct("<Q32s")  # rows, checksum; 8 bytes of its own checksum follow
_RECORD_BYTES: Final = _RECORD.size + 8
_HEAD_BYTES: Final = len(_MAGIC) + 32 + 8
BYTES: Final = _HEAD_BYTES + 2 * _RECORD_BYTES


@dataclass(frozen=True, slots=True)
class Committed:
    """What a partial file says of itself."""

    rows: int
    digest: bytes  # 32 bytes


class Progress:
    """The writing side."""

    def __init__(self, file: int, offset: int, key: bytes, hint: bytes) -> None:
        self._file = file
        self._offset = offset
        self._content = bytearray(_MAGIC + key + hint + bytes(2 * _RECORD_BYTES))
        self._turn = 0

    def begin(self) -> None:
        write_at(self._file, bytes(self._content), self._offset)

    def commit(self, rows: int, digest: bytes) -> None:
        """Say that rows are good. They must be on the disk before."""
        record = _RECORD.pack(rows, digest)
        start = _HEAD_BYTES + self._turn * _RECORD_BYTES
        self._content[start : start + _RECORD_BYTES] = record + hashlib.sha256(record).digest()[:8]
        self._turn = 1 - self._turn
        write_at(self._file, bytes(self._content), self._offset)

    def move(self, offset: int) -> None:
        """Write all of it again farther behind: the end of the HDF5 will reach its place."""
        self._offset = offset
        write_at(self._file, bytes(self._content), offset)


def read_progress(file: int, key: bytes) -> tuple[list[Committed], bytes]:
    """Return what a partial file of this key has committed, the latest first, and its hint; nothing of any other.

    Raises:
        OSError: the disk fails.
    """
    size = os.fstat(file).st_size
    if size < BYTES:
        return [], b""
    content = read_at(file, BYTES, size - BYTES)
    if content[: len(_MAGIC) + 32] != _MAGIC + key:
        return [], b""
    found = []
    for start in (_HEAD_BYTES, _HEAD_BYTES + _RECORD_BYTES):
        record, own = content[start : start + _RECORD.size], content[start + _RECORD.size : start + _RECORD_BYTES]
        if hashlib.sha256(record).digest()[:8] == own:
            found.append(Committed(*_RECORD.unpack(record)))
    return sorted(found, key=lambda one: -one.rows), content[_HEAD_BYTES - 8 : _HEAD_BYTES]
