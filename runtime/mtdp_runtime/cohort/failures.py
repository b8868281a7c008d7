"""The slides that a run leaves as failed: by cause, and as `failed.csv`, a manifest to mend and give back."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from mtdp_runtime.cohort.requests import SlideRequest
from mtdp_runtime.cohort.slide_table import FAILED_COLUMNS, SlideRow, read_slide_table
from mtdp_runtime.errors import UsageError
from mtdp_runtime.files import remove_strays, write_atomically
from mtdp_runtime.store import causes, run_log
from mtdp_runtime.store.causes import Cause, FailedSlide, plain_message
from mtdp_runtime.urls import is_url

NAME: Final = "failed.csv"
Lines = Mapping[str, Mapping[str, Any]]  # the name of a slide's output -> `run_log.counts` of how it went


def by_cause(requests: Sequence[SlideRequest], lines: Lines) -> list[Cause]:
    """Group the failed slides of a run by what they failed of; most slides first.

    Args:
        requests: the slides of the run.
        lines: how they went.
    """
    found = ((request, lines.get(request.name)) for request in requests)
    return causes.by_cause(
        FailedSlide(
            str(request.path),
            request.name,
            str(line.get("message", "")),
            str(line.get("hint", "")),
            "" if request.mask is None else str(request.mask),
            "" if request.coords is None else str(request.coords),
        )
        for request, line in found
        if line is not None and line["status"] == "failed"
    )


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
        rows = [[row.slide, row.mpp, row.mask, row.name, row.coords, row.classes, row.message] for row in others]
        for request in requests:
            line = lines.get(request.name)
            if line is not None and line["status"] == "failed":
                rows.append(_row(request, plain_message(str(line.get("message", "")))))
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
        replace(
            row,
            slide=_absolute(path, row.slide),
            mask=_absolute(path, row.mask) if row.mask else "",
            coords=_absolute(path, row.coords) if row.coords else "",
            classes=_absolute(path, row.classes) if row.classes else "",
        )
        for row in read_slide_table(path, lambda text: None)
    ]


def _absolute(table: Path, named: str) -> str:
    return run_log.absolute(named if is_url(named) else table.parent / named)


def _row(request: SlideRequest, message: str) -> list[str]:
    mpp = "" if request.mpp is None else repr(float(request.mpp))
    mask = "" if request.mask is None else run_log.absolute(request.mask)
    coords, classes = ("" if one is None else run_log.absolute(one) for one in (request.coords, request.classes))
    return [run_log.absolute(request.path), mpp, mask, request.called, coords, classes, message]


def _table(rows: Sequence[Sequence[str]]) -> bytes:
    """Return a CSV. Names that are no UTF-8 keep their bytes, which `read_slide_table` knows of this table."""
    lines = "".join(map(_line, (FAILED_COLUMNS, *rows)))
    return lines.encode("utf-8", errors="surrogateescape")


def _line(fields: Sequence[str]) -> str:
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator="\r\n").writerow(fields)  # of which it quotes each
    return stream.getvalue().removesuffix("\r\n") + "\n"
