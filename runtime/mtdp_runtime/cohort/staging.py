"""Slides on slow storage, copied to a local disk while the slide before is worked on: one ahead, and no more.

Each run has a folder of its own, held by a lock that dies with the process. What a killed run left is removed by the
next.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any, Final, Self

from mtdp_runtime.cohort import remote
from mtdp_runtime.cohort.servers import TransferFailed
from mtdp_runtime.errors import SlideError, UsageError
from mtdp_runtime.slide import mirax, zarr_folder
from mtdp_runtime.slide.identity import hint_of, parts_of
from mtdp_runtime.urls import SlideUrl

PREFIX: Final = "mtdp-stage-"
_LOCK: Final = "lock"
_PIECE_BYTES: Final = 8 << 20
_SPARE_BYTES: Final = 64 << 20  # left free on the disk


IsDone = Callable[[str], bool]  # given what is stated of a slide, says whether it need not be copied


class _Stopped(Exception):
    """The run ends."""


@dataclass(slots=True)
class _Copy:
    """One slide on its way. Where it failed, `path` is the slide's own and `reason` says why."""

    slide: Path
    folder: Path
    path: Path
    reason: str = ""
    hint: str = ""
    failure: TransferFailed | None = None  # where that is why
    lacked_space: bool = False
    is_done: IsDone | None = None
    stated: str = ""
    needed: bool = True
    copied_bytes: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None


