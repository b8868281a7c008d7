"""run.jsonl: a line a slide, appended by any number of processes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from mtdp_runtime.errors import OutputUnwritable

NAME: Final = "run.jsonl"


def append(out: Path, line: Mapping[str, Any]) -> None:
    """Append a line in one write, under a lock where the file system has locks.

    O_APPEND alone keeps lines apart on a local disk; between the clients of a network share the lock does.

    Raises:
        OutputUnwritable: the folder cannot be written.
    """
    # A file name that is no UTF-8 holds surrogates; escaped like this they are JSON and read back as they were.
    text = json.dumps(line, ensure_ascii=False) + "\n"
    data = text.encode("utf-8", errors="backslashreplace")
    path = out / NAME
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            with contextlib.suppress(OSError):
                fcntl.lockf(file, fcntl.LOCK_EX)
            while data:
                data = data[os.write(file, data) :]
        finally:
            os.close(file)  # which unlocks
    except OSError as error:
        raise OutputUnwritable(
            f"{path}: cannot be written: {error.strerror}", hint="Free space or choose another --out."
        ) from error


def failures(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the lines of slides whose last attempt failed, by slide and attempt; lines not ours are skipped."""
    last: dict[tuple[str, str], dict[str, Any]] = {}
    try:
        lines = (out / NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    for text in lines:
        try:
            line = json.loads(text)
            slide, attempt, failed = line["slide"], line.get("attempt", ""), line["status"] == "failed"
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # the torn last line of a machine that lost power
        if failed and attempt:
            last[slide, attempt] = line
        elif not failed:
            last = {key: value for key, value in last.items() if key[0] != slide}
    return last
