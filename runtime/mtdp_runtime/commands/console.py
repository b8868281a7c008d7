"""What a person sees: progress on a terminal, plain lines elsewhere; errors as a line and a hint."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

import typer

from mtdp_runtime.commands import exit_codes
from mtdp_runtime.commands.entry import STOPPED, prepare
from mtdp_runtime.errors import RuntimeFailure, SlideError, UsageError

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)

# What Typer raises for a wrong command line: UsageError of the click that it carries or depends on.
_WRONG_OPTION: Final[type[Exception]] = typer.BadParameter.__bases__[0]
# What an output that nobody takes says: a pipe whose reader is gone, a full disk, a closed descriptor.
_UNHEARD: Final = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EBADF, errno.EIO)


def printable(text: object) -> str:
    r"""Return text for one line of a terminal: what would command the terminal, or reorder the line, is escaped.

    >>> printable("a\x1b[2J\n.svs")
    'a\\x1b[2J\\n.svs'
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
    """Return what a command that ended with this error exits with."""
    return exit_codes.FAILED if isinstance(error, SlideError) else exit_codes.REFUSED


class StoppedBySignal(BaseException):
    """SIGINT or SIGTERM came. Not a KeyboardInterrupt: the command-line library would answer that one itself."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def _stop(signum: int, frame: FrameType | None) -> None:
    for one in _SIGNALS:  # a second one must not disturb what the first one puts in order
        signal.signal(one, signal.SIG_IGN)
    raise StoppedBySignal(signum)


def work_begins() -> None:
    """From here on a signal is an exception, for something is at stake: rows, claims, copies."""
    for one in _SIGNALS:
        signal.signal(one, _stop)


def run_app(app: Callable[..., Any], begins_itself: bool = False) -> None:
    """Run a Typer app; a wrong option, an error of ours and a signal become a line, a hint and an exit code.

    `begins_itself`: it calls `work_begins`; until then a signal ends the process at once.
    """
    prepare()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may be no UTF-8
    if not begins_itself:
        work_begins()
    try:
        code = _code_of(app)
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in _UNHEARD or error.filename is not None:
            raise
        code = exit_codes.REFUSED
        if error.errno != errno.EPIPE:
            print(f"error: stdout cannot be written: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still to be written there has a place to go
    for one in _SIGNALS:
        signal.signal(one, signal.SIG_IGN)  # all is settled
    sys.exit(code)


def _code_of(app: Callable[..., Any]) -> int:
    try:
        _refuse_empty(sys.argv[1:])
        return int(app(standalone_mode=False) or 0)
    except _WRONG_OPTION as error:
        print_error(_in_our_words(error))
        return exit_codes.REFUSED
    except RuntimeFailure as error:
        print_error(error)
        return exit_code(error)
    except StoppedBySignal as stop:
        print(STOPPED, file=sys.stderr)
        return 128 + stop.signum


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Refuse an empty argument: for a path it would mean the current folder.

    Raises:
        UsageError: there is one.
    """
    for number, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if argument == "" or (equals and option.startswith("--") and value == ""):
            before = f" after {arguments[number - 1]}" if number and argument == "" else ""
            raise UsageError(
                f"argument {number + 1}{before} is empty" if argument == "" else f"{option} is empty",
                hint='Is a shell variable unset? A dot, ".", names the current folder.',
            )


def _in_our_words(error: Any) -> UsageError:
    """Return what the command-line library found wrong, as an error of ours.

    >>> str(_in_our_words(typer.BadParameter("'x' is not one of 'a', 'b'.", param_hint="'--c'")))
    "invalid value for '--c': 'x' is not one of 'a', 'b'"
    """
    text = error.format_message().replace("Value error, ", "").rstrip(".")
    return UsageError(f"{text[:1].lower()}{text[1:]}", hint=f"{Path(sys.argv[0]).name} --help explains each option.")


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
