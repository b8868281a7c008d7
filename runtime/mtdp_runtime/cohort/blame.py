"""Whose fault it is that a slide failed: only what the slide's own bytes did is remembered against it.

The evidence is two openings that find something wrong with the content, while the file could be read in between. What
the system says of a read is tried again for some seconds, and then fails the slide for this run alone.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from mtdp_runtime.errors import NothingFinite, OutputUnwritable, SlideError, StorageFailed
from mtdp_runtime.extraction.outcome import Outcome
from mtdp_runtime.faults import RETRY_AFTER_S, Fault, system_fault
from mtdp_runtime.files import writable_folder
from mtdp_runtime.slide.identity import parts_of

_LOOKED_AT: Final = 64  # places of a file
_LOOK_BYTES: Final = 1 << 16
_LOOKED_AT_FILES: Final = 64  # of a slide of many
_TICK_S: Final = 0.25
_RIGHTS: Final = (os.strerror(errno.EACCES), os.strerror(errno.EPERM))
# What is wrong with a name, or with what lies under it; all else (a full disk) is wrong with the folder.
_OF_A_NAME: Final = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP),
        *(errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO, errno.EBUSY, errno.ETXTBSY, errno.EILSEQ),
    }
)


@dataclass(slots=True)
class Evidence:
    """What was found at the openings of one slide so far."""

    path: Path
    contents: int = 0  # openings that found the content wrong
    waits_s: list[float] = field(default_factory=lambda: list(RETRY_AFTER_S))
    fault: Fault | None = None  # the last error's, where the system said it

    def try_again(self, error: Exception, beat: Callable[[], None]) -> bool:
        """Say whether the slide is opened once more; waits before, where the storage may come back."""
        self.fault = None
        if isinstance(error, NothingFinite):
            return False
        if isinstance(error, StorageFailed):  # it waited already: once more, with nothing open
            self.waits_s = self.waits_s[:1]
        self.fault = system_fault(error) or read_fault(self.path)
        if self.fault is None:
            self.contents += 1
            return self.contents < 2
        if not (self.fault.passing and self.waits_s):
            return False
        _wait(self.waits_s.pop(0), beat)
        return True

    def is_the_slides(self) -> bool:
        """Say whether all evidence is against the slide."""
        return self.contents >= 2 and self.fault is None


def in_words(message: str, hint: str, fault: Fault) -> tuple[str, str]:
    """Return the message and the hint for a slide that failed by what the system said."""
    if fault.reason == os.strerror(errno.ENOENT) and hint:
        return message, hint
    if fault.reason not in message:
        message = f"{message} ({fault.reason})"
    if fault.reason in _RIGHTS:
        return message, "You may not read it: ask its owner, or chmod. The next run tries it again."
    return message, "The system said so, not the slide's content. The next run tries it again."


def as_said(outcome: Outcome, error: Exception, path: Path) -> Outcome:
    """Return the outcome of a slide in the words of what the system said, where it said anything."""
    fault = system_fault(error) or read_fault(path)
    if fault is None:
        return outcome
    message, hint = in_words(outcome.message, outcome.hint, fault)
    return replace(outcome, message=message, hint=hint)


def is_of_one_slide(error: Exception, folders: Sequence[Path]) -> bool:
    """Say whether output could not be written for what lies under this slide's names, and others' can be."""
    cause = error.__cause__
    if not (isinstance(error, OutputUnwritable) and isinstance(cause, OSError) and cause.errno in _OF_A_NAME):
        return False
    try:
        for folder in folders:
            writable_folder(folder)
    except OutputUnwritable:
        return False
    return True


def read_fault(path: Path) -> Fault | None:
    """Read a slide's files here and there; return what the system says, where it gives no bytes."""
    try:
        if not path.exists():
            path.stat()
        for part in parts_of(path)[:_LOOKED_AT_FILES] or (path,):
            if stat.S_ISREG(part.stat().st_mode):
                _look_at(part)
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        return system_fault(error)
    except SlideError:
        return None
    return None


def _look_at(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        size = os.fstat(file).st_size
        for place in range(_LOOKED_AT):
            os.pread(file, _LOOK_BYTES, max(0, size - _LOOK_BYTES) * place // (_LOOKED_AT - 1))
            if size <= _LOOK_BYTES:
                break
    finally:
        os.close(file)


def _wait(seconds: float, beat: Callable[[], None]) -> None:
    until_s = time.monotonic() + seconds
    while (left_s := until_s - time.monotonic()) > 0:
        beat()
        time.sleep(min(left_s, _TICK_S))
