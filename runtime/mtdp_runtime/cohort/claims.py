"""Which process works on which slide, where several share an output folder.

A claim is a file that is made with O_EXCL, so one process alone makes it; its owner touches it every few seconds.
Nobody removes a dead claim to take its place, for two could do so at once: it is outnumbered by the next, `NAME.2`
after `NAME.1`, and that file, too, can be made only once. Who made it looks at the dead ones again before it begins.

Assumed of the file system: O_EXCL is atomic (local disks; NFS from version 3 and Linux 2.6.5 on), a rename is atomic,
and opening a file shows its times as the server has them (close-to-open consistency). Clocks need not agree: ages are
differences between times that the file server set. Locks are not used.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from mtdp_runtime.errors import OutputUnwritable

FOLDER: Final = ".claims"
BEAT_S: Final = 15.0
# Beats that nobody saw for this long mean that the owner is gone. An NFS client may cache times for a minute.
EXPIRES_S: Final = 120.0
_WRITTEN_S: Final = 3.0  # a claim is written right after it was made


@dataclass(frozen=True, slots=True)
class Held:
    """Another process has the slide."""

    by: str


class Claim:
    """A slide that is ours; leaving gives it back."""

    def __init__(self, folder: Path, name: str, number: int) -> None:
        self.path = folder / f"{name}.{number}"
        self._successor = folder / f"{name}.{number + 1}"
        self._earlier = [folder / f"{name}.{i}" for i in range(number - 1, 0, -1)]
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="mtdp-claim", daemon=True)
        self._heart.start()

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
        OutputUnwritable: the folder cannot be written.
    """
    folder = out / FOLDER
    dead: list[Path] = []
    while True:
        path = folder / f"{name}.{len(dead) + 1}"
        try:
            _make(path)
            after = _owner_or_gone(folder / f"{name}.{len(dead) + 2}")
            if not after and all(_living_owner(one) is None for one in dead):
                # What stands after ours was left by a process that died while it gave its claim back.
                (folder / f"{name}.{len(dead) + 2}").unlink(missing_ok=True)
                return Claim(folder, name, len(dead) + 1)
            path.unlink()
            if after:
                return Held(after)
            dead = []
        except FileExistsError:
            owner = _owner_or_gone(path)
            if owner is None:
                dead.append(path)
            elif owner:
                return Held(owner)
            else:
                dead = []
        except FileNotFoundError:
            # The folder is not there yet, or was removed by the last one out; or a dead claim was cleared away.
            path.unlink(missing_ok=True)
            dead = []
            _make_folder(out)
        except OSError as error:
            raise _unwritable(out, error) from error


def seems_held(out: Path, name: str) -> bool:
    """Say whether somebody has claimed a slide: at a glance, so it may be a process that is gone."""
    try:
        return any(path.name.rpartition(".")[0] == name for path in (out / FOLDER).iterdir())
    except OSError:
        return False


def _owner_or_gone(path: Path) -> str | None:
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


def _make(path: Path) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with os.fdopen(file, "w", encoding="utf-8") as stream:
        json.dump(
            {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "born": _born("self")}, stream
        )


def _living_owner(path: Path) -> str | None:
    """Return who holds a claim, or None where it is dead.

    Raises:
        FileNotFoundError: it was given back.
    """
    give_up_s = time.monotonic() + _WRITTEN_S
    while True:
        with path.open(encoding="utf-8") as stream:
            beaten_s, text = os.fstat(stream.fileno()).st_mtime, stream.read()
        try:
            owner: dict[str, Any] = json.loads(text)
            host, machine, pid, born = owner["host"], owner["machine"], int(owner["pid"]), owner["born"]
            break
        except (ValueError, KeyError, TypeError):
            # Made, and not yet written; or its owner died in between.
            if time.monotonic() > give_up_s:
                return None
            time.sleep(_WRITTEN_S / 100)
    if machine == _machine():
        return f"process {pid}" if _born(str(pid)) == born else None
    return f"process {pid} on {host}" if _now(path) - beaten_s < EXPIRES_S else None


def _now(path: Path) -> float:
    """Return the file server's time: what it gives a folder that is touched now."""
    os.utime(path.parent)
    return path.parent.stat().st_mtime


def _machine() -> str:
    """Return what tells one set of process ids from another: this boot of this machine, and the pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _born(pid: str) -> str:
    """Return when a process began, in ticks after the boot; empty where there is no such process."""
    try:
        stat = Path("/proc", pid, "stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
    return "" if fields[0] in "ZX" else fields[19]


def _unwritable(out: Path, error: OSError) -> OutputUnwritable:
    return OutputUnwritable(f"{out}: cannot be written: {error.strerror}", hint="Choose another folder with --out.")
