"""Slides behind URLs, fetched whole to a local disk: the one module that knows fsspec.

What arrives is compared with the size and the ETag that the server states before and after. A transfer that breaks goes
on where it was, as long as the server states the same; one that changes meanwhile begins again. Errors of the libraries
hold URLs with their secrets: none of their words are passed on.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final

from mtdp_runtime.errors import StorageFailed, UsageError
from mtdp_runtime.slide import mirax
from mtdp_runtime.urls import SlideUrl

_PIECE_BYTES: Final = 8 << 20
_WAITS_S: Final = (0.5, 1.0, 2.0, 4.0, 8.0)  # before a transfer is tried again; what arrives in between resets them
_TICK_S: Final = 0.1
_SILENT_S: Final = 30
_EXTRA: Final = "pip install 'mtdp[remote]'"
# The library of each scheme, and how to get it.
_LIBRARIES: Final = {
    "s3": ("s3fs", _EXTRA),
    "https": ("aiohttp", _EXTRA),
    "http": ("aiohttp", _EXTRA),
    "gs": ("gcsfs", f"{_EXTRA} gcsfs"),
    "az": ("adlfs", f"{_EXTRA} adlfs"),
}
_OF_MANY_FILES: Final = frozenset({".dcm", ".vms", ".vmu", ".zarr"})
_WEB: Final = ("http", "https")
_REFUSED: Final = (401, 403)
_GONE: Final = (404, 410)
# What a FileNotFoundError comes of where the server said it; fsspec raises one for any broken connection, too.
_SAY_GONE: Final = ("FileNotFoundError", "ClientError", "NoSuchKey", "NoSuchBucket", "ResourceNotFoundError")
_HINT: Final = "The transfer failed, not the slide. The next run tries it again."
Facts = tuple[int, str]  # bytes, and the ETag or what stands for it


class TransferFailed(StorageFailed):
    """A slide could not be fetched: that says nothing of the slide."""


def look_for_library(url: SlideUrl) -> None:
    """Make sure that a URL can be fetched here.

    Raises:
        UsageError: a library is not installed.
    """
    library, how = _LIBRARIES[url.scheme]
    missing = [name for name in ("fsspec", library) if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"{url}: {url.scheme}:// needs {' and '.join(missing)}", hint=how)


def list_folder(url: SlideUrl) -> list[SlideUrl]:
    """Return all files below a folder of a bucket, in the order of their names.

    Raises:
        UsageError: it cannot be listed.
    """
    if url.scheme in _WEB:
        raise UsageError(f"{url}: a folder of the web cannot be listed", hint="List its slides in a CSV manifest.")
    try:
        with _in_our_words():
            names: list[str] = _system(url.scheme, os.getpid()).find(f"{url}/")
    except _Broken as broken:
        raise UsageError(f"{url}: cannot be listed: {broken}", hint="Check the name and the rights.") from None
    return [SlideUrl(f"{url.scheme}://{name}") for name in sorted(names)]


def files_of(url: SlideUrl) -> list[tuple[SlideUrl, Path]]:
    """Return the files of a slide, and under which names they belong together.

    Raises:
        TransferFailed: they are not known.
    """
    kind = url.suffix.lower()
    if kind in _OF_MANY_FILES:
        raise TransferFailed(
            f"{url}: {kind} is one file of a slide of many, which are not fetched", hint="Copy its folder to a disk."
        )
    if kind != mirax.SUFFIX:
        return [(url, Path(url.name))]
    if url.scheme in _WEB:
        raise TransferFailed(
            f"{url}: the folder of a .mrxs cannot be listed on the web", hint="Copy both to a disk or a bucket."
        )
    try:
        inside = list_folder(url.with_suffix(""))
    except UsageError as error:
        raise TransferFailed(f"{url}: {error}", hint=_HINT) from None
    return [(url, Path(url.name)), *((one, one.relative_to(url.parent)) for one in inside)]


def size_of(url: SlideUrl) -> int:
    """Return the bytes of a file.

    Raises:
        TransferFailed: the server does not say.
    """
    for wait_s in (*_WAITS_S, None):
        try:
            return _facts(url)[0]
        except _Broken as broken:
            if wait_s is None or not broken.passing:
                raise TransferFailed(f"{url}: {broken}", hint=_HINT) from None
        time.sleep(wait_s)
    raise AssertionError


def fetch(url: SlideUrl, target: Path, arrived: Callable[[int], None]) -> None:
    """Fetch a file; `target` must not be there.

    Args:
        url: of the file.
        target: where it is written.
        arrived: hears the bytes of each piece, and 0 now and then while nothing comes; what it raises ends this.

    Raises:
        TransferFailed: it could not be fetched, or changes again and again.
        OSError: the disk.
    """
    waits, begun_as, reached = list(_WAITS_S), None, 0
    with target.open("xb") as writing:
        while True:
            had = writing.tell()
            try:
                facts = _facts(url)
                if facts != begun_as:
                    had = 0
                begun_as = facts
                writing.truncate(had)
                for offset, piece in _pieces(url, had, facts[0]):
                    writing.seek(offset)
                    writing.write(piece)
                    arrived(len(piece))
                writing.truncate()
                if writing.tell() < facts[0]:
                    raise _Broken(f"{writing.tell()} bytes came of {facts[0]}", passing=True)
                if _facts(url) == facts and writing.tell() == facts[0]:
                    return
                begun_as = None
                reason, passing = "it changes while it is fetched", True
            except _Broken as broken:
                reason, passing = str(broken), broken.passing
                if writing.tell() > reached:  # never the same ground twice, so this ends
                    waits, reached = list(_WAITS_S), writing.tell()
            if not (passing and waits):
                raise TransferFailed(f"{url}: {reason}", hint=_HINT)
            _wait(waits.pop(0), arrived)


class _Broken(Exception):
    """What a server or the way to it did, in words without secrets."""

    def __init__(self, reason: str, passing: bool) -> None:
        super().__init__(reason)
        self.passing = passing


@contextmanager
def _in_our_words() -> Iterator[None]:
    try:
        yield
    except _Broken:
        raise
    except Exception as error:
        raise _why(error) from None


def _why(error: BaseException) -> _Broken:
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    name = type(chain[-1]).__name__
    status = next((one.status for one in chain if isinstance(getattr(one, "status", None), int)), 0)  # type: ignore[attr-defined]
    if isinstance(error, PermissionError) or "Credentials" in name or status in _REFUSED:
        return _Broken("its server refuses it: credentials are taken from the environment", passing=False)
    if status in _GONE or (isinstance(error, FileNotFoundError) and name in _SAY_GONE):
        return _Broken("it is not there", passing=False)
    if status:
        return _Broken(f"its server answers {status}", status >= 500 or status in (408, 429))
    return _Broken(f"the transfer broke off ({name})", passing=not isinstance(error, (ImportError, ValueError)))


@cache
def _system(scheme: str, pid: int) -> Any:
    """Return the file system of a scheme, for this process: its thread does not outlive a fork."""
    import fsspec

    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme in _WEB:
        from aiohttp import ClientTimeout

        options["client_kwargs"] = {"timeout": ClientTimeout(total=None, sock_connect=_SILENT_S, sock_read=_SILENT_S)}
    return fsspec.filesystem(scheme, **options)


def _facts(url: SlideUrl) -> Facts:
    with _in_our_words():
        info = _system(url.scheme, os.getpid()).info(url.given)
        marks = (info.get(name) for name in ("ETag", "etag", "md5Hash", "Content-MD5", "Last-Modified", "LastModified"))
        if info.get("size") is None:
            raise _Broken("its server does not state its size", passing=False)
        return int(info["size"]), next((str(mark) for mark in marks if mark), "")


def _pieces(url: SlideUrl, start: int, size: int) -> Iterator[tuple[int, bytes]]:
    """Yield a file's bytes from `start`, each piece with its place; from 0 where a server knows no ranges."""
    system = _system(url.scheme, os.getpid())
    if url.scheme not in _WEB:
        for offset in range(start, size, _PIECE_BYTES):
            with _in_our_words():
                piece = system.cat_file(url.given, start=offset, end=min(size, offset + _PIECE_BYTES))
            yield offset, piece
        return
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with _in_our_words():
        stream = system.open(url.given, block_size=0, size=size, headers=headers)
        ranged = start and stream.r.status == 206
    offset = start if ranged else 0
    try:
        while True:
            with _in_our_words():
                piece = stream.read(_PIECE_BYTES)
            if not piece:
                return
            yield offset, piece
            offset += len(piece)
    finally:
        stream.close()


def _wait(seconds: float, arrived: Callable[[int], None]) -> None:
    until_s = time.monotonic() + seconds
    while (left_s := until_s - time.monotonic()) > 0:
        arrived(0)
        time.sleep(min(left_s, _TICK_S))
