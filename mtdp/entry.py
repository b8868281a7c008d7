"""Where `mtdp-train` begins: a signal ends it with its exit code before and after anything heavy is imported.

What trains saves its state first (`run_state.waiting_signals`); all else is written whole or not at all, so there is
nothing that an exception would have to put in order, and an exception could be lost in an import.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from types import FrameType

# What an output that nobody takes says: a pipe whose reader is gone, a full disk, a closed descriptor.
_UNHEARD = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EBADF, errno.EIO)


ENGINE_THREAD = "engine"  # computes what a foreign model asks for


def leave_at_once(signum: int, frame: FrameType | None) -> None:
    """End the process."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, b"stopped\n")
    os._exit(128 + signum)


def main() -> None:
    """Entry point of `mtdp-train`."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, leave_at_once)
    from mtdp.cli import main

    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.errno not in _UNHEARD or error.filename is not None:
            raise
        if error.errno != errno.EPIPE:
            os.write(2, f"error: stdout cannot be written: {error.strerror}\n".encode())
        os._exit(2)
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # the library's own end, with a code of another meaning
            os._exit(2)
        if any(thread.name == ENGINE_THREAD for thread in threading.enumerate()):
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)  # it computes for ever, and would crash at the end
        raise
