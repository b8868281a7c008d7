"""run.jsonl: a line that says what a run is, and one line per slide, appended by any number of processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from mtdp_runtime.errors import OutputUnwritable
from mtdp_runtime.faults import capitalised, remedy
from mtdp_runtime.urls import SlideUrl, is_url, without_secrets
from mtdp_runtime.version import __version__

NAME: Final = "run.jsonl"
_MOST_CHARACTERS: Final = 300  # of a message or a hint, where it is repeated


def _now() -> str:
    """Return the time in UTC as ISO 8601 writes it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True, slots=True)
class RunMark:
    """What tells a run from the others of its folder; workers that follow one another share it."""

    arguments: Sequence[str] | str = "api"  # the command line; "api" for a call from Python
    options: Mapping[str, Any] = field(default_factory=dict)  # each by its long name: of the line, the run file, ours
    run: str = field(default_factory=lambda: secrets.token_hex(6))
    started: str = field(default_factory=_now)
    host: str = field(default_factory=socket.gethostname)

    def begin(self, out: Path, models: Sequence[Mapping[str, Any]]) -> None:
        """Append the line that says what this run is; it has no key `slide`.

        Raises:
            OutputUnwritable: the folder cannot be written.
        """
        facts: dict[str, Any] = {"run": self.run, "started": self.started, "host": self.host, "version": __version__}
        said = self.arguments
        said = said if isinstance(said, str) else [without_secrets(one) for one in said]
        facts |= {"arguments": said} | ({"options": self.options} if self.options else {})
        append(out, facts | {"models": list(models)})

    def append(self, out: Path, line: Mapping[str, Any]) -> None:
        """Append the line of a slide, with the time, the host and its process, and the run.

        Raises:
            OutputUnwritable: the folder cannot be written.
        """
        append(out, {**line, "time": _now(), "host": self.host, "pid": os.getpid(), "run": self.run})


def append(out: Path, line: Mapping[str, Any]) -> None:
    """Append a line in one write, under a lock where the file system has locks.

    O_APPEND alone keeps lines apart on a local disk; between the clients of a network share the lock does.

    Raises:
        OutputUnwritable: the folder cannot be written.
    """
    # A file name that is no UTF-8 holds surrogates; escaped like this they are JSON and read back as they were.
    text = json.dumps(line, ensure_ascii=False) + "\n"
    data = text.encode("utf-8", errors="backslashreplace")
    path = out / NAME
    try:
        # Not through a link that somebody put there, and without waiting for the reader of a pipe.
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        file = os.open(path, flags, 0o666)
        try:
            _must_be_a_file(file)
            with contextlib.suppress(OSError):
                fcntl.lockf(file, fcntl.LOCK_EX)
            size_bytes = os.fstat(file).st_size
            if size_bytes and os.pread(file, 1, size_bytes - 1) != b"\n":
                data = b"\n" + data  # a full disk tore the last line: it must not swallow this one
            while data:
                data = data[os.write(file, data) :]
        finally:
            os.close(file)  # which unlocks
    except OSError as error:
        raise _unwritable(path, error) from error


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other processes from appending, and from this, where the file is there and its file system has locks.

    What is done meanwhile must not append: a process loses its lock when it closes the file.
    """
    with contextlib.ExitStack() as opened:
        with contextlib.suppress(OSError):
            file = os.open(out / NAME, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            opened.callback(os.close, file)
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def check(out: Path) -> None:
    """Make sure, before any work, that lines can be appended; makes nothing.

    Raises:
        OutputUnwritable: what is there is no file, or may not be written.
    """
    try:
        file = os.open(out / NAME, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unwritable(out / NAME, error) from error
    try:
        _must_be_a_file(file)
    except OSError as error:
        raise _unwritable(out / NAME, error) from error
    finally:
        os.close(file)


def _must_be_a_file(file: int) -> None:
    if not stat.S_ISREG(os.fstat(file).st_mode):
        raise OSError(errno.EINVAL, "it is not a file")


def _unwritable(path: Path, error: OSError) -> OutputUnwritable:
    what = "it is a link" if error.errno == errno.ELOOP else error.strerror
    return OutputUnwritable(
        f"{path}: cannot be written: {what}",
        hint=f"{capitalised(remedy(error))}, or choose another --out.",
    )


def absolute(path: str | Path) -> str:
    """Return what names a slide whatever folder a run is started in; links are left alone, nothing is looked up."""
    if isinstance(path, SlideUrl):
        return str(path)  # of an object that was listed, ? is a part of its name
    if is_url(path):
        return without_secrets(str(path))
    return os.path.normpath(Path(path).absolute())


def read(out: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a folder's run.jsonl in their order, if there is one; what is no line of ours is skipped."""
    try:
        if not (out / NAME).is_file():
            return
        lines = (out / NAME).read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the torn last line of a machine that lost power
        if isinstance(line, dict):
            yield line


