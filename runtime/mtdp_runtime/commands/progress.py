"""How far a run is: one line at the bottom of a terminal, or a plain line every minute where there is none."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from mtdp_runtime.commands import console
from mtdp_runtime.extraction.extract import TILES, Listeners
from mtdp_runtime.extraction.outcome import Outcome
from mtdp_runtime.printable import printable
from mtdp_runtime.units import cells, duration, shorten

_TICK_S: Final = 0.5
PLAIN_EVERY_S: Final = 60.0
_NAME_COLUMNS: Final = 12  # a name gets these before the sum of all slides may take room


@dataclass(slots=True)
class _Slide:
    """A slide at work."""

    path: Path
    begun_s: float
    phase: str = "opening"
    tiles: int = 0
    done: int = 0
    before: int = 0  # of these, by an earlier run
    tiles_s: float = 0.0  # when the first tile was begun

    def rate(self, now_s: float) -> float:
        """Return tiles a second, of this run alone: what was there already cost nothing now; 0 where not known."""
        computed, passed_s = self.done - self.before, now_s - self.tiles_s
        return computed / passed_s if self.phase == TILES and computed > 0 and passed_s > 0 else 0.0


class Progress:
    """Hears of the slides of a run, and shows where it is. A context manager: leaving removes the line."""

    def __init__(
        self, slides: int, left: int = 0, *, shown: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin a run of so many slides, of which some were left behind by a process before this one."""
        self._slides, self._left, self._clock = slides, left, clock
        self._shown = shown and not console.is_quiet()
        self._at: dict[int, _Slide] = {}  # by worker
        self._worked_s: list[float] = []  # of each slide that was computed in this run
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def listeners(self, worker: int = 0) -> Listeners:
        """Return what one worker is to tell."""
        return Listeners(
            partial(self.on_plan, worker=worker),
            partial(self.on_progress, worker=worker),
            on_slide=partial(self.on_slide, worker=worker),
            on_phase=partial(self.on_phase, worker=worker),
        )

    def on_slide(self, path: Path, worker: int = 0) -> None:
        """Hear that a slide is begun."""
        self._at = {**self._at, worker: _Slide(path, self._clock())}  # another thread looks at it

    def on_phase(self, phase: str, worker: int = 0) -> None:
        """Hear what is done with the slide now."""
        if worker in self._at:
            self._at[worker].phase = phase

    def on_plan(self, tiles: int, done: int, worker: int = 0) -> None:
        """Hear how many tiles a slide has, and how many of them an earlier run did."""
        at = self._at[worker]
        at.tiles, at.done, at.before, at.tiles_s, at.phase = tiles, done, done, self._clock(), TILES

    def on_progress(self, tiles: int, worker: int = 0) -> None:
        """Hear that so many tiles more are done; those of a check are none of these."""
        if self._at[worker].phase == TILES:
            self._at[worker].done += tiles

    def on_outcome(self, outcome: Outcome) -> None:
        """Hear that a slide is left."""
        for worker, at in self._at.items():
            if at.path == outcome.slide:
                if outcome.status in ("done", "no-tissue"):
                    self._worked_s.append(self._clock() - at.begun_s)
                self._at = {other: one for other, one in self._at.items() if other != worker}
        self._left += 1
        console.set_status("")

    def line(self, columns: int) -> str:
        """Return where the run is, in so many columns of a terminal; empty between two slides."""
        at = list(self._at.values())
        if not at:
            return ""
        prefix = f"[{self._left + 1}/{self._slides}] " if self._slides > 1 else ""
        name = at[0].path.name
        now, all_slides = self._now(at[0]) if len(at) == 1 else self._now_of_many(at)
        tail = f"  {now}{all_slides}"
        if columns - cells(prefix + tail) < min(cells(name), _NAME_COLUMNS):
            tail = f"  {now}"
        room = max(columns - cells(prefix + tail), min(8, columns))
        return _cut(f"{prefix}{shorten(printable(name), room)}{tail}", columns)

    def _now(self, at: _Slide) -> tuple[str, str]:
        """Return what happens to the slide now, and how long all slides still take, where that is known."""
        passed_s = self._clock() - at.begun_s
        if at.phase != TILES:
            return at.phase, self._all(0.0, passed_s)
        rate, text = at.rate(self._clock()), f"{at.done}/{at.tiles} tiles"
        if not rate:
            return text, self._all(0.0, passed_s) if self._worked_s else ""
        eta_s = (at.tiles - at.done) / rate
        return f"{text}, {rate:.3g} tiles/s, {duration(eta_s)} left", self._all(eta_s, passed_s)

    def _now_of_many(self, at: Sequence[_Slide]) -> tuple[str, str]:
        """Return what several workers do, as a sum; the first slide's name stands before it."""
        rate = sum(one.rate(self._clock()) for one in at)
        text = f"and {len(at) - 1} more: {sum(one.done for one in at)}/{sum(one.tiles for one in at)} tiles"
        later = self._slides - self._left - len(at)
        rest = ""
        if self._worked_s and later > 0:
            rest = f" (all: {duration(later * sum(self._worked_s) / len(self._worked_s) / len(at))})"
        return f"{text}, {rate:.3g} tiles/s" if rate else text, rest

    def _all(self, eta_s: float, passed_s: float) -> str:
        later = self._slides - self._left - 1
        if later <= 0:
            return ""
        computed = [*self._worked_s, passed_s + eta_s] if eta_s else self._worked_s
        if not computed:
            return ""
        return f" (all: {duration(eta_s + later * sum(computed) / len(computed))})"

    def __enter__(self) -> Self:
        if self._shown:
            with contextlib.suppress(RuntimeError):  # no more threads: what works needs them, and says so
                self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        console.set_status("")

    def _watch(self) -> None:
        on_terminal = console.is_terminal(sys.stderr)
        while not self._end.wait(_TICK_S if on_terminal else PLAIN_EVERY_S):
            if on_terminal:
                console.set_status(self.line(console.columns() - 1))  # a full line would scroll
            elif self._at:
                console.progress(self.line(10_000))


def _cut(text: str, columns: int) -> str:
    while cells(text) > columns:
        text = text[:-1]
    return text
