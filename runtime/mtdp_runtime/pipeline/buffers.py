"""Batch buffers, in bounded number: readers fill them in the order of the tiles; the engine takes them as they are."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.pipeline.timing import BadTiles, StageTime
from mtdp_runtime.store.layout import TileStatus

# Neighbouring tiles share compressed tiles: readers that take turns tile by tile wait for each other's decoding.
RUN_TILES: Final = 8


class Stopped(Exception):
    """Another thread failed first; its error is the one that is raised."""


@dataclass(slots=True)
class Batch:
    """A buffer that the engine takes."""

    tiles: NDArray[np.uint8]  # [batch, tile_px, tile_px, 3]
    status: NDArray[np.uint8]  # [batch]
    unfilled: int = 0
    rows: int = 0


class Buffers:
    """The batch buffers, what is read into them, and whose turn it is to read. All threads of a run share one.

    Readers and the engine share the cores: all readers read while the engine has nothing to do, and then as few of them
    as keep it fed. A run that failed stops whoever waits here.
    """

    def __init__(self, coords: NDArray[np.int64], batch: int, tile_px: int, count: int, readers: int) -> None:
        self.coords = coords
        self.batch = batch
        self.readers = readers
        self.turns = readers
        self.taken = 0
        # Many readers of small batches take fewer: half of the buffers must keep all of them busy.
        self.at_once = min(RUN_TILES, max(1, batch * count // (2 * readers)))
        lock = threading.Lock()
        self.condition = threading.Condition(lock)  # of buffers and batches
        self.turn = threading.Condition(lock)  # apart, so that a full batch does not wake a hundred threads without one
        self.error: BaseException | None = None
        self.free = [
            Batch(np.zeros((batch, tile_px, tile_px, 3), np.uint8), np.zeros(batch, np.uint8)) for _ in range(count)
        ]
        self.filling: dict[int, Batch] = {}  # batch number -> buffer, until it is submitted
        self.next_tile = 0
        self.bad = BadTiles()

    def fail(self, error: BaseException) -> None:
        """End the run with this error, if it is the first."""
        with self.condition:
            if self.error is None:
                self.error = error
            self.condition.notify_all()
            self.turn.notify_all()

    def wait_for(self, ready: Callable[[], bool], condition: threading.Condition | None = None) -> float:
        """Wait under the condition; return the seconds waited.

        Raises:
            Stopped: the run failed meanwhile.
        """
        start = time.perf_counter()
        while self.error is None and not ready():
            (condition or self.condition).wait()
        if self.error is not None:
            raise Stopped
        return time.perf_counter() - start

    def claim(self, times: StageTime) -> tuple[range, Batch] | None:
        """Return the next tiles to read, all of one batch, and its buffer; None when all are claimed."""
        with self.condition:
            times.blocked_s += self.wait_for(lambda: self._all_claimed() or self.taken < self.turns, self.turn)
            self.taken += 1
            times.blocked_s += self.wait_for(lambda: self._all_claimed() or self._has_buffer())
            if self._all_claimed():
                self.turn.notify_all()
                return None
            number = self.next_tile // self.batch
            if number not in self.filling:
                batch = self.free.pop()
                batch.rows = batch.unfilled = min(self.batch, len(self.coords) - number * self.batch)
                batch.tiles[batch.rows :] = 0
                batch.status[:] = TileStatus.GOOD
                self.filling[number] = batch
            batch = self.filling[number]
            claimed = range(self.next_tile, min(self.next_tile + self.at_once, number * self.batch + batch.rows))
            self.next_tile = claimed.stop
            return claimed, batch

    def _all_claimed(self) -> bool:
        return self.next_tile >= len(self.coords)

    def _has_buffer(self) -> bool:
        return bool(self.free) or self.next_tile // self.batch in self.filling

    def filled(self, batch: Batch, tiles: int) -> None:
        """Say that so many claimed tiles are read."""
        with self.condition:
            self.taken -= 1  # and asks for the next turn at once: nobody need be woken
            batch.unfilled -= tiles
            if not batch.unfilled:
                self.condition.notify_all()

    def take(self, number: int) -> Batch:
        """Wait until a batch is full and take it out. The engine has room for it: to wait means that reading lags."""
        with self.condition:
            if not self._is_full(number) and not self._all_claimed() and self.turns < self.readers:
                self.turns = min(self.readers, 2 * self.turns)
                self.turn.notify_all()
            self.wait_for(lambda: self._is_full(number))
            return self.filling.pop(number)

    def _is_full(self, number: int) -> bool:
        return number in self.filling and not self.filling[number].unfilled

    def engine_is_fed(self) -> None:
        """Say that the engine has all the batches that it takes: from here on one reader, until it proves too few."""
        with self.condition:
            self.turns = 1

    def give_back(self, batch: Batch) -> None:
        """Say that the engine is done with it."""
        with self.condition:
            self.free.append(batch)
            self.condition.notify_all()
