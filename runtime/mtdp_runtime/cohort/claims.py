"""Which process works on which slide, where several share an output folder.

A claim is a file that is made with O_EXCL, so one process alone makes it; its owner touches it every few seconds.
Nobody removes a dead claim to take its place, for two could do so at once: it is outnumbered by the next, `NAME.2`
after `NAME.1`, and that file, too, can be made only once. Who made it looks at the dead ones again before it begins.

Assumed of the file system: O_EXCL is atomic (local disks; NFS from version 3 and Linux 2.6.5 on), a rename is atomic,
and opening a file shows its times as the server has them (close-to-open consistency). Clocks need not agree: ages are
differences between times that the file server set.

A claim of another container on this machine (its own process ids) is known to be dead where the kernel is the same, the
mounted file system is the same, and the lock that its owner held on it is gone: the kernel took it away with the
process. Locks decide nothing else, and nothing depends on them where there are none.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Self

from mtdp_runtime.errors import BackendError, OutputUnwritable

FOLDER: Final = ".claims"
BEAT_S: Final = 15.0
# Beats that nobody saw for this long mean that the owner is gone. An NFS client may cache times for a minute.
EXPIRES_S: Final = 120.0
_MOST_BYTES: Final = 1 << 16
_LOCK_TRIES: Final = 100
_WRITTEN_S: Final = 3.0  # a claim is written right after it was made


@dataclass(frozen=True, slots=True)
class Held:
    """Another process has the slide."""

    by: str
    beat: str = field(default="", compare=False)  # of an owner that cannot be seen from here: changes while it lives


class Claim:
    """A slide that is ours; leaving gives it back."""

    def __init__(self, folder: Path, name: str, number: int, lock: int = -1) -> None:
        self._lock = lock
        self.path = folder / f"{name}.{number}"
        self._successor = folder / f"{name}.{number + 1}"
        self._earlier = [folder / f"{name}.{i}" for i in range(number - 1, 0, -1)]
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="mtdp-claim", daemon=True)
        try:
            self._heart.start()
        except RuntimeError as error:  # no memory or no right for one more thread
            with contextlib.suppress(OSError):
                self.path.unlink()
            raise BackendError(
                f"the system gives no more threads: {error}",
                hint="Raise the limit of processes or of memory (ulimit -u, -v; the container's), or use fewer "
                "--threads.",
            ) from error

    def lost(self) -> bool:
        """Say whether another process took over, because this one was asleep for too long."""
        return self._successor.exists() or not self.path.exists()

    def release(self) -> None:
        self._released.set()
        self._heart.join()
        # Ours last, and from the top: while it stands, who makes a lower number sees it and withdraws.
        for path in (*self._earlier, self.path):
            with contextlib.suppress(OSError):
                path.unlink()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()  # the last one out; it fails while others hold claims

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


def claim(out: Path, name: str) -> Claim | Held:
    """Claim the slide whose output is called `name`, or say who has it.

    Raises:
        OutputUnwritable: the folder cannot be written, or what has the claim's name is none.
    """
    folder = out / FOLDER
    try:
        if folder.is_symlink():
            raise OSError(errno.ELOOP, "it is a link")
        return _claim(out, folder, name)
    except OSError as error:
        path = Path(error.filename) if isinstance(error.filename, str) else folder / name
        raise _unwritable(path, error) from error


def _claim(out: Path, folder: Path, name: str) -> Claim | Held:
    dead: list[Path] = []
    while True:
        path, lock = folder / f"{name}.{len(dead) + 1}", -1
        try:
            lock = _make(path)
            after = _owner_or_gone(folder / f"{name}.{len(dead) + 2}")
            if not after and all(_living_owner(one) is None for one in dead):
                # What stands after ours was left by a process that died while it gave its claim back.
                (folder / f"{name}.{len(dead) + 2}").unlink(missing_ok=True)
                mine, lock = Claim(folder, name, len(dead) + 1, lock), -1
                return mine
            path.unlink()
            if after:
                return after
            dead = []
        except FileExistsError:
            owner = _owner_or_gone(path)
            if owner is None:
                dead.append(path)
            elif owner:
                return owner
            else:
                dead = []
        except FileNotFoundError:
            # The folder is not there yet, or was removed by the last one out; or a dead claim was cleared away.
            path.unlink(missing_ok=True)
            dead = []
            _make_folder(out)
        finally:
            if lock >= 0:
                os.close(lock)


def seems_held(out: Path, name: str) -> bool:
    """Say whether somebody has claimed a slide: at a glance, so it may be a process that is gone."""
    try:
        return any(path.name.rpartition(".")[0] == name for path in (out / FOLDER).iterdir())
    except OSError:
        return False


def _owner_or_gone(path: Path) -> Held | Literal[""] | None:
    """Return who holds a claim, None where it is dead, and nothing ("") where it was just given back."""
    try:
        return _living_owner(path)
    except FileNotFoundError:
        return ""


def _make_folder(out: Path) -> None:
    try:
        out.joinpath(FOLDER).mkdir(exist_ok=True)
    except OSError as error:
        raise _unwritable(out, error) from error


def _make(path: Path) -> int:
    """Make and write a claim; return its descriptor, which holds the lock on it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        owner: dict[str, Any] = {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid()}
        owner |= {"born": _born("self")}
        if _locked(file, fcntl.LOCK_EX):
            owner["lock"] = _kernel_and_mount(file)
        text = json.dumps(owner).encode()
        while text:
            text = text[os.write(file, text) :]
    except BaseException:
        os.close(file)
        raise
    return file