def failures(out: Path) -> dict[str, dict[str, Any]]:
    """Return the lines of slides whose last attempt failed, by attempt."""
    last: dict[str, dict[str, dict[str, Any]]] = {}  # slide -> attempt -> line
    for line in read(out):
        try:
            if "slide" not in line:
                continue  # the line of a run
            slide, attempt, failed = absolute(line["slide"]), line.get("attempt", ""), line["status"] == "failed"
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if failed and attempt:
            last.setdefault(slide, {})[attempt] = line
        elif not failed:
            last.pop(slide, None)
    return {attempt: line for lines_of in last.values() for attempt, line in lines_of.items()}


def counts(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the end of a run says of a slide: what `totals` adds up, and why it failed."""
    numbers = ("tiles", "bad_tiles", "seconds", "tiles_before")
    short: dict[str, Any] = {"status": line["status"]} | {name: line[name] for name in numbers if line.get(name)}
    if line["status"] == "failed":
        # Cut, for it goes through a pipe, whose writes are whole up to 4096 bytes.
        short |= {name: str(line.get(name, ""))[:_MOST_CHARACTERS] for name in ("message", "hint")}
    return short


def totals(lines: Sequence[Mapping[str, Any]]) -> str:
    """Say what a run did in all, from the counts of its slides.

    The rate is of the tiles that this run computed, and not of those that an earlier one did.

    >>> totals([{"status": "done", "tiles": 900, "bad_tiles": 4, "seconds": 30.0}, {"status": "no-tissue"}])
    '900 tiles in 30.0 s, 30.0 tiles/s, 1 without tissue, 4 bad tiles'
    >>> totals([{"status": "done", "tiles": 900, "seconds": 10.0, "tiles_before": 600}, {"status": "skipped"}])
    '300 tiles in 10.0 s, 30.0 tiles/s, 600 tiles were there already, 1 slide was done already'
    """
    numbers = ("tiles", "bad_tiles", "tiles_before")
    tiles, bad, before = (sum(line.get(name, 0) for line in lines) for name in numbers)
    # Checks of finished slides take their time, and compute no tile of this run.
    seconds = sum(line.get("seconds", 0) for line in lines if line["status"] != "skipped")
    tiles = max(0, tiles - before)
    already = sum(line["status"] == "skipped" for line in lines)
    empty = sum(line["status"] == "no-tissue" for line in lines)
    parts = [f"{tiles} tiles in {seconds:.1f} s"]
    parts += [f"{tiles / seconds:.1f} tiles/s"] if seconds > 0 and tiles else []
    parts += [f"{before} tiles were there already"] if before else []
    parts += [f"{already} slide{'s were' if already > 1 else ' was'} done already"] if already else []
    parts += [f"{empty} without tissue"] if empty else []
    parts += [f"{bad} bad tiles"] if bad else []
    return ", ".join(parts)
