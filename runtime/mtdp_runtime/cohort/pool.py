"""Several workers and one queue: the largest slide first, each slide to the worker that is free.

A worker that dies or hangs is replaced; its slide is tried once more, and fails alone if that ends a worker again. What
the workers are (processes here, actors of a cluster) is the crew's to know.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

from mtdp_runtime.cohort.claims import BEAT_S, EXPIRES_S, Held
from mtdp_runtime.cohort.job import Job
from mtdp_runtime.cohort.member import Given, LoadedModel
from mtdp_runtime.cohort.requests import SlideRequest
from mtdp_runtime.cohort.watchdog import CRASHES, LOADING_HINT, MOST_LOST_IN_A_ROW, NO_SLIDE_HINT, lost_line
from mtdp_runtime.errors import BackendError
from mtdp_runtime.extraction.extract import Listeners
from mtdp_runtime.extraction.outcome import Outcome
from mtdp_runtime.files import writable_folder
from mtdp_runtime.slide.identity import size_of
from mtdp_runtime.store.run_log import RunMark

_TICK_S: Final = 1.0
_LOOK_EVERY_S: Final = 2.0
_START_S: Final = 60.0  # that a worker has at least, until it says what it loads: libraries may lie on a slow share


class Crew(Protocol):
    """Workers, by number."""

    size: int

    def start(self, worker: int) -> bool:
        """Start a worker, or a fresh one in the place of one that is gone.

        Say whether it runs from now on; else it tells "here" when it does, which may wait for a machine.
        """
        ...

    def give(self, worker: int, given: Given) -> None:
        """Give a slide to a worker that has none."""
        ...

    def events(self, timeout_s: float) -> Iterable[tuple[int, str, Any]]:
        """Return what workers told (see `member`), and "lost" with the reason of those that are gone."""
        ...

    def end(self, worker: int) -> None:
        """End a worker at once."""
        ...

    def close(self, stopped: bool) -> None:
        """End all workers; `stopped` ones may be at a slide."""
        ...


def _give_back(begun: Mapping[str, Any] | None) -> None:
    """Remove the claim of a worker that is gone."""
    if begun is not None and begun["claim"]:
        Path(begun["claim"]).unlink(missing_ok=True)


@dataclass(slots=True)
class _Desk:
    """Where a worker is, as far as it told."""

    here: bool = False  # its process runs; of fewer slides than workers some never start
    ready: bool = False
    loads: str = ""  # the model that it loads now
    at: SlideRequest | None = None
    reserved: SlideRequest | None = None  # it stages it meanwhile
    begun: dict[str, Any] | None = None  # the slide's line and claim
    heard_s: float = 0.0


@dataclass(slots=True)
class _Queue:
    """The slides that are left."""

    waiting: deque[SlideRequest]
    held: dict[SlideRequest, Held] = field(default_factory=dict)  # another run has them: looked at again at the end
    look_s: float = 0.0
    give_up_s: float = 0.0

    def next(self, all_else_is_done: bool, now_s: float) -> SlideRequest | None:
        if self.waiting:
            return self.waiting.popleft()
        if not self.held or not all_else_is_done or now_s < self.look_s:
            return None
        self.look_s, self.give_up_s = now_s + _LOOK_EVERY_S, self.give_up_s or now_s + EXPIRES_S + BEAT_S
        self.waiting.extend(self.held)
        return self.waiting.popleft()

    def is_left_to_its_owner(self, request: SlideRequest, found: Held, now_s: float) -> bool:
        """Say whether a slide that another run has is left to it, and else note it for later."""
        first = self.held.pop(request, None)
        if first is None or (found.beat == first.beat != "" and now_s < self.give_up_s):
            self.held[request] = first or found
            return False
        return True


def largest_first(requests: Sequence[SlideRequest]) -> list[SlideRequest]:
    """Return slides by their bytes: what takes longest must not come last."""
    return sorted(requests, key=lambda request: -size_of(request.path))


class Pool:
    """One run of several workers."""

    def __init__(
        self,
        job: Job,
        crew: Crew,
        mark: RunMark,
        listeners: Callable[[int], Listeners],
        on_ready: Callable[[Sequence[LoadedModel]], None],
        say: Callable[[str], None],
    ) -> None:
        self._job, self._crew, self._mark = job, crew, mark
        self._listeners = [listeners(worker) for worker in range(crew.size)]
        self._on_ready, self._say = on_ready, say
        self._desks = [_Desk() for _ in range(crew.size)]
        self._lost: Counter[SlideRequest] = Counter()
        self._lost_in_a_row = 0
        self._queue = _Queue(deque())

    def extract(self, settled: Mapping[str, Any]) -> Iterator[Outcome]:
        """Yield how each slide went, as they come; those that are settled are left out.

        Raises:
            BackendError, OutputUnwritable: what would fail for every slide ends the run.
        """
        if len(self._job.folders) > 1:
            for folder in self._job.folders:
                writable_folder(folder)
        todo = [request for request in self._job.slides if request.name not in settled]
        self._queue.waiting.extend(largest_first(todo))
        left, stopped = len(todo), True
        try:
            for worker in range(min(self._crew.size, left)):
                self._start(worker)
            while left:
                self._give()
                for worker, kind, what in self._told():
                    outcome = self._hear(worker, kind, what)
                    if outcome is not None:
                        left -= 1
                        yield outcome
            stopped = False
        finally:
            self._crew.close(stopped)
            for desk in self._desks:
                if desk.at is not None:
                    _give_back(desk.begun)

    def _start(self, worker: int) -> None:
        self._desks[worker] = _Desk(heard_s=time.monotonic())
        self._desks[worker].here = self._crew.start(worker)

    def _give(self) -> None:
        """Give slides to the workers that are free."""
        now = time.monotonic()
        for worker, desk in enumerate(self._desks):
            if not desk.ready or desk.at is not None:
                continue
            quiet = all(one.at is None and one.reserved is None for one in self._desks)
            request = desk.reserved or self._queue.next(quiet, now)
            if request is None:
                continue
            ahead = self._job.stage is not None and bool(self._queue.waiting)
            desk.at, desk.reserved = request, self._queue.waiting.popleft() if ahead else None
            desk.begun, desk.heard_s = None, now
            self._crew.give(worker, (request, desk.reserved))

    def _told(self) -> Iterator[tuple[int, str, Any]]:
        """Yield what workers told; who is silent is asked after all of that was heard: one that is gone is replaced."""
        yield from list(self._crew.events(_TICK_S))
        yield from self._silent()

    def _silent(self) -> list[tuple[int, str, Any]]:
        """End workers that hang at their start, a model or a slide, and return that they are lost."""
        limit, found = self._job.stall_limit_s, []
        for worker, desk in enumerate(self._desks):
            at_work = desk.here and (not desk.ready or desk.at is not None)
            allowed = limit if desk.ready or desk.loads else max(limit, _START_S)
            if limit and at_work and time.monotonic() - desk.heard_s > allowed:
                self._crew.end(worker)
                found.append((worker, "lost", f"read and computed nothing for {allowed:g} s and was ended"))
        return found

    def _hear(self, worker: int, kind: str, what: Any) -> Outcome | None:
        """Take what a worker told; return the outcome where a slide is settled by it."""
        desk, listeners = self._desks[worker], self._listeners[worker]
        desk.heard_s = time.monotonic()
        match kind:
            case "here":
                desk.here = True
            case "ready":
                desk.ready = True
                self._on_ready(what)
            case "watch":
                desk.begun = what if "begin" in what else desk.begun
                desk.loads = what.get("load", desk.loads)
            case "slide":
                listeners.on_slide(what)
            case "phase":
                listeners.on_phase(what)
            case "plan":
                listeners.on_plan(*what)
            case "progress":
                listeners.on_progress(what)
            case "say":
                self._say(what)
            case "broken":
                raise what
            case "outcome":
                return self._settled(desk, what)
            case "lost":
                return self._replace(worker, what)
        return None

    def _settled(self, desk: _Desk, found: Outcome | Held) -> Outcome | None:
        request, desk.at = desk.at, None
        assert request is not None
        self._lost_in_a_row = 0
        if isinstance(found, Outcome):
            self._queue.held.pop(request, None)
            return found
        if not self._queue.is_left_to_its_owner(request, found, time.monotonic()):
            return None
        return Outcome(request.path, "claimed", message=f"{found.by} works on it", name=request.name)

    def _replace(self, worker: int, why: str) -> Outcome | None:
        """Start a fresh worker; the slide of the one that is gone is tried once more, and fails the second time.

        Raises:
            BackendError: it is not the slides.
        """
        desk = self._desks[worker]
        request, begun = desk.at, desk.begun
        if not desk.ready:
            while_ = f"loaded the model {desk.loads}" if desk.loads else "started"
            raise BackendError(f"a worker {why} while it {while_}", hint=LOADING_HINT if desk.loads else NO_SLIDE_HINT)
        for one in (desk.reserved, request):
            if one is not None and one not in self._queue.waiting:
                self._queue.waiting.appendleft(one)
        self._start(worker)
        if request is None:
            return None
        _give_back(begun)
        self._lost[request] += 1
        if self._lost[request] == 1:
            return None
        self._queue.waiting.remove(request)
        self._lost_in_a_row += 1
        line = begun["line"] if begun is not None else {"slide": str(request.path), "status": "failed"}
        line = lost_line(line, why, any(name in why for name in CRASHES))
        self._mark.append(self._job.out, line)
        if self._lost_in_a_row >= MOST_LOST_IN_A_ROW:
            raise BackendError(
                f"{self._lost_in_a_row} slides in a row ended their workers: the run ends",
                hint="mtdp-doctor tries the engines; see run.jsonl for each slide.",
            )
        outcome = Outcome(request.path, "failed", message=line["message"], hint=line["hint"], name=request.name)
        return replace(outcome, attempt=line.get("attempt", ""))
