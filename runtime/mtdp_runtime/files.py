"""Folders that can be written; and files that are code or steer code, in a folder of one's own, digest inside."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mtdp_runtime.errors import BackendError, OutputUnwritable

_DIGEST_BYTES = 65  # 64 hex digits and a line end


def cache_folder() -> Path:
    """Return the folder of what this machine built: MTDP_CACHE, or `mtdp` in XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("MTDP_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtdp"
    return base / "engines"


def private_folder(folder: Path) -> Path:
    """Make the folder; refuse one that another user could have put an engine into.

    Raises:
        BackendError: it belongs to somebody else, others may write into it, or it cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
    except OSError as error:
        raise BackendError(
            f"{folder}: the engine cache cannot be made: {error.strerror}", "Set MTDP_CACHE to a folder of your own."
        ) from error
    if facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise BackendError(
            f"{folder}: the engine cache is not yours alone, and engines are code",
            f"chmod 700 {folder}, or set MTDP_CACHE to a folder of your own.",
        )
    return folder


def save_with_digest(path: Path, content: bytes) -> None:
    """Write the content with its SHA-256 before it, at once: a reader sees the old file, the new one, or none.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with scratch.open("wb") as stream:
            stream.write(hashlib.sha256(content).hexdigest().encode() + b"\n")
            stream.write(content)
        scratch.replace(path)
    except OSError:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that gets its name when the block ends: a reader sees the old file, or the new one whole and synced.

    No link that somebody put under the temporary name is followed.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    scratch.unlink(missing_ok=True)
    file = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with os.fdopen(file, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        scratch.replace(path)
        sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file at once; as `atomic_file`."""
    with atomic_file(path) as stream:
        stream.write(data)


def sync_folder(folder: Path) -> None:
    """Make what was renamed in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_with_digest(path: Path) -> tuple[bytes, str]:
    """Return the content and "", or b"" and what is wrong; b"" and "" where there is no file yet."""
    try:
        whole = path.read_bytes()
    except FileNotFoundError:
        return b"", ""
    except OSError as error:
        return b"", f"it cannot be read ({error.strerror})"
    content = whole[_DIGEST_BYTES:]
    if whole[:_DIGEST_BYTES] != hashlib.sha256(content).hexdigest().encode() + b"\n":
        return b"", "it is damaged"
    return content, ""


def writable_folder(folder: Path) -> None:
    """Make the folder and prove that it can be written.

    Raises:
        OutputUnwritable: it cannot.
    """
    probe = folder / f".mtdp-{os.getpid()}.probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OutputUnwritable(
            f"{folder}: cannot be written: {error.strerror}", hint="Choose another folder with --out."
        ) from error
