"""The one door to the terminal: every line that a command prints goes through here.

What would command the terminal is escaped here, so no name of a slide or a model can; colour, `-q` and `-v` are decided
here, and the status line steps aside for the others.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final, Protocol, TextIO, cast

import typer

from mtdp_runtime.commands import exit_codes
from mtdp_runtime.commands.entry import STOPPED, prepare
from mtdp_runtime.errors import RuntimeFailure, SlideError, UsageError
from mtdp_runtime.printable import printable

# What Typer raises for a wrong command line: UsageError of the click that it carries or depends on.
_WRONG_OPTION: Final[type[Exception]] = typer.BadParameter.__bases__[0]
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
# What an output that nobody takes says: a pipe whose reader is gone, a full disk, a closed descriptor.
_UNHEARD: Final = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EBADF, errno.EIO)
_RED: Final = "31"
_YELLOW: Final = "33"
_CYAN: Final = "36"
_CLEAR_LINE: Final = "\r\x1b[K"
_LOCK: Final = threading.RLock()


@dataclass(slots=True)
class _State:
    quiet: bool = False
    verbose: bool = False
    status: str = ""  # the line that stands at the bottom of the terminal now


_STATE: Final = _State()


def set_voice(*, quiet: bool | None = None, verbose: bool | None = None) -> None:
    """Decide how much is said: `-q` leaves failures, warnings and results, `-v` adds reasons."""
    _STATE.quiet = _STATE.quiet if quiet is None else quiet
    _STATE.verbose = _STATE.verbose if verbose is None else verbose


def is_quiet() -> bool:
    """Say whether `-q` was given."""
    return _STATE.quiet


def say(text: object) -> None:
    """Print a line of progress to stdout; `-q` silences it."""
    if not _STATE.quiet:
        _put(sys.stdout, "", text)


def detail(text: object) -> None:
    """Print a line that only `-v` asks for, to stderr: the reason of what was said."""
    if _STATE.verbose:
        _put(sys.stderr, "", text)


def result(text: object) -> None:
    """Print a line of what the command was called for to stdout: always."""
    _put(sys.stdout, "", text)


def result_json(value: Any, indent: int | None = None) -> None:
    """Print a JSON document to stdout; everything but printable ASCII is escaped in it, as JSON escapes."""
    for line in json.dumps(value, indent=indent).splitlines():
        _put(sys.stdout, "", line)


def note(text: object) -> None:
    """Say what is not an error, and that one should know."""
    if not _STATE.quiet:
        _put(sys.stderr, "note: ", text, _CYAN)


def warn(text: object) -> None:
    """Say what is done, and should be looked at."""
    _put(sys.stderr, "warning: ", text, _YELLOW)


def trouble(label: str, text: object) -> None:
    """Print what went wrong to stderr, after a label such as `failed: `."""
    _put(sys.stderr, label, text, _RED)


def hint(text: object, indent: str = "") -> None:
    """Print what to do about it, where anything is known."""
    if str(text):
        _put(sys.stderr, f"{indent}hint: ", text, _CYAN)


def progress(text: object) -> None:
    """Print a line of progress to stderr, where no terminal could show a status line."""
    if not _STATE.quiet:
        _put(sys.stderr, "", text)


def print_error(error: RuntimeFailure) -> None:
    """Print what happened and what to do, one line each, to stderr."""
    trouble("error: ", error)
    hint(error.hint)


def is_terminal(stream: TextIO | None) -> bool:
    """Say whether a person sees this stream on a terminal that can move its cursor."""
    return stream is not None and not stream.closed and stream.isatty() and os.environ.get("TERM") != "dumb"


def columns() -> int:
    """Return the width of the terminal."""
    return shutil.get_terminal_size((80, 24)).columns


def set_status(text: str) -> None:
    """Show a line at the bottom of the terminal in place of the one before; an empty one removes it."""
    with _LOCK:
        if text == _STATE.status or not is_terminal(sys.stderr):
            return
        _STATE.status = printable(text)
        _write(sys.stderr, _CLEAR_LINE + _STATE.status)


def _put(stream: TextIO | None, label: str, text: object, colour: str = "") -> None:
    """Write one line: `label` in a colour where the terminal has it, then the text, escaped."""
    label = printable(label)
    if label and colour and is_terminal(stream) and not os.environ.get("NO_COLOR"):
        label = f"\x1b[{colour}m{label}\x1b[0m"
    with _LOCK:
        if _STATE.status:
            _write(sys.stderr, _CLEAR_LINE)
        _write(stream, f"{label}{printable(text)}\n")
        if _STATE.status:
            _write(sys.stderr, _STATE.status)


def _write(stream: TextIO | None, text: str) -> None:
    if stream is not None:  # a process may be started with a closed stdout or stderr
        stream.write(text)
        stream.flush()


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


class OwnError(Protocol):
    """An error of another package, of the same form as ours."""

    hint: str
    exit_code: int


def run_app(
    app: Callable[..., Any],
    name: str = "",
    begins_itself: bool = False,
    own_errors: tuple[type[Exception], ...] = (),
) -> None:
    """Run a Typer app; a wrong option, an error of ours and a signal become a line, a hint and an exit code.

    `name` is the command's, where it may have been started by another: `python -m` names a file. `begins_itself`: it
    calls `work_begins`; until then a signal ends the process at once. `own_errors` are the command's own, each an
    `OwnError`.
    """
    prepare()
    name = name or Path(sys.argv[0]).name
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may be no UTF-8
    if not begins_itself:
        work_begins()
    try:
        code = _code_of(app, name, own_errors)
        set_status("")
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in _UNHEARD or error.filename is not None:
            raise
        code = exit_codes.REFUSED
        if error.errno != errno.EPIPE:
            trouble("error: ", f"stdout cannot be written: {error.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still to be written there has a place to go
    for one in _SIGNALS:
        signal.signal(one, signal.SIG_IGN)  # all is settled
    sys.exit(code)


def _code_of(app: Callable[..., Any], name: str, own_errors: tuple[type[Exception], ...]) -> int:
    try:
        _refuse_empty(sys.argv[1:])
        return int(app(standalone_mode=False, prog_name=name) or 0)
    except _WRONG_OPTION as error:
        print_error(_in_our_words(error, name))
        return exit_codes.REFUSED
    except RuntimeFailure as error:
        set_status("")
        print_error(error)
        return exit_code(error)
    except own_errors as error:
        own = cast("OwnError", error)
        trouble("error: ", error)
        hint(own.hint)
        return own.exit_code
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # the library's own end, with a code of another meaning
            raise end.__context__ from None
        raise
    except StoppedBySignal as stop:
        set_status("")
        trouble("", STOPPED)
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


def _in_our_words(error: Any, name: str) -> UsageError:
    """Return what the command-line library found wrong, as an error of ours.

    >>> str(_in_our_words(typer.BadParameter("'x' is not one of 'a', 'b'.", param_hint="'--c'"), "mtdp-x"))
    "invalid value for '--c': 'x' is not one of 'a', 'b'"
    """
    text = error.format_message().replace("Value error, ", "").rstrip(".")
    return UsageError(f"{text[:1].lower()}{text[1:]}", hint=f"{name} --help explains each option.")
