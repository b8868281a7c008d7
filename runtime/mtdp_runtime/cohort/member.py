"""A worker's side of a pool: it loads the models once, attempts the slides that it is given, and tells what happens.

It runs in a process of its own (`processes`) or in an actor (`ray`); both only carry what it tells.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, Final

from mtdp_runtime.bundle import Bundle
from mtdp_runtime.cohort.attempt import attempt
from mtdp_runtime.cohort.claims import Held
from mtdp_runtime.cohort.job import Job
from mtdp_runtime.cohort.requests import SlideRequest
from mtdp_runtime.cohort.run import Engine, under_way
from mtdp_runtime.cohort.watchdog import Worker
from mtdp_runtime.errors import BackendError, RuntimeFailure
from mtdp_runtime.extraction.extract import Listeners
from mtdp_runtime.machine import die_with
from mtdp_runtime.store.run_log import RunMark

# What is told: "ready" list[LoadedModel]; of a slide "slide" Path, "phase" str, "plan" (tiles, done), "progress"
# tiles; "watch" what `Worker` tells; "say" a line; "outcome" Outcome or Held; "broken" a RuntimeFailure of the run.
Tell = Callable[[str, Any], None]
Given = tuple[SlideRequest, SlideRequest | None]  # a slide, and the one that is given next, to be staged meanwhile
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What a worker loaded: as `Backend` says it of itself."""

    number: int  # of the job's bundles
    name: str
    precision: str
    batch: int
    note: str
    reason: str


class _Watched(Worker):
    """Tells where the worker is, through what carries the rest."""

    def __init__(self, tell: Tell) -> None:
        super().__init__({}, -1)
        self._say = tell

    def _tell(self, what: dict[str, Any]) -> None:
        self._say("watch", what)


def work(job: Job, mark: RunMark, given: Iterable[Given], tell: Tell) -> None:
    """Load the models of a job and attempt slides as they are given. What would fail for every slide is told, too."""
    loaded: dict[int, LoadedModel] = {}

    def on_loaded(bundle: Bundle, engine: Engine, reason: str) -> None:
        number = job.bundles.index(bundle)
        loaded[number] = LoadedModel(number, engine.name, engine.precision, engine.batch, engine.note, reason)

    listeners = Listeners(
        on_plan=lambda tiles, done: tell("plan", (tiles, done)),
        on_progress=lambda tiles: tell("progress", tiles),
        on_slide=lambda path: tell("slide", path),
        on_phase=lambda phase: tell("phase", phase),
    )
    mark = replace(mark, host=socket.gethostname())
    try:
        with under_way(
            job, listeners, _Watched(tell), on_loaded, lambda text: tell("say", text), mark, lambda: None
        ) as run:
            tell("ready", list(loaded.values()))
            for request, following in given:
                outcome = attempt(request, run, following)
                tell("outcome", outcome if isinstance(outcome, Held) else replace(outcome, name=request.name))
    except RuntimeFailure as error:
        tell("broken", error)
    except Exception as error:  # a thread that ended silently would be waited for
        tell("broken", BackendError(f"a worker failed: {type(error).__name__}: {error}", hint="Please report it."))


def main(commands_fd: int, events_fd: int, parent: int) -> None:
    """Be a worker process: take the job and the slides from one pipe, and tell through the other."""
    die_with(parent)
    for fd in (commands_fd, events_fd):
        os.set_inheritable(fd, False)
    for signum in _SIGNALS:
        signal.signal(signum, _leave)
    commands, events = Connection(commands_fd, writable=False), Connection(events_fd, readable=False)
    lock = threading.Lock()

    def tell(kind: str, what: Any) -> None:
        with lock, contextlib.suppress(BrokenPipeError):  # who listened is gone, and this process ends with it
            events.send((kind, what))

    job, mark = commands.recv()
    work(job, mark, _received(commands), tell)


def _received(commands: Connection) -> Iterator[Given]:
    with contextlib.suppress(EOFError):
        while True:
            yield commands.recv()


def _leave(signum: int, frame: FrameType | None) -> None:
    for one in _SIGNALS:  # a terminal signals all processes, and the driver once more
        signal.signal(one, signal.SIG_IGN)
    sys.exit(128 + signum)
