"""Where the commands begin: what must hold before anything heavy is imported.

A signal ends the command with its exit code from the first moment on; the three standard streams are open, so no file
that is opened later takes the place of one; and what cannot be said on stderr ends nothing.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from types import FrameType
from typing import TextIO

STOPPED = "stopped: what was computed is kept; run the same command again to go on"


def prepare() -> None:
    """Make the process ready; a second call does nothing new."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, leave_at_once)
    _open_missing_streams()
    raw = getattr(sys.stdout, "buffer", None)
    if isinstance(raw, io.RawIOBase):  # PYTHONUNBUFFERED: what a full disk takes a part of would be lost, unsaid
        written = io.BufferedWriter(raw)
        sys.stdout = io.TextIOWrapper(written, encoding="utf-8", errors="backslashreplace", line_buffering=True)
    if _is_the_process_own(sys.stderr) and not isinstance(getattr(sys.stderr, "buffer", None), _Deaf):
        with contextlib.suppress(OSError, AttributeError):
            sys.stderr.flush()
        sys.stderr = io.TextIOWrapper(_Deaf(), encoding="utf-8", errors="backslashreplace", line_buffering=True)


def _is_the_process_own(stream: TextIO | None) -> bool:
    """Tell whether a stream is the process's standard error, and not what a caller put in its place."""
    try:
        return stream is None or stream.fileno() == 2
    except (OSError, ValueError):
        return False


def leave_at_once(signum: int, frame: FrameType | None) -> None:
    """End the process, while nothing is at stake: an exception could be lost in an import."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"{STOPPED}\n".encode())
    os._exit(128 + signum)


class _Deaf(io.RawIOBase):
    """Standard error; where it is full or closed, nobody hears, and the work goes on."""

    name = "<stderr>"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2

    def isatty(self) -> bool:
        return os.isatty(2)

    def write(self, data: bytes) -> int:  # type: ignore[override]
        left = memoryview(data)
        with contextlib.suppress(OSError):
            while left:
                left = left[os.write(2, left) :]
        return len(data)


def _open_missing_streams() -> None:
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            raw = io.FileIO(number, "r" if number == 0 else "w", closefd=False)
            buffered = io.BufferedReader(raw) if number == 0 else io.BufferedWriter(raw)
            setattr(sys, name, io.TextIOWrapper(buffered, encoding="utf-8"))


def extract() -> None:
    """Entry point of `mtdp-extract`."""
    prepare()
    from mtdp_runtime.commands.extract import main

    main()


def bench() -> None:
    """Entry point of `mtdp-bench`."""
    prepare()
    from mtdp_runtime.commands.bench import main

    main()


def doctor() -> None:
    """Entry point of `mtdp-doctor`."""
    prepare()
    from mtdp_runtime.commands.doctor import main

    main()


def view() -> None:
    """Entry point of `mtdp-view`."""
    prepare()
    from mtdp_runtime.commands.view import main

    main()
