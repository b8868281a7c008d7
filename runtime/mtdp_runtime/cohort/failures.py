"""The slides that a run leaves as failed: by cause, and as `failed.csv`, a manifest to mend and give back."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from mtdp_runtime.cohort.requests import SlideRequest
from mtdp_runtime.cohort.slide_table import FAILED_COLUMNS, SlideRow, read_slide_table
from mtdp_runtime.errors import UsageError
from mtdp_runtime.extraction.outcome import FOUND_EARLIER
from mtdp_runtime.files import remove_strays, write_atomically
from mtdp_runtime.store import run_log

NAME: Final = "failed.csv"
Lines = Mapping[str, Mapping[str, Any]]  # the name of a slide's output -> `run_log.counts` of how it went
_NUMBER: Final = re.compile(r"\b(?:0x)?[0-9][0-9a-f.]*\b")


@dataclass(frozen=True, slots=True)
class Cause:
    """What several slides failed of."""

    text: str  # the message of the first, without the names of its slide and mask
    hint: str
    slides: tuple[str, ...]  # file names, in the order of the run


def by_cause(requests: Sequence[SlideRequest], lines: Lines) -> list[Cause]:
    """Group the failed slides of a run: alike are a hint, and a message but for names and numbers; most slides first.

    Args:
        requests: the slides of the run.
        lines: how they went.
    """
    causes: dict[tuple[str, str], Cause] = {}
    for request in requests:
        line = lines.get(request.name)
        if line is None or line["status"] != "failed":
            continue
        hint = str(line.get("hint", ""))
        text = _without_names(_message(line), request)
        alike = (_NUMBER.sub("#", text), _NUMBER.sub("#", _without_names(hint, request)))
        first = causes.get(alike, Cause(text, hint, ()))
        causes[alike] = replace(first, slides=(*first.slides, request.path.name))
    return sorted(causes.values(), key=lambda cause: -len(cause.slides))


def _message(line: Mapping[str, Any]) -> str:
    return " ".join(str(line.get("message", "")).removesuffix(FOUND_EARLIER).split())


def _without_names(text: str, request: SlideRequest) -> str:
    """Return a message without what names this slide or its mask.

    >>> _without_names("/x/a.svs: 3 of its 7 tiles, says /x/a.svs", SlideRequest(Path("/x/a.svs")))
    '3 of its 7 tiles, says <slide>'
    """
    for path, word in ((request.path, "<slide>"), (request.mask, "<mask>")):
        if path is not None:
            for name in (run_log.absolute(path), str(path), path.name):
                text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", word, text)
    text = re.sub(rf"(?<=[/.]){re.escape(request.name)}(?=\.\w)", "<slide>", text)  # of what is made of it
    return text.removeprefix("<slide>: ")


def update_failed_csv(out: Path, requests: Sequence[SlideRequest], lines: Lines) -> int:
    """Write `failed.csv` of a folder anew after a run; where nothing is left to list there is none.

    It holds this run's failures, and what other runs of the folder (parts of a cohort, other lists) put there and this
    one did not settle. Paths are absolute; the column `message` is for people.

    Args:
        out: the folder.
        requests: the slides of the run.
        lines: how they went.

    Returns:
        How many of its lines are of other runs.

    Raises:
        OSError: it cannot be written or removed.
        UsageError: what was there cannot be read as such a table. It is replaced where this run has failures.
    """
    path, unread = out / NAME, None
    with run_log.locked(out):
        try:
            before = _rows(path)
        except UsageError as error:
            before, unread = [], error
        settled = {name for name, line in lines.items() if line["status"] != "claimed"}
        others = [row for row in before if (row.name or Path(row.slide).stem) not in settled]
        rows = [[row.slide, row.mpp, row.mask, row.name, row.message] for row in others]
        for request in requests:
            line = lines.get(request.name)
            if line is not None and line["status"] == "failed":
                rows.append(_row(request, _message(line)))
        if rows:
            remove_strays(path)
            write_atomically(path, _table(rows))
        elif unread is None and (path.is_symlink() or path.exists()):
            path.unlink()
    if unread is not None:
        raise unread
    return len(others)


def update_after(
    out: Path, requests: Sequence[SlideRequest], lines: Lines, say: Callable[[str], None] = lambda text: None
) -> None:
    """Do `update_failed_csv`, and say what could not be done: a list that fails is no reason for a run to fail."""
    path = out / NAME
    try:
        others = update_failed_csv(out, requests, lines)
    except UsageError as error:
        say(f"{error}; failures of other runs that it listed are in run.jsonl alone")
    except OSError as error:
        say(f"{path}: the failed slides cannot be listed there: {error.strerror}; run.jsonl has them")
    else:
        if others:
            say(f"{path} also lists {others} slides of other runs that failed; delete the lines that nobody needs")


def _rows(path: Path) -> list[SlideRow]:
    """Return what is listed now; a link, a pipe or a folder is none of ours."""
    if path.is_symlink() or not path.is_file() or len(path.read_bytes().splitlines()) < 2:
        return []
    return [
        replace(row, slide=_absolute(path, row.slide), mask=_absolute(path, row.mask) if row.mask else "")
        for row in read_slide_table(path, lambda text: None)
    ]


def _absolute(table: Path, named: str) -> str:
    return run_log.absolute(table.parent / named)


def _row(request: SlideRequest, message: str) -> list[str]:
    mpp = "" if request.mpp is None else repr(float(request.mpp))
    mask = "" if request.mask is None else run_log.absolute(request.mask)
    return [run_log.absolute(request.path), mpp, mask, request.called, message]


def _table(rows: Sequence[Sequence[str]]) -> bytes:
    """Return a CSV. Names that are no UTF-8 keep their bytes, which `read_slide_table` knows of this table."""
    lines = "".join(map(_line, (FAILED_COLUMNS, *rows)))
    return lines.encode("utf-8", errors="surrogateescape")


def _line(fields: Sequence[str]) -> str:
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator="\r\n").writerow(fields)  # of which it quotes each
    return stream.getvalue().removesuffix("\r\n") + "\n"
