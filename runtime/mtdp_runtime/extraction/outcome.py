"""How a slide went, and the line of run.jsonl that says so."""

from __future__ import annotations

import os
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mtdp_runtime.errors import RuntimeFailure
from mtdp_runtime.extraction.check import Agreement
from mtdp_runtime.pipeline.timing import RunTimes

Status = Literal["done", "skipped", "no-tissue", "planned", "claimed", "failed", "passed-over"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a slide went: one line of run.jsonl."""

    slide: Path
    status: Status
    output: Path | None = None
    tiles: int = 0  # rows of the file
    bad_tiles: int = 0
    seconds: float = 0.0
    times: RunTimes | None = None
    message: str = ""
    hint: str = ""
    agreement: Agreement | None = None  # with the reference, where that was asked for
    attempt: str = ""  # of what failed: the same again is not tried again unasked
    outputs: tuple[Path, ...] = ()  # the file of each model; `output` is the first
    left_out: int = 0  # bad tiles that the file has no row of, where that was asked for
    reader: str = ""
    reader_reason: str = ""
    own_decoder: bool = False  # as of SlideInfo
    tiles_before: int = 0  # rows of the file that an earlier run computed
    warning: str = ""  # what is done, and should be looked at
    name: str = ""  # of its output, without extension; empty where it was not attempted


def failed(slide: Path, error: RuntimeFailure, attempt: str = "") -> Outcome:
    """Return the outcome of a slide for an error that was foreseen."""
    return Outcome(slide, "failed", message=str(error), hint=error.hint, attempt=attempt)


def unforeseen(slide: Path, error: Exception, attempt: str = "") -> Outcome:
    """Return the outcome of a slide for any other exception: a line with its place in the code, no traceback."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    message = f"{slide}: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    if isinstance(error, PermissionError):  # of a file, whatever the place in the code
        message = f"{slide}: {error.strerror}"
        if error.filename is not None and os.fspath(error.filename) != str(slide):
            message += f": {error.filename}"
    hint = "The file is damaged in a way that was not foreseen, or this is an error of mtdp: please report it."
    return Outcome(slide, "failed", message=" ".join(message.split()), hint=hint, attempt=attempt)


def log_line(outcome: Outcome) -> dict[str, Any]:
    """Return the line of run.jsonl, which `--json` prints, too."""
    line: dict[str, Any] = {
        "slide": str(outcome.slide),
        **({"name": outcome.name} if outcome.name else {}),
        "status": outcome.status,
        "output": str(outcome.output) if outcome.output else None,
        "tiles": outcome.tiles,
        "bad_tiles": outcome.bad_tiles,
        "seconds": round(outcome.seconds, 3),
    }
    if outcome.left_out:
        line["left_out"] = outcome.left_out
    if outcome.tiles_before:
        line["tiles_before"] = outcome.tiles_before
    if outcome.reader:
        line |= {"reader": outcome.reader, "reader_reason": outcome.reader_reason}
    if len(outcome.outputs) > 1:
        line["outputs"] = [str(path) for path in outcome.outputs]
    if outcome.times is not None:
        line |= {
            "tiles_per_s": round(outcome.times.tiles_per_s, 1),
            "bottleneck": outcome.times.bottleneck,
            "device_idle": round(outcome.times.device_idle, 3),
        }
    if outcome.agreement is not None:
        line["check"] = asdict(outcome.agreement)
    if outcome.warning:
        line["warning"] = outcome.warning
    if outcome.message:
        line |= {"message": outcome.message, "hint": outcome.hint}
    if outcome.attempt:
        line["attempt"] = outcome.attempt
    return line
