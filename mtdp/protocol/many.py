"""Running the cells of a protocol by several workers: trainings first, then what takes longest."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mtdp.errors import CellsFailed, Interrupted, MtdpError, UsageError
from mtdp.protocol.cells import Cell, cost
from mtdp.protocol.crew import Crew, Done, Told
from mtdp.protocol.run import AGAIN, WAIT_S, Protocol, training_needed
from mtdp.protocol.settings import check_runnable, hold_to_settings
from mtdp.run_state import waiting_signals

_TICK_S: Final = 0.5
_SEEN_S: Final = 90.0  # a network share may show a new file to other machines after a minute


def run_by_many(
    protocol: Protocol, start_crew: Callable[[Path], Crew], say: Callable[[str], None] = lambda text: None
) -> None:
    """Compute every missing cell, as `run_protocol` does; the result of a cell does not depend on its worker.

    A worker that dies costs its cell one more try. What fails alone leaves the others to be done.

    Args:
        protocol: what to compute; other runs may share its folder.
        start_crew: makes the workers, of which each must see the file that it is given.

    Raises:
        UsageError: the folder holds a run of other settings, this one could not be run to its end, or a worker could
            compute nothing.
        CellsFailed: some cells could not be computed; the others are done.
        Interrupted: SIGINT or SIGTERM came; trainings that were under way saved their state.
    """
    check_runnable(protocol.tasks, protocol.config)
    hold_to_settings(protocol.tasks, protocol.config, protocol.out)
    with waiting_signals() as caught, _marked(protocol.out) as mark:
        crew = start_crew(mark)
        try:
            for cells in protocol.phases():
                _Phase(protocol, cells, crew, say).run(caught)
        finally:
            crew.close()


@dataclass(slots=True)
class _Phase:
    """Cells that need nothing but each other, and what came before."""

    protocol: Protocol
    cells: Sequence[Cell]
    crew: Crew
    say: Callable[[str], None]
    done: set[Cell] = field(default_factory=set)
    at_work: dict[int, Cell] = field(default_factory=dict)
    held: dict[Cell, float] = field(default_factory=dict)  # by another run: when to look again
    lost: Counter[Cell] = field(default_factory=Counter)
    failed: dict[Cell, MtdpError] = field(default_factory=dict)

    def run(self, caught: Sequence[int]) -> None:
        self.done = {cell for cell in self.cells if self.protocol.result(cell) is not None}
        missing = self._in_order([cell for cell in self.cells if cell not in self.done])
        waiting = list(missing)
        while waiting or self.at_work:
            for worker in sorted(set(range(self.crew.size)) - set(self.at_work)):
                cell = next((cell for cell in waiting if self._may_begin(cell)), None)
                if cell is None:
                    break
                waiting.remove(cell)
                self.at_work[worker] = cell
                self.say(f"begun: {cell.name}")
                self.crew.start(worker, cell)
            if not self.at_work and not self.held:
                break  # what is left needs a training that failed
            if not self.at_work:
                time.sleep(_TICK_S)
            for worker, told in self.crew.ended(_TICK_S):
                cell = self.at_work.pop(worker)
                if self._is_left(cell, told):
                    waiting.insert(0, cell)
            if caught:
                raise Interrupted(caught[0], f"stopped; {len(self.done)} of {len(self.cells)} cells are done", AGAIN)
        if self.failed:
            first, left = next(iter(self.failed.values())), len(self.cells) - len(self.done)
            raise CellsFailed(f"{first.message} ({left} of {len(self.cells)} cells are not done)", first.hint)
        _until_seen(self.protocol, missing)

    def _in_order(self, cells: Sequence[Cell]) -> list[Cell]:
        """A training before what waits for it, the largest first; seeds one after the other where a run has them so."""
        by_seed = len(self.protocol.config.combinations()) == 1
        tasks, config = self.protocol.tasks, self.protocol.config
        return sorted(
            cells,
            key=lambda cell: (by_seed and cell.seed, cell.kind != "pretrain", -cost(cell, tasks, config)),
        )

    def _may_begin(self, cell: Cell) -> bool:
        if self.held.get(cell, 0.0) > time.monotonic():
            return False
        needed = training_needed(self.protocol, cell)
        return needed is None or needed in self.done

    def _is_left(self, cell: Cell, told: Told) -> bool:
        """Take what became of a cell; say whether it is to be computed still.

        Raises:
            UsageError: it is not the cell.
        """
        was_held = self.held.pop(cell, None)
        match told:
            case Done():
                self.done.add(cell)
                self.say(f"[{len(self.done)}/{len(self.cells)}] {cell.name}: {told.seconds:.1f} s on {told.host}")
                return False
            case None:
                if was_held is None:
                    self.say(f"another run computes {cell.name}")
                self.held[cell] = time.monotonic() + WAIT_S
                return True
            case str():
                self.lost[cell] += 1
                if self.lost[cell] == 1:
                    self.say(f"{cell.name}: its worker {told}; it is tried once more")
                    return True
                told = CellsFailed(
                    f"{cell.name}: its worker {told}, twice", "see the machine's log; it may lack memory"
                )
            case UsageError():
                raise told
        self.say(f"failed: {cell.name}: {told.message}")
        self.failed[cell] = told
        return False


@contextmanager
def _marked(out: Path) -> Iterator[Path]:
    """A file of this run's own in its folder."""
    mark = out / "locks" / f"{uuid.uuid4().hex}.run"
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


def _until_seen(protocol: Protocol, cells: Sequence[Cell]) -> None:
    """Wait until this machine sees what others wrote.

    Raises:
        UsageError: it does not.
    """
    give_up_s = time.monotonic() + _SEEN_S
    for path in map(protocol.result_path, cells):
        while not path.is_file():
            if time.monotonic() > give_up_s:
                raise UsageError(f"a worker wrote {path}, and it is not there", "--out must be a folder that all share")
            time.sleep(_TICK_S)
            list(path.parent.glob("*"))  # which some shares need to look again
