"""Slides behind URLs, listed and fetched whole to a local disk.

What arrives is compared with the size and the ETag that the server states before and after. A transfer that breaks goes
on where it was, as long as the server states the same; one that changes meanwhile begins again.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Final

from mtdp_runtime.cohort import servers
from mtdp_runtime.cohort.servers import (
    HINT,
    WEB,
    Broken,
    Facts,
    TransferFailed,
    facts_now,
    failed_by,
    in_our_words,
    patiently,
    system_of,
    wait,
)
from mtdp_runtime.errors import UsageError
from mtdp_runtime.slide import mirax
from mtdp_runtime.urls import SlideUrl, found_url

_PIECE_BYTES: Final = 8 << 20
_RANGE: Final = re.compile(r"bytes (\d+)-")
_OF_MANY_FILES: Final = frozenset({".dcm", ".vms", ".vmu", ".zarr"})


def list_folder(url: SlideUrl) -> list[SlideUrl]:
    """Return all files below a folder of a bucket, in the order of their names.

    Raises:
        UsageError: it cannot be listed.
    """
    if url.scheme in WEB:
        raise UsageError(f"{url}: a folder of the web cannot be listed", hint="List its slides in a CSV manifest.")
    try:
        with in_our_words():
            names: list[str] = system_of(url).find(f"{url}/")
    except Broken as broken:
        raise UsageError(f"{url}: cannot be listed: {broken}", hint="Check the name and the rights.") from None
    return [found_url(there, there) for there in (f"{url.scheme}://{name}" for name in sorted(names))]


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
    if url.scheme in WEB:
        raise TransferFailed(
            f"{url}: the folder of a .mrxs cannot be listed on the web", hint="Copy both to a disk or a bucket."
        )
    try:
        inside = list_folder(url.with_suffix(""))
    except UsageError as error:
        raise TransferFailed(f"{url}: {error}", hint=HINT) from None
    return [(url, Path(url.name)), *((one, one.relative_to(url.parent)) for one in inside)]


def facts_of(url: SlideUrl, beat: Callable[[int], None]) -> Facts:
    """Return what the server states of a file; `beat` is as `arrived` of `fetch`.

    Raises:
        TransferFailed: it does not say.
    """
    return patiently(url, lambda: facts_now(url), beat)


def in_one(facts: Sequence[Facts]) -> str:
    """Return what is stated of the files of a slide as one text; empty where it would not tell a changed one."""
    return "; ".join(f"{size} {mark}" for size, mark in facts) if all(mark for _, mark in facts) else ""


def fetch(url: SlideUrl, target: Path, arrived: Callable[[int], None]) -> Facts:
    """Fetch a file; `target` must not be there.

    Args:
        url: of the file.
        target: where it is written.
        arrived: hears the bytes of each piece, and 0 now and then while nothing comes; what it raises ends this.

    Returns:
        What the server states of what was fetched.

    Raises:
        TransferFailed: it could not be fetched, or changes again and again.
        OSError: the disk.
    """
    waits, begun_as, reached, brought = list(servers.WAITS_S), None, 0, b""
    with target.open("xb") as writing:
        while True:
            had = writing.tell()
            try:
                facts = facts_now(url)
                if facts != begun_as:
                    had = 0
                begun_as = facts
                writing.truncate(had)
                for offset, piece in _pieces(url, had, facts[0]):
                    writing.seek(offset)
                    writing.write(piece)
                    arrived(len(piece))
                    if writing.tell() > facts[0]:
                        break
                writing.truncate()
                if writing.tell() < facts[0]:
                    raise Broken(f"{writing.tell()} bytes came of {facts[0]}", passing=True)
                whole = writing.tell() == facts[0]
                if whole and facts_now(url) == facts:
                    return facts
                # Servers that share a name may each have an ETag of their own: what comes twice has not changed.
                before, brought = brought, _digest(writing) if whole else b""
                if whole and before == brought:
                    return facts
                begun_as = None
                problem = Broken("it changes while it is fetched", passing=True)
            except Broken as broken:
                problem = broken
                if writing.tell() > reached:  # never the same ground twice, so this ends
                    waits, reached = list(servers.WAITS_S), writing.tell()
            if not (problem.passing and waits):
                raise failed_by(problem, url)
            wait(waits.pop(0), arrived)


def _pieces(url: SlideUrl, start: int, size: int) -> Iterator[tuple[int, bytes]]:
    """Yield a file's bytes from `start`, each piece with its place; from 0 where a server knows no ranges."""
    system = system_of(url)
    if url.scheme not in WEB:
        while start < size:
            end = min(size, start + _PIECE_BYTES)
            with in_our_words():
                piece = system.cat_file(url.given, start=start, end=end)
            if not 0 < len(piece) <= end - start:
                raise Broken(f"{len(piece)} bytes came of the {end - start} asked for", passing=True)
            yield start, piece
            start += len(piece)
        return
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with in_our_words():
        stream = system.open(url.given, block_size=0, size=size, headers=headers)
    try:
        if stream.r.headers.get("Content-Encoding", "identity") != "identity":
            raise Broken("its server sends it compressed, unasked", passing=False)
        offset = _begins_at(stream.r)
        if offset > start:  # there would be a hole
            if not start:
                raise Broken("its server sends a part of it, unasked", passing=False)
            yield from _pieces(url, 0, size)
            return
        while True:
            with in_our_words():
                piece = stream.read(_PIECE_BYTES)
            if not piece:
                return
            yield offset, piece
            offset += len(piece)
    finally:
        stream.close()


def _begins_at(answer: Any) -> int:
    """Return the place in a file from which on an answer of the web holds it; past all where it does not say."""
    if answer.status != 206:
        return 0
    found = _RANGE.match(answer.headers.get("Content-Range", ""))
    return int(found[1]) if found else sys.maxsize


def _digest(writing: IO[bytes]) -> bytes:
    """Return a digest of a file that is being written."""
    writing.flush()
    with Path(writing.name).open("rb") as reading:
        return hashlib.file_digest(reading, "sha256").digest()
