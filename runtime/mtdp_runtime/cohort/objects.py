"""Files of a bucket, looked for, read, put and removed: what a run does whose --out is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mtdp_runtime.cohort.servers import Broken, Facts, beating, facts_now, if_there, in_our_words, patiently, system_of
from mtdp_runtime.urls import SlideUrl


def find(url: SlideUrl, beat: Callable[[int], None]) -> Facts | None:
    """Return what the server states of a file; None where it is not there.

    Raises:
        TransferFailed: that is not known.
    """
    return patiently(url, lambda: if_there(lambda: facts_now(url)), beat)


def read_whole(url: SlideUrl, beat: Callable[[int], None]) -> bytes | None:
    """Return the bytes of a small file of a bucket; None where it is not there.

    Raises:
        TransferFailed: that is not known.
    """

    def read() -> bytes:
        with in_our_words():
            return bytes(system_of(url).cat_file(url.given))

    return patiently(url, lambda: if_there(read), beat)


def put(source: Path | bytes, url: SlideUrl, beat: Callable[[int], None]) -> Facts:
    """Put a file into a bucket, in the place of what is there; return what the server states of it then.

    Raises:
        TransferFailed: it could not be put there.
        OSError: the file cannot be read.
    """
    size = len(source) if isinstance(source, bytes) else source.stat().st_size

    def send() -> Facts:
        with in_our_words():
            system = system_of(url)
            if isinstance(source, bytes):
                system.pipe_file(url.given, source)
            else:
                system.put_file(str(source), url.given, callback=beating(beat))
        facts = facts_now(url)
        if facts[0] != size:
            raise Broken(f"{facts[0]} bytes arrived of {size}", passing=True)
        return facts

    return patiently(url, send, beat)


def remove(url: SlideUrl, beat: Callable[[int], None]) -> None:
    """Remove a file of a bucket, or all below a folder, where it is there.

    Raises:
        TransferFailed: it could not be removed.
    """

    def away() -> None:
        with in_our_words():
            system = system_of(url)
            for name in system.find(url.given):
                system.rm_file(name)

    patiently(url, lambda: if_there(away), beat)
