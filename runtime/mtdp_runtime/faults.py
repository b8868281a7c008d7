"""Whether an error comes of a slide's own bytes, or of the machine and its storage.

What the system says of a read (an errno) is never about the content of a file. Libraries pass it on as the cause of
their own error, or as the C library's words in a text.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

# Waits before a read is tried again on a fresh handle: a server that restarts takes seconds.
RETRY_AFTER_S: Final = (0.5, 1.0, 2.0, 4.0)
_PASSING: Final = frozenset(
    {
        *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.EREMOTEIO),
        *(errno.ENOTCONN, errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.EHOSTDOWN),
        *(errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENOLINK, errno.EPIPE, errno.ENOLCK),
        *(errno.ENXIO, errno.ENODEV, errno.ESHUTDOWN, errno.ECOMM, errno.EPROTO),
    }
)
_LASTING: Final = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENOMEM, errno.ENOSPC),
        *(errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EROFS, errno.ENAMETOOLONG),
    }
)
_REMEDIES: Final = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    **dict.fromkeys((errno.ELOOP, errno.ENOTEMPTY, errno.EINVAL, errno.ENXIO), "move away what lies under this name"),
    errno.EILSEQ: "give it a name in UTF-8 (a manifest with the columns slide,name)",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EROFS: "make its file system writable",
    errno.ENAMETOOLONG: "give a shorter name",
}
_WORDS: Final = {os.strerror(number): number for number in _PASSING | _LASTING}


@dataclass(frozen=True, slots=True)
class Fault:
    """What the system said."""

    reason: str
    passing: bool  # trying again in some seconds may end otherwise


def system_fault(error: BaseException) -> Fault | None:
    """Return what the system said, where an error comes of that; None where it says something of the content."""
    for one in _chain(error):
        if isinstance(one, MemoryError):
            return Fault("out of memory", passing=False)
        number = one.errno if isinstance(one, OSError) else None
        if number is None:
            number = next((number for words, number in _WORDS.items() if words in str(one)), None)
        if number in _PASSING or number in _LASTING:
            return Fault(os.strerror(number), number in _PASSING)
    return None


def remedy(error: OSError) -> str:
    """Return what may help where something could not be written, in the form "free space"."""
    if isinstance(error, PermissionError):
        return "let its owner give you the right to write there"
    if isinstance(error, (IsADirectoryError, NotADirectoryError, FileExistsError)):
        return "move away what lies under this name"
    return _REMEDIES.get(error.errno or 0, "see that the disk, or its server, works")


def capitalised(text: str) -> str:
    """Return a text as the beginning of a sentence."""
    return text[:1].upper() + text[1:]


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, and what it came of."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            todo += [one.__context__, one.__cause__]
