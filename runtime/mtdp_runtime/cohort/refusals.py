"""What can be known of one slide before any work, and keeps that slide alone from being done."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from mtdp_runtime.cohort.job import Job
from mtdp_runtime.cohort.requests import SlideRequest
from mtdp_runtime.errors import OutputUnwritable, RuntimeFailure, SlideUnreadable
from mtdp_runtime.formats import FORMATS

# What the libraries of buckets take for the end of a name, or leave out of it: two slides would have one.
_CUT_IN_A_BUCKET: Final = re.compile(r"[\x00-\x1f\x7f\\]|\?versionid=", re.IGNORECASE)
_NAME_MAX: Final = 255  # bytes of a name, of nearly all file systems
# The longest that is put around a slide's name, while its files are written.
_AROUND_H5: Final = len(".") + len(".h5.partial.undo.new")
_AROUND_REPORT: Final = len(".") + len(".123456.partial.html")
_AROUND_RECORD: Final = len(".") + len(".123456.partial.json")
_PROCESS: Final = len(".4194304.partial")  # the largest id of a process


def why_refused(request: SlideRequest, job: Job) -> RuntimeFailure | None:
    """Return why a slide of a job cannot be done, as far as its names say; None where nothing shows that."""
    if "\0" in f"{request.path}{request.name}{request.mask or ''}{request.coords or ''}{request.classes or ''}":
        return SlideUnreadable(f"{request.path}: a path cannot hold a zero byte", hint="Correct the manifest.")
    if job.upload is not None and (found := _CUT_IN_A_BUCKET.search(request.name)):
        return OutputUnwritable(
            f"{request.path}: a name in a bucket cannot hold {found[0]!r}",
            hint="Give it another one: a manifest with the columns slide,name.",
        )
    most, needed = _longest_name(job.out), len(os.fsencode(request.name)) + _around(job)
    if needed > most:
        return OutputUnwritable(
            f"{request.path}: its name is too long: its files need names of {needed} bytes, and {most} are possible",
            hint="Give it a shorter one: a manifest with the columns slide,name.",
        )
    return None


def _around(job: Job) -> int:
    """Return the bytes that are put around a slide's name."""
    longest = [_AROUND_H5]
    if job.report:
        longest += [_AROUND_REPORT, _AROUND_RECORD]
    for name in job.formats:
        for place, _ in FORMATS[name].parts():
            longest.append(len(".") + len(Path(place).name.replace("{name}", "")) + _PROCESS)
        longest.append(_AROUND_RECORD)
    return max(longest)


def _longest_name(folder: Path) -> int:
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError):
        return _NAME_MAX
