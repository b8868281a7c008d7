"""The page of a folder of features: every slide of all its runs, what failed first, made from what is on the disk."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from mtdp_runtime.errors import OutputUnwritable, UsageError
from mtdp_runtime.files import remove_strays, write_atomically
from mtdp_runtime.report import places
from mtdp_runtime.report.page import asset, document
from mtdp_runtime.report.rows import Folder, read_folder
from mtdp_runtime.report.run_sections import causes, footer, how_it_was_made, summary, time_by_stage, what_was_slow
from mtdp_runtime.report.run_table import slides_table

_LOCK: Final = ".index.lock"
_PATIENCE_S: Final = 60.0
_LOOK_EVERY_S: Final = 0.1


def write_run_page(out: Path) -> Path:
    """Write `report/index.html` of a folder anew, from the feature files and run.jsonl that are there now.

    Any number of processes may do so: who comes later sees what those before it had finished.

    Returns:
        The page.

    Raises:
        UsageError: there is no such folder.
        OutputUnwritable: the page cannot be written. Nothing else is touched.
    """
    path = places.run_page(out)
    if not out.is_dir():
        raise UsageError(f"{out}: no such folder", hint="Name the folder that was given as --out.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent):
            remove_strays(path)
            text = run_page(read_folder(out), out)
            write_atomically(path, text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise OutputUnwritable(
            f"{path}: cannot be written: {error.strerror or error}",
            hint="The features are complete: free space, or ask for the right to write, and run the command again.",
        ) from error
    return path


def run_page(folder: Folder, out: Path) -> str:
    """Return the page of what a folder holds."""
    title = f"Features of {out.resolve().name or out}"
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    parts = [
        f"<main>{summary(folder.rows, title)}",
        causes(folder.rows),
        slides_table(folder.rows, out),
        time_by_stage(folder.rows),
        what_was_slow(folder.rows),
        how_it_was_made(folder),
        f"</main>{footer(made)}",
    ]
    return document(title, parts, asset("run.js"))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep others from making the page meanwhile, where the file system has locks; who never ends is not waited for."""
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        give_up_s = time.monotonic() + _PATIENCE_S
        with suppress(OSError):
            while not _locked(lock) and time.monotonic() < give_up_s:
                time.sleep(_LOOK_EVERY_S)
        yield
    finally:
        os.close(lock)


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
