"""What is derived from a feature file, and from which: `.derived/<slide>.json`, beside the feature files.

A file's name and time say little: a run may be killed while it removes an old one, a disk may fill, a clock may be set
back. So it is written down of which content of the HDF5 file each was made, and with how many bytes. What does not fit
is made anew. The line is removed before the file is touched, and comes back when the file is whole and synced.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import h5py

from mtdp_runtime.errors import OutputUnwritable
from mtdp_runtime.faults import remedy
from mtdp_runtime.files import sync_folder, write_atomically
from mtdp_runtime.store import checksums

FOLDER: Final = ".derived"
_BLOCK_BYTES: Final = 1 << 20
_BROKEN: Final = (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError)


def content_of(h5: Path) -> str:
    """Return 64 hex digits that stand for the content of a feature file: its facts and the checksums of its datasets.

    Files of earlier versions hold no checksums: their size and time take their place.

    Raises:
        OutputUnwritable: it cannot be read.
    """
    try:
        with h5py.File(h5, "r", locking=False) as file:
            facts: list[Any] = [str(file.attrs["fingerprint"]), str(file.attrs.get("finished", ""))]
            sums = {name: one for name, one in checksums.kept(file).items() if name != checksums.ATTRIBUTES}
        if sums:
            facts = [facts[0], sums]
        else:
            facts += [h5.stat().st_size, h5.stat().st_mtime_ns]
    except _BROKEN as error:
        raise OutputUnwritable(f"{h5}: cannot be read: {error}", hint="Run the same command again.") from error
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def is_current(h5: Path, kind: str, paths: Sequence[Path]) -> bool:
    """Say whether the files of a kind were made from what a feature file holds now, and are there as they were made."""
    record = records(h5).get(kind, {})
    try:
        made = {path: record["files"][_place(h5, path)] for path in paths} if record else {}
        there = all((facts["files"], facts["bytes"]) == _extent(path) for path, facts in made.items())
        return bool(record) and there and record["h5"] == content_of(h5)
    except _BROKEN:
        return False


def make(h5: Path, kind: str, parts: Sequence[tuple[Path, Callable[[Path], None]]]) -> None:
    """Write the files of a kind, each under a temporary name first, and note of what they were made.

    Args:
        h5: the finished feature file.
        kind: a format's name, or `report`.
        parts: each file or folder, and what writes it under the name that it is given.

    Raises:
        OutputUnwritable: the disk is full or the folder cannot be written; the feature file is untouched.
    """
    made: dict[str, Any] = {}
    path = h5
    try:
        content = content_of(h5)
        _note(h5, kind, None)
        for path, write in parts:
            partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")  # some look at the suffix
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                _remove_dead(path)
                write(partial)
                made[_place(h5, path)] = _facts_of(partial, sync=True)
                if path.is_dir() and not path.is_symlink() and partial.is_dir():  # else it is not one of ours
                    shutil.rmtree(path)
                partial.replace(path)
                sync_folder(path.parent)
            finally:
                _remove(partial)
        _note(h5, kind, {"h5": content, "files": made})
    except OSError as error:
        raise OutputUnwritable(
            f"{path}: cannot be written: {error.strerror or error}",
            hint=f"{h5} is complete: {remedy(error)}, and run the same command again.",
        ) from error


def remove(h5: Path, kind: str, paths: Sequence[Path]) -> None:
    """Remove the files of a kind that an earlier run made, where they are there.

    Raises:
        OutputUnwritable: they cannot be removed.
    """
    if kind not in records(h5):
        return  # nothing here is ours
    path = h5
    try:
        _note(h5, kind, None)
        for path in paths:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputUnwritable(
            f"{path}: cannot be removed: {error.strerror or error}", hint="Remove it by hand: it holds no tiles."
        ) from error


def records(h5: Path) -> dict[str, Any]:
    """Return what is written down of a feature file's derived files, by kind; nothing where that cannot be read."""
    try:
        found = json.loads(record_path(h5).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def made_from(h5: Path) -> list[Path]:
    """Return the files and folders that were derived from a feature file and are there, and what says so, last."""
    places = [place for record in records(h5).values() for place in record.get("files", {})]
    return [path for path in (*(h5.parent / place for place in places), record_path(h5)) if path.exists()]


def problems(h5: Path) -> list[str]:
    """Return what is wrong with what is derived from a feature file; the files are read whole.

    Raises:
        OutputUnwritable: the feature file cannot be read.
    """
    content, found = content_of(h5), []
    for kind, record in records(h5).items():
        try:
            if record["h5"] != content:
                found.append(f"{kind} was made from another content of it")
                continue
            for place, facts in record["files"].items():
                path = h5.parent / place
                if not path.exists():
                    found.append(f"{place} is gone")
                elif _facts_of(path) != facts:
                    found.append(f"{place} is not as it was made")
        except OSError as error:
            found.append(f"{kind} cannot be read: {error.strerror or error}")
        except _BROKEN:
            found.append(f"what is written down of {kind} cannot be understood")
    return found


def _place(h5: Path, path: Path) -> str:
    return path.relative_to(h5.parent).as_posix()


def record_path(h5: Path) -> Path:
    """Return where it is written down what was derived from a feature file."""
    return h5.parent / FOLDER / f"{h5.stem}.json"


def _note(h5: Path, kind: str, record: dict[str, Any] | None) -> None:
    path, all_of_them = record_path(h5), records(h5)
    if record is None and kind not in all_of_them:
        return
    all_of_them.pop(kind, None)
    if record is not None:
        all_of_them[kind] = record
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(all_of_them, indent=1, sort_keys=True).encode("utf-8", "backslashreplace"))


def files_below(path: Path) -> Iterator[Path]:
    """Yield a file, or all files of a folder."""
    if path.is_dir():
        yield from (one for one in sorted(path.rglob("*")) if one.is_file())
    else:
        yield path


def _extent(path: Path) -> tuple[int, int]:
    """Return how many files and bytes there are."""
    sizes = [one.stat().st_size for one in files_below(path)]
    return len(sizes), sum(sizes)


def _facts_of(path: Path, sync: bool = False) -> dict[str, Any]:
    """Return files, bytes and checksum of a file or a folder; bring it to the disk, too, where that is asked for."""
    digest, bytes_read, count = checksums.new_digest(), 0, 0
    for one in files_below(path):
        if one != path:
            digest.update(str(one.relative_to(path)).encode("utf-8", "surrogateescape"))
        with one.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
                bytes_read += len(block)
            if sync:
                os.fsync(stream.fileno())
        count += 1
    return {"files": count, "bytes": bytes_read, checksums.ALGORITHM: digest.hexdigest()}


def _remove_dead(path: Path) -> None:
    """Remove what processes that were killed left of a file: no process of another machine has the slide's claim."""
    start, end = f".{path.stem}.", f".partial{path.suffix}"
    for partial in path.parent.iterdir():
        owner = partial.name.removeprefix(start).removesuffix(end)
        if partial.name == f"{start}{owner}{end}" and owner.isascii() and owner.isdigit() and not _lives(int(owner)):
            _remove(partial)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:  # somebody else's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