class Staging:
    """A context manager: leaving removes all copies, also on an error, an interrupt and SIGTERM."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        """Make this run's folder and remove those of runs that died.

        Raises:
            UsageError: the folder cannot be used.
        """
        self._say = say
        self._copies: dict[Path, _Copy] = {}
        self._number = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_dead(folder)
            self._folder, self._lock = _own_folder(folder)
        except OSError as error:
            raise UsageError(
                f"--stage {folder}: cannot be used: {error.strerror}", hint="Name a folder on a local disk."
            ) from error
        # Python gives signals to its main thread; a caller in another one, or with a handler, has its own way to end.
        self._in_main = threading.current_thread() is threading.main_thread()
        self._in_main = self._in_main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        self._before = signal.signal(signal.SIGTERM, _leave) if self._in_main else None

    def begin(self, slide: Path, is_done: IsDone | None = None) -> None:
        """Start to copy a slide, where it is not under way; `is_done` is asked first, in a thread."""
        if slide in self._copies:
            return
        self._number += 1
        copy = _Copy(slide, self._folder / str(self._number), slide, is_done=is_done)
        self._copies[slide] = copy
        copy.thread = threading.Thread(target=_run, args=(copy,), name="mtdp-stage", daemon=True)
        copy.thread.start()

    def wait(self, slide: Path, beat: Callable[[], None]) -> Path | None:
        """Return where to read a slide that was begun: its copy, or the slide itself, with the reason said.

        None where it is done. `beat` is called while bytes arrive.

        Raises:
            TransferFailed: the slide lies behind a URL and could not be fetched; nothing of it is left here.
        """
        copy = self._arrived(slide, beat)
        if copy.reason and isinstance(slide, SlideUrl):
            retried = copy.lacked_space  # the slide before it was still here
            self.remove(slide)
            if retried:
                self.begin(slide, copy.is_done)
                copy = self._arrived(slide, beat)
            if copy.reason:
                self.remove(slide)
                raise copy.failure or TransferFailed(copy.reason, copy.hint)
        if copy.reason:
            self._say(f"{slide}: read in place, not staged: {copy.reason}")
        return copy.path if copy.needed else None

    def stated(self, slide: Path) -> str:
        """Return what is stated of a slide that has come: by its server, or by the disk; empty where nothing is."""
        return self._copies[slide].stated

    def _arrived(self, slide: Path, beat: Callable[[], None]) -> _Copy:
        copy, seen = self._copies[slide], -1
        assert copy.thread is not None
        while copy.thread.is_alive():
            copy.thread.join(0.2)
            if copy.copied_bytes != seen:
                seen = copy.copied_bytes
                beat()
        return copy

    def remove(self, slide: Path) -> None:
        """Remove the copy of a slide."""
        copy = self._copies.pop(slide, None)
        if copy is not None and copy.thread is not None:
            copy.stop.set()
            copy.thread.join()
            shutil.rmtree(copy.folder, ignore_errors=True)

    def keep_only(self, slides: set[Path]) -> None:
        """Remove the copies of all others."""
        for slide in set(self._copies) - slides:
            self.remove(slide)

    def close(self) -> None:
        self.keep_only(set())
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()
        if self._in_main:
            signal.signal(signal.SIGTERM, self._before)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _run(copy: _Copy) -> None:
    try:
        if isinstance(copy.slide, SlideUrl):
            _fetch(copy, copy.slide)
            return
        slide = mirax.with_its_folder(copy.slide)
        copy.stated = hint_of(copy.slide) if copy.is_done is not None else ""
        if not _needed(copy):
            return
        parts = parts_of(slide)
        if not parts:
            copy.reason = "its format names files that are not known here"
            return
        files = [one for part in parts for one in ((part,) if part.is_file() else sorted(part.rglob("*")))]
        files = [one for one in files if one.is_file()]
        root = parts[0].parent
        if not _fits(copy, sum(one.stat().st_size for one in files)):
            return
        for one in files:
            _copy_file(copy, one, copy.folder / one.relative_to(root))
        of_a_series = slide.is_dir() and not zarr_folder.is_zarr(slide)
        copy.path = copy.folder if of_a_series else copy.folder / slide.name
    except _Stopped:
        pass
    except (OSError, SlideError) as error:
        shutil.rmtree(copy.folder, ignore_errors=True)
        copy.reason = getattr(error, "strerror", None) or str(error)
        if isinstance(copy.slide, SlideUrl) and isinstance(error, OSError):
            copy.reason = f"{copy.slide}: cannot be written to the staging folder: {copy.reason}"
        copy.hint = getattr(error, "hint", "")
        copy.failure = error if isinstance(error, TransferFailed) else None


def _needed(copy: _Copy) -> bool:
    copy.needed = copy.is_done is None or not copy.is_done(copy.stated)
    return copy.needed


def _fits(copy: _Copy, needed: int) -> bool:
    free = shutil.disk_usage(copy.folder.parent).free
    if needed + _SPARE_BYTES <= free:
        return True
    copy.lacked_space = True
    copy.reason = f"it needs {needed / 1e9:.2f} GB of {free / 1e9:.2f} GB that are free"
    return False


def _fetch(copy: _Copy, url: SlideUrl) -> None:
    def arrived(count: int) -> None:
        if copy.stop.is_set():
            raise _Stopped
        copy.copied_bytes += count

    files = remote.files_of(url)
    facts = [remote.facts_of(one, arrived) for one, _ in files]
    copy.stated = remote.in_one(facts)
    if not _needed(copy):
        return
    if not _fits(copy, sum(size for size, _ in facts)):
        copy.reason, copy.hint = f"{url}: {copy.reason}", "Name a larger disk with --stage."
        return
    for number, (one, name) in enumerate(files):
        (copy.folder / name).parent.mkdir(parents=True, exist_ok=True)
        facts[number] = remote.fetch(one, copy.folder / name, arrived)
    copy.stated = remote.in_one(facts)
    copy.path = copy.folder / url.name


def _copy_file(copy: _Copy, source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reading, target.open("xb") as writing:
        while piece := reading.read(_PIECE_BYTES):
            if copy.stop.is_set():
                raise _Stopped
            writing.write(piece)
            copy.copied_bytes += len(piece)


def _own_folder(folder: Path) -> tuple[Path, IO[Any]]:
    """Make a folder that no other run takes for a dead one: its lock is held, and it is still there."""
    while True:
        own = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
        lock: IO[Any] = (own / _LOCK).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (own / _LOCK).exists():
                return own, lock
        except BlockingIOError:
            pass  # another run has just started, has found the lock free, and is removing this folder
        except OSError:
            lock.close()
            raise
        lock.close()


def _remove_dead(folder: Path) -> None:
    """Remove the folders of this user's runs whose owners are dead; never what a link of such a name leads to."""
    for one in folder.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            found = one.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            with os.fdopen(os.open(one / _LOCK, os.O_RDWR | os.O_NOFOLLOW), "r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its owner is dead
                shutil.rmtree(one, ignore_errors=True)


def _leave(signum: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # full, closed, or just being written to
        sys.stdout.flush()
    raise SystemExit(128 + signum)
