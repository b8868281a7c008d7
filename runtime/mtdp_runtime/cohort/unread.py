"""What decides the files of a slide, as far as it is known without a look into the slide.

A slide behind a URL is not fetched to find out that its file is done already: its server states size and ETag, and the
file holds a digest of these and of all else that decides it. Where the digests differ the slide is fetched and compared
as any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mtdp_runtime.cohort.requests import SlideRequest
from mtdp_runtime.extraction.models import Model, Target
from mtdp_runtime.extraction.unchanged import stands_unread
from mtdp_runtime.report.places import slide_report
from mtdp_runtime.report.slide import report_is_current
from mtdp_runtime.settings import ExtractSettings
from mtdp_runtime.store import run_log
from mtdp_runtime.version import __version__


def key_of(request: SlideRequest, model: Model, settings: ExtractSettings, stated: str) -> str:
    """Return what decides a feature file as 32 hex digits; empty where nothing is stated of the slide."""
    if not stated:
        return ""
    facts: list[Any] = [__version__, run_log.absolute(request.path), stated, request.mpp, facts_of_given(request)]
    facts += [asdict(settings), model.bundle.digest, model.backend.precision]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def facts_of_given(request: SlideRequest) -> list[list[Any] | None]:
    """Return names, sizes and times of what is given with a slide."""
    given = (request.mask, request.coords, request.classes)
    return [None if path is None else [run_log.absolute(path), size_and_time(path)] for path in given]


def size_and_time(path: Path) -> list[int] | None:
    """Return bytes and nanoseconds; None where the file is not there."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def stand(targets: Sequence[Target], report: bool) -> bool:
    """Say whether the files of a slide are here, by their keys; its report, too, which cannot be made without it."""
    return all(
        stands_unread(one.path, one.key)
        and (not report or report_is_current(slide_report(one.path.parent, one.path.stem), one.path))
        for one in targets
    )
