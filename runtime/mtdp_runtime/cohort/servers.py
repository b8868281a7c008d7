"""Servers of files, as fsspec reaches them: the one module that knows it. What they do is said in our words.

Errors of the libraries hold URLs with their secrets: none of their words are passed on.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from ssl import SSLCertVerificationError
from typing import Any, Final, TypeVar

from mtdp_runtime.errors import StorageFailed, UsageError
from mtdp_runtime.urls import SlideUrl

WAITS_S: Final = (0.5, 1.0, 2.0, 4.0, 8.0)  # before a transfer is tried again; what arrives in between resets them
_TICK_S: Final = 0.1
_SILENT_S: Final = 30
# The library of each scheme, and the extra that installs it.
LIBRARIES: Final = {
    "s3": ("s3fs", "remote"),
    "https": ("aiohttp", "remote"),
    "http": ("aiohttp", "remote"),
    "gs": ("gcsfs", "gcs"),
    "az": ("adlfs", "azure"),
}
WEB: Final = ("http", "https")
_REFUSED: Final = (401, 403)
_GONE: Final = (404, 410)
# What a FileNotFoundError comes of where the server said it; fsspec raises one for any broken connection, too.
_SAY_GONE: Final = ("FileNotFoundError", "ClientError", "NoSuchKey", "NoSuchBucket", "ResourceNotFoundError")
HINT: Final = "The transfer failed, not the slide. The next run tries it again."
Facts = tuple[int, str]  # bytes, and the ETag or what stands for it
T = TypeVar("T")


# What S3 says of a refusal, by its code.
_REFUSALS: Final = {
    "ExpiredToken": "the credentials have expired",
    "RequestTimeTooSkewed": "the clock of this machine is wrong",
}


class TransferFailed(StorageFailed):
    """A slide could not be fetched, or its files not be put up: that says nothing of the slide."""

    refused: SlideUrl | None = None  # what a server says no to, or has no room for: that does not pass by waiting


def look_for_library(url: SlideUrl) -> None:
    """Make sure that a URL can be fetched here.

    Raises:
        UsageError: a library is not installed.
    """
    library, extra = LIBRARIES[url.scheme]
    missing = [name for name in ("fsspec", library) if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"{url}: {url.scheme}:// needs {' and '.join(missing)}", hint=f"pip install 'mtdp[{extra}]'")


def patiently(url: SlideUrl, ask: Callable[[], T], beat: Callable[[int], None]) -> T:
    """Ask a server, again where it may answer otherwise after some seconds; `beat` is called while it waits.

    Raises:
        TransferFailed: it does not answer, or in the negative.
    """
    for wait_s in (*WAITS_S, None):
        try:
            return ask()
        except Broken as broken:
            if wait_s is None or not broken.passing:
                raise failed_by(broken, url) from None
        wait(wait_s, beat)
    raise AssertionError


def if_there(ask: Callable[[], T]) -> T | None:
    """Ask a server; None where what it is asked for is not there."""
    try:
        return ask()
    except Broken as broken:
        if broken.gone:
            return None
        raise


def wait(seconds: float, beat: Callable[[int], None]) -> None:
    """Wait, and say so all the time."""
    until_s = time.monotonic() + seconds
    while (left_s := until_s - time.monotonic()) > 0:
        beat(0)
        time.sleep(min(left_s, _TICK_S))


class Broken(Exception):
    """What a server or the way to it did, in words without secrets."""

    def __init__(self, reason: str, passing: bool, gone: bool = False, refused: bool = False) -> None:
        super().__init__(reason)
        self.passing, self.gone, self.refused = passing, gone, refused


def failed_by(broken: Broken, url: SlideUrl) -> TransferFailed:
    """Return the error of a file that cannot be had, or put."""
    error = TransferFailed(f"{url}: {broken}", hint=HINT)
    error.refused = url if broken.refused else None
    return error


@contextmanager
def in_our_words() -> Iterator[None]:
    """Make what a library raises a `Broken`."""
    try:
        yield
    except Broken:
        raise
    except Exception as error:
        raise _why(error) from None


def _why(error: BaseException) -> Broken:
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    name = type(chain[-1]).__name__
    status, code = next(filter(None, map(_status, chain)), 0), next(filter(None, map(_code, chain)), "")
    if any(isinstance(one, SSLCertVerificationError) for one in chain):
        return Broken("its certificate is not trusted (SSL_CERT_FILE names a file of more that are)", passing=False)
    if status == 507:
        return Broken("its server has no room for it", passing=False, refused=True)
    if isinstance(error, PermissionError) or "Credentials" in name or status in _REFUSED or code in _REFUSALS:
        why = _REFUSALS.get(code, "credentials are taken from the environment")
        return Broken(f"its server refuses it: {why}", passing=False, refused=True)
    if status in _GONE or (isinstance(error, FileNotFoundError) and name in _SAY_GONE):
        return Broken("it is not there", passing=False, gone=True)
    if name == "TooManyRedirects":
        return Broken("its server redirects without end", passing=False)
    if status == 400 and code:  # S3 gives no reason where it is asked for a file's facts
        return Broken("its server answers 400, as S3 does where credentials have expired", passing=False)
    if status:
        return Broken(f"its server answers {status}", status >= 500 or status in (408, 429))
    return Broken(f"the transfer broke off ({name})", passing=not isinstance(error, (ImportError, ValueError)))


def _status(error: BaseException) -> int:
    """Return the status of an answer that an error comes of, as the libraries of the web and of S3 keep it; else 0."""
    answer = getattr(error, "response", None)
    facts = answer.get("ResponseMetadata") if isinstance(answer, dict) else None
    found = facts.get("HTTPStatusCode") if isinstance(facts, dict) else getattr(error, "status", None)
    return found if isinstance(found, int) else 0


def _code(error: BaseException) -> str:
    """Return what S3 calls an error; empty where it does not say."""
    answer = getattr(error, "response", None)
    facts = answer.get("Error") if isinstance(answer, dict) else None
    return str(facts.get("Code", "")) if isinstance(facts, dict) else ""


@cache
def _system(scheme: str, pid: int) -> Any:
    """Return the file system of a scheme, for this process: its thread does not outlive a fork."""
    import fsspec

    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme in WEB:
        from aiohttp import ClientTimeout

        options["client_kwargs"] = {"timeout": ClientTimeout(total=None, sock_connect=_SILENT_S, sock_read=_SILENT_S)}
    return fsspec.filesystem(scheme, **options)


def system_of(url: SlideUrl) -> Any:
    """Return the file system of a URL."""
    return _system(url.scheme, os.getpid())


def facts_now(url: SlideUrl) -> Facts:
    """Return what a server states of a file, asked once.

    Raises:
        Broken: it does not.
    """
    with in_our_words():
        info = system_of(url).info(url.given)
        marks = (info.get(name) for name in ("ETag", "etag", "md5Hash", "Content-MD5", "Last-Modified", "LastModified"))
        if info.get("type") == "directory":
            raise Broken("it is a folder: end its name with a /", passing=False)
        if info.get("mimetype") == "text/html":
            raise Broken("its server sends a web page (text/html), such as one to log in", passing=False)
        if info.get("size") is None:
            raise Broken("its server does not state its size, or sends it compressed", passing=False)
        return int(info["size"]), next((str(mark) for mark in marks if mark), "")


def beating(beat: Callable[[int], None]) -> Any:
    """Return what a library tells of its progress, as a call of `beat`."""
    from fsspec.callbacks import Callback

    return Callback(hooks={"": lambda *_, **__: beat(0)})
