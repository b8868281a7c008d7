"""A job that is under way in this process, and what of a slide stands already or failed before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mtdp_runtime.cohort import unread
from mtdp_runtime.cohort.job import Job, Pass
from mtdp_runtime.cohort.requests import SlideRequest
from mtdp_runtime.cohort.staging import IsDone, Staging
from mtdp_runtime.cohort.uploads import Uploads
from mtdp_runtime.cohort.watchdog import Unwatched, Worker
from mtdp_runtime.extraction.extract import SILENT, Listeners
from mtdp_runtime.extraction.models import Model, Target
from mtdp_runtime.extraction.scales import AtScale
from mtdp_runtime.store import run_log
from mtdp_runtime.store.run_log import RunMark
from mtdp_runtime.urls import SlideUrl


@dataclass(frozen=True, slots=True)
class Run:
    """A job that is under way in this process: what its slides share."""

    job: Job
    models: Sequence[Model]
    listeners: Listeners = SILENT
    worker: Worker = field(default_factory=Unwatched)
    staging: Staging | None = None
    uploads: Uploads | None = None
    failures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of earlier runs: `run_log.failures`
    mark: RunMark = field(default_factory=RunMark)


def failed_before(request: SlideRequest, run: Run) -> Mapping[str, Any] | None:
    """Return the line of an earlier run, where it failed and there is no file that could have come since."""
    if not run.failures or all_there(request, run):
        return None
    return run.failures.get(attempt_key(request, run))


def targets_in(one: Pass, models: Sequence[Model], request: SlideRequest, stated: str = "") -> list[Target]:
    """Return the file of each model, at one scale; `stated` is what is known of a slide without a look into it."""
    return [
        Target(folder / f"{request.name}.h5", model, unread.key_of(request, model, one.settings, stated))
        for folder, model in zip(one.folders, models, strict=True)
    ]


def scales_of(request: SlideRequest, run: Run, stated: str = "") -> list[AtScale]:
    """Return what a slide fills at each scale."""
    return [AtScale(one.settings, targets_in(one, run.models, request, stated)) for one in run.job.passes]


def targets_of(request: SlideRequest, run: Run, stated: str = "") -> list[Target]:
    """Return the same of all scales together."""
    return [target for scale in scales_of(request, run, stated) for target in scale.targets]


def who_knows(request: SlideRequest, run: Run) -> IsDone | None:
    """Return what says whether a slide is done by what is stated of it; None where it must be looked into."""
    uploads = run.uploads
    if run.job.check or not (uploads or isinstance(request.path, SlideUrl)):
        return None

    def is_done(stated: str) -> bool:
        targets = targets_of(request, run, stated)
        return (uploads is not None and uploads.are_done(targets, run.job.kinds)) or unread.stand(
            targets, run.job.report
        )

    return is_done


def all_there(request: SlideRequest, run: Run) -> bool:
    """Say whether each model's file has its name, at each scale."""
    return all(target.path.exists() for target in targets_of(request, run))


def attempt_key(request: SlideRequest, run: Run) -> str:
    """Return 16 hex digits of what decides whether trying again can end otherwise; empty where that is not known."""
    if isinstance(request.path, SlideUrl):  # it may have changed: no look at it is as good as trying again
        return ""
    path, given = request.path, unread.facts_of_given(request)
    facts = [run_log.absolute(path), unread.size_and_time(path), request.mpp, given, asdict(run.job.settings)]
    facts += run.job.scales
    for model in run.models:
        facts += [model.bundle.digest, model.backend.name, model.backend.precision, model.backend.batch]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
