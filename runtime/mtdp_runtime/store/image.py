"""An HDF5 file in memory, without its rows: HDF5 writes here and never to a disk.

HDF5 hides some errors of the disk and is left in a broken state by others. So it lays out a file here, where nothing
fails, and our own writes, each of them checked, bring it to the disk. The space of the rows is a hole that takes no
memory: HDF5 reserves it and never touches it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_PAGE_BYTES: Final = 1 << 16


class SparseImage(io.RawIOBase):
    """A file object for `h5py.File`; what was never written is zero and takes no memory."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._pages: dict[int, bytearray] = {}
        self._position = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size_bytes}[whence]
        self._position = start + offset
        return self._position

    def truncate(self, size: int | None = None) -> int:
        self.size_bytes = self._position if size is None else size
        return self.size_bytes

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        view[:] = self.read_at(self._position, len(view))
        self._position += len(view)
        return len(view)

    def write(self, data: ReadableBuffer) -> int:
        view = memoryview(data).cast("B")
        for page, within, start, count in _cut(self._position, len(view)):
            self._pages.setdefault(page, bytearray(_PAGE_BYTES))[within : within + count] = view[start : start + count]
        self._position += len(view)
        self.size_bytes = max(self.size_bytes, self._position)
        return len(view)

    def read_at(self, offset: int, length: int) -> bytes:
        """Return bytes wherever the position is."""
        data = bytearray(length)
        for page, within, start, count in _cut(offset, length):
            if page in self._pages:
                data[start : start + count] = self._pages[page][within : within + count]
        return bytes(data)

    def extents(self) -> Iterator[tuple[int, bytes]]:
        """Yield where something stands, and what: whole pages, so the edges of a hole may belong to one."""
        for page in sorted(self._pages):
            offset = page * _PAGE_BYTES
            if offset < self.size_bytes:
                yield offset, bytes(self._pages[page][: self.size_bytes - offset])

    def outside(self, holes: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Yield offset and length of all that lies outside some ranges (offset, length), a page at most at a time."""
        end = 0
        for start, length in [*sorted(holes), (self.size_bytes, 0)]:
            for offset in range(end, start, _PAGE_BYTES):
                yield offset, min(_PAGE_BYTES, start - offset)
            end = start + length


def _cut(offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a range into pages: the page, the offset within it, the offset within the range, the bytes."""
    done = 0
    while done < length:
        page, within = divmod(offset + done, _PAGE_BYTES)
        count = min(_PAGE_BYTES - within, length - done)
        yield page, within, done, count
        done += count