def _locked(file: int, kind: int) -> bool:
    """Lock an open file; others hold it for a moment when they look."""
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:  # no locks here
            return False
        else:
            return True
    return False


def _kernel_and_mount(file: int) -> str:
    """Return what two processes that share a table of locks have in common; empty where that is not known."""
    boot = _boot()
    return f"{boot} {os.fstat(file).st_dev}" if boot else ""


def _living_owner(path: Path) -> Held | None:
    """Return who holds a claim, or None where it is dead.

    Raises:
        FileNotFoundError: it was given back.
        OSError: what has its name is no claim.
    """
    give_up_s = time.monotonic() + _WRITTEN_S
    while True:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            facts = os.fstat(file)
            if not stat.S_ISREG(facts.st_mode):
                raise OSError(errno.EINVAL, "it is not a file", str(path))
            owner = _read_owner(file)
            lock_is_gone = bool(owner.get("lock")) and owner["lock"] == _kernel_and_mount(file) and _is_free(file)
            host, machine, pid, born = owner["host"], owner["machine"], int(owner["pid"]), owner["born"]
            break
        except (ValueError, KeyError, TypeError, AttributeError):
            # Made, and not yet written; or its owner died in between.
            if time.monotonic() > give_up_s:
                return None
            time.sleep(_WRITTEN_S / 100)
        finally:
            os.close(file)
    if machine == _machine():
        return Held(f"process {pid}") if _born(str(pid)) == born else None
    # A heartbeat of the future is of before the clock was set back; one that lives comes again.
    if lock_is_gone or abs(_now(path) - facts.st_mtime) >= EXPIRES_S:
        return None
    return Held(f"process {pid} on {host}", f"{facts.st_ino} {facts.st_mtime_ns}")


def _read_owner(file: int) -> dict[str, Any]:
    owner: dict[str, Any] = json.loads(os.read(file, _MOST_BYTES))
    return owner


def _is_free(file: int) -> bool:
    """Say whether nobody holds the lock that a claim's owner took; where there are no locks, somebody may."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    fcntl.flock(file, fcntl.LOCK_UN)
    return True


def _now(path: Path) -> float:
    """Return the file server's time: what it gives a folder that is touched now."""
    os.utime(path.parent)
    return path.parent.stat().st_mtime


def _machine() -> str:
    """Return what tells one set of process ids from another: this boot of this machine, and the pid namespace."""
    try:
        namespace = Path("/proc/self/ns/pid").readlink()
    except OSError:
        namespace = None
    boot = _boot()
    return f"{boot} {namespace}" if boot and namespace else socket.gethostname()


def _boot() -> str:
    """Return what names this boot of this kernel, for all containers that it runs; empty where that is not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _born(pid: str) -> str:
    """Return when a process began, in ticks after the boot; empty where there is no such process."""
    try:
        stat = Path("/proc", pid, "stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
    return "" if fields[0] in "ZX" else fields[19]


def _unwritable(out: Path, error: OSError) -> OutputUnwritable:
    return OutputUnwritable(
        f"{out}: cannot be written: {error.strerror}", hint="Remove what is there, or choose another folder with --out."
    )
