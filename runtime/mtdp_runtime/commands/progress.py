"""How far a run is: one line at the bottom of a terminal, or a plain line every minute where there is none."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from mtdp_runtime.commands import console
from mtdp_runtime.extraction.extract import TILES, Listeners
from mtdp_runtime.extraction.outcome import Outcome
from mtdp_runtime.printable import printable
from mtdp_runtime.tiling.plan import Plan
from mtdp_runtime.units import cells, duration, shorten

_TICK_S: Final = 0.5
PLAIN_EVERY_S: Final = 60.0
_NAME_COLUMNS: Final = 12  # a name gets these before the sum of all slides may take room


class Progress:
    """Hears of the slides of a run, and shows where it is. A context manager: leaving removes the line."""

    def __init__(
        self, slides: int, left: int = 0, *, shown: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin a run of so many slides, of which some were left behind by a process before this one."""
        self._slides, self._left, self._clock = slides, left, clock
        self._shown = shown and not console.is_quiet()
        self._name, self._phase = "", ""
        self._tiles = self._done = self._before = 0
        self._slide_s = self._tiles_s = clock()
        self._worked_s: list[float] = []  # of each slide that was computed in this run
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def listeners(self) -> Listeners:
        """Return what to tell the run."""
        return Listeners(self.on_plan, self.on_progress, on_slide=self.on_slide, on_phase=self.on_phase)

    def on_slide(self, path: Path) -> None:
        """Hear that a slide is begun."""
        self._name, self._phase, self._slide_s = path.name, "opening", self._clock()
        self._tiles = self._done = self._before = 0

    def on_phase(self, phase: str) -> None:
        """Hear what is done with the slide now."""
        self._phase = phase

    def on_plan(self, plan: Plan, done: int) -> None:
        """Hear how many tiles a slide has, and how many of them an earlier run did."""
        self._tiles, self._done, self._before, self._tiles_s = len(plan.kept), done, done, self._clock()
        self._phase = TILES

    def on_progress(self, tiles: int) -> None:
        """Hear that so many tiles more are done; those of a check are none of these."""
        if self._phase == TILES:
            self._done += tiles

    def on_outcome(self, outcome: Outcome) -> None:
        """Hear that a slide is left."""
        if self._name and outcome.status in ("done", "no-tissue"):
            self._worked_s.append(self._clock() - self._slide_s)
        self._left += 1
        self._name = ""
        console.set_status("")

    def line(self, columns: int) -> str:
        """Return where the run is, in so many columns of a terminal; empty between two slides."""
        name = self._name
        if not name:
            return ""
        prefix = f"[{self._left + 1}/{self._slides}] " if self._slides > 1 else ""
        now, all_slides = self._now()
        tail = f"  {now}{all_slides}"
        if columns - cells(prefix + tail) < min(cells(name), _NAME_COLUMNS):
            tail = f"  {now}"
        room = max(columns - cells(prefix + tail), min(8, columns))
        return _cut(f"{prefix}{shorten(printable(name), room)}{tail}", columns)

    def _now(self) -> tuple[str, str]:
        """Return what happens to the slide now, and how long all slides still take, where that is known."""
        passed_s = self._clock() - self._slide_s
        if self._phase != TILES:
            return self._phase, self._all(0.0, passed_s)
        tiles_s, computed = self._clock() - self._tiles_s, self._done - self._before
        text = f"{self._done}/{self._tiles} tiles"
        if computed <= 0 or tiles_s <= 0:
            return text, self._all(0.0, passed_s) if self._worked_s else ""
        rate = computed / tiles_s  # of this run alone: what was there already cost nothing now
        eta_s = (self._tiles - self._done) / rate
        return f"{text}, {rate:.3g} tiles/s, {duration(eta_s)} left", self._all(eta_s, passed_s)

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
            elif self._name:
                console.progress(self.line(10_000))


def _cut(text: str, columns: int) -> str:
    while cells(text) > columns:
        text = text[:-1]
    return text
