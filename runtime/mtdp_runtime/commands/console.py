"""What a person sees: progress on a terminal, plain lines elsewhere; errors as a line and a hint."""

from __future__ import annotations

import io
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mtdp_runtime.errors import RuntimeFailure, UsageError

EXIT_FAILED = 1
EXIT_USAGE = 2


def printable(text: object) -> str:
    """Return text for one line of a terminal: what would command the terminal, or reorder the line, is escaped.

    >>> printable("a\\x1b[2J\\n.svs")
    'a\\\\x1b[2J\\\\n.svs'
    """
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else ascii(c)[1:-1] for c in str(text))


def print_error(error: RuntimeFailure) -> None:
    """Print what happened and what to do, one line each, to stderr."""
    print(f"error: {printable(error)}", file=sys.stderr)
    if error.hint:
        print(f"hint: {printable(error.hint)}", file=sys.stderr)


def note(text: str) -> None:
    """Say what is not an error, and that one should know."""
    print(f"note: {printable(text)}", file=sys.stderr)


def exit_code(error: RuntimeFailure) -> int:
    return EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED


class StoppedBySignal(BaseException):
    """SIGINT or SIGTERM came. Not a KeyboardInterrupt: the command-line library would answer that one itself."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def _stop(signum: int, frame: FrameType | None) -> None:
    raise StoppedBySignal(signum)


def run_app(app: Callable[..., Any]) -> None:
    """Run a Typer app; an error of ours becomes a line, a hint and an exit code; so does a signal."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may be no UTF-8
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    try:
        app()
    except RuntimeFailure as error:
        print_error(error)
        sys.exit(exit_code(error))
    except StoppedBySignal as stop:
        print("stopped: what was computed is kept; run the same command again to go on", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except BrokenPipeError:
        sys.exit(EXIT_FAILED)


@contextmanager
def tile_progress(name: str, total: int, shown: bool, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a bar with tiles/s and the time left, on a terminal; yields a function that takes the tiles just done.

    `done` is how many of them an earlier run did.
    """
    if not shown or not sys.stderr.isatty() or not total:
        yield lambda tiles: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(printable(name), total=total, completed=done, rate="")

        def advance(tiles: int) -> None:
            bar.advance(task, tiles)
            speed = bar.tasks[0].speed
            bar.update(task, rate=f"{speed:.0f} tiles/s" if speed else "")

        yield advance
