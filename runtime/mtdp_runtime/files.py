"""Files written whole or not at all; folders that can be written; and files that are code or steer code."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final

from mtdp_runtime.errors import BackendError, OutputUnwritable, UsageError
from mtdp_runtime.urls import SlideUrl, path_or_url

_DIGEST_BYTES: Final = 65  # 64 hex digits and a line end
_TOKEN: Final = re.compile(r"[0-9a-f]{6}")
# Nothing can be made there: so who can do without a cache does, and who cannot says to set MTDP_CACHE.
_NO_HOME: Final = Path("/proc/self/no-home")
_CANNOT_SYNC: Final = (errno.EINVAL, errno.ENOTSUP)  # file systems that have no sync of folders


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Give a file to write that takes the name `path` at the end: a reader sees the old file, the new one, or none.

    The stream is binary and can be read, too. The file lies beside `path` until the end, as `stream.name`, with the
    suffix of `path`; a library may write it by that name. Its bytes are on the disk before the rename, and the rename
    is there before this returns. Any number of processes may write one path; the last one wins. A process that is
    killed leaves the file: `remove_strays`.

    Raises:
        OSError: it cannot be written. Nothing of it is left, and a file that was there before stays as it was.
    """
    stream = _new_file(path)
    scratch = Path(stream.name)
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        scratch.replace(path)
    except BaseException:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file of these bytes, as `atomic_file` does.

    Raises:
        OSError: it cannot be written. Nothing of it is left, and a file that was there before stays as it was.
    """
    with atomic_file(path) as stream:
        stream.write(data)


def sync_folder(folder: Path) -> None:
    """Make what was renamed in a folder last, where its file system can.

    Raises:
        OSError: the disk is gone.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def remove_strays(path: Path) -> None:
    """Remove what processes that were killed left of `atomic_file(path)`; for those who alone may write it now.

    Raises:
        OSError: one cannot be removed.
    """
    start, end = f".{path.stem}.", f".partial{path.suffix}"
    for stray in path.parent.glob(f"{glob.escape(start)}*{glob.escape(end)}"):
        if _TOKEN.fullmatch(stray.name.removeprefix(start).removesuffix(end)):
            stray.unlink(missing_ok=True)


def _new_file(path: Path) -> IO[bytes]:
    """Make a file beside `path` that was not there, and is no link that somebody put there."""

    def make(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o666)

    while True:
        scratch = path.with_name(f".{path.stem}.{secrets.token_hex(3)}.partial{path.suffix}")
        with suppress(FileExistsError):
            return open(scratch, "x+b", opener=make)  # `Path.open` takes no opener


def cache_folder() -> Path:
    """Return the folder of what this machine built.

    MTDP_CACHE, or `mtdp` in XDG_CACHE_HOME or ~/.cache; where there is no home, one that cannot be made.
    """
    own, shared = os.environ.get("MTDP_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own or shared:
        return (Path(own) if own else Path(shared or "") / "mtdp") / "engines"
    try:
        home = Path.home()
    except RuntimeError:  # a container's user without HOME and without an entry in passwd
        home = _NO_HOME
    return home / ".cache" / "mtdp" / "engines"


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
    write_atomically(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


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


def working_folder(out: Path, stage: Path | None) -> tuple[Path, SlideUrl | None]:
    """Return the folder in which files are made, and the URL where they go from there, where `out` is one.

    That folder lies in `stage`, or in the system's temporary folder, and is the same for the same URL: what was
    stopped goes on there.

    Raises:
        UsageError: nothing can be put there, or another user has such a folder.
    """
    url = path_or_url(out)
    if not isinstance(url, SlideUrl):
        return out, None
    if url.scheme in ("http", "https"):
        raise UsageError(f"--out {url}: a web server takes no files", hint="Name a folder, or a bucket: s3://...")
    name = f"mtdp-out-{os.getuid()}-{hashlib.sha256(str(url).encode()).hexdigest()[:12]}"
    folder = (stage or Path(tempfile.gettempdir())) / name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.lstat()
    except OSError as error:
        raise UsageError(
            f"{folder}: cannot be made for what goes to {url}: {error.strerror}", hint="Name a local folder: --stage."
        ) from error
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
        raise UsageError(f"{folder}: is not yours", hint="Name a local folder for what goes to the bucket: --stage.")
    return folder, url


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
