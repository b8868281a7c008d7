"""Reads, infers and stores at once, in bounded memory and in order.

    readers (threads)  ->  submit (calling thread)  ->  collect (thread)  ->  store (thread)

Readers fill batch buffers that the backend takes as they are. A fixed number of buffers exists: when all are in use the
readers wait. Batches are submitted, collected and stored in the order of the tiles. This module alone knows threads,
queues and clocks.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import BackendError, TileUnreadable
from mtdp_runtime.layout import TileStatus
from mtdp_runtime.read import read_tile
from mtdp_runtime.slide import Slide

# Neighbouring tiles share compressed tiles: readers that take turns tile by tile wait for each other's decoding. With
# 8 at a time two threads read an unaligned grid 1.9 times as fast as one by one (benchmarks/RESULTS.md).
RUN_TILES: Final = 8

Progress = Callable[[int], None]
T = TypeVar("T")


class Engine(Protocol):
    """What of a backend the pipeline uses; see `backends.Backend`."""

    batch: int
    depth: int

    def submit(self, tiles: NDArray[np.uint8]) -> int: ...

    def result(self, ticket: int) -> Mapping[str, NDArray[np.float32]]: ...


class RowStore(Protocol):
    """What of a store the pipeline uses; see `store.FeatureStore`."""

    @property
    def rows_done(self) -> int: ...

    def append(self, outputs: Mapping[str, NDArray[np.float32]], status: NDArray[np.uint8]) -> None: ...


@dataclass(slots=True)
class StageTime:
    """What a stage did, summed over its threads."""

    name: str
    threads: int
    items: int = 0
    busy_s: float = 0.0
    starved_s: float = 0.0  # waited for input
    blocked_s: float = 0.0  # waited for room behind it


@dataclass(slots=True)
class RunTimes:
    """How a run went. `bottleneck` is computed from the records."""

    wall_s: float = 0.0
    tiles: int = 0
    readers: int = 1  # that kept the engine fed, of the threads of `read`
    read: StageTime = field(default_factory=lambda: StageTime("read", 1))
    infer: StageTime = field(default_factory=lambda: StageTime("infer", 1))
    store: StageTime = field(default_factory=lambda: StageTime("store", 1))

    @property
    def device_idle(self) -> float:
        """Share of the run in which the engine had nothing to do."""
        return min(1.0, self.infer.starved_s / self.wall_s) if self.wall_s > 0 else 0.0

    @property
    def bottleneck(self) -> str:
        """The stage that the others waited for."""
        stages = (self.read, self.infer, self.store)
        return max(stages, key=lambda stage: stage.busy_s / stage.threads).name

    @property
    def tiles_per_s(self) -> float:
        return self.tiles / self.wall_s if self.wall_s > 0 else 0.0


@dataclass(slots=True)
class BadTiles:
    """Tiles that could not be read: how many, and the first reasons."""

    count: int = 0
    reasons: list[str] = field(default_factory=list)


class Stopped(Exception):
    """Another thread failed first; its error is the one that is raised."""


@dataclass(slots=True)
class _Batch:
    tiles: NDArray[np.uint8]  # [batch, tile_px, tile_px, 3]
    status: NDArray[np.uint8]  # [batch]
    unfilled: int = 0
    rows: int = 0


class _Run:
    """The state that the threads share."""

    def __init__(self, coords: NDArray[np.int64], batch: int, tile_px: int, buffers: int, readers: int) -> None:
        self.coords = coords
        self.batch = batch
        self.readers = readers
        # Readers and the engine share the cores: all readers read while the engine has nothing to do, and then as few
        # of them as keep it fed. Who has no turn sleeps apart, so that a full batch does not wake a hundred threads.
        self.turns = readers
        self.taken = 0
        # Many readers of small batches take fewer: half of the buffers must keep all of them busy.
        self.at_once = min(RUN_TILES, max(1, batch * buffers // (2 * readers)))
        lock = threading.Lock()
        self.condition = threading.Condition(lock)  # of buffers and batches
        self.turn = threading.Condition(lock)
        self.error: BaseException | None = None
        self.free = [
            _Batch(np.zeros((batch, tile_px, tile_px, 3), np.uint8), np.zeros(batch, np.uint8)) for _ in range(buffers)
        ]
        self.filling: dict[int, _Batch] = {}  # batch number -> buffer, until it is submitted
        self.next_tile = 0
        self.bad = BadTiles()

    def fail(self, error: BaseException) -> None:
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

    def claim(self, times: StageTime) -> tuple[range, _Batch] | None:
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

    def filled(self, batch: _Batch, tiles: int) -> None:
        with self.condition:
            self.taken -= 1  # and asks for the next turn at once: nobody need be woken
            batch.unfilled -= tiles
            if not batch.unfilled:
                self.condition.notify_all()

    def take(self, number: int) -> _Batch:
        """Wait until a batch is full and take it out. The engine has room for it: to wait means that reading lags."""
        with self.condition:
            if not self._is_full(number) and self.turns < self.readers:
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

    def give_back(self, batch: _Batch) -> None:
        with self.condition:
            self.free.append(batch)
            self.condition.notify_all()


def run_pipeline(
    slide: Slide,
    coords: NDArray[np.int64],
    scale: float,
    tile_px: int,
    backend: Engine,
    store: RowStore,
    readers: int,
    on_progress: Progress | None = None,
    fail_on_bad_tile: bool = False,
) -> tuple[RunTimes, BadTiles]:
    """Extract the features of all tiles that the store does not hold yet.

    Args:
        slide: any number of threads reads it.
        coords: int64[N, 2], level-0 origins of all tiles, in the order of the rows.
        scale: level-0 pixels an output pixel.
        tile_px: side of a tile.
        backend: loaded; its batch size decides how rows are grouped, from row 0 of the slide on.
        store: open; rows before `store.rows_done` are kept as they are.
        readers: reading threads, at most; as few of them read at a time as keep the engine fed.
        on_progress: called from a thread with the number of rows just stored.
        fail_on_bad_tile: raise at the first tile that cannot be read.

    Raises:
        TileUnreadable: only with fail_on_bad_tile.
        BackendError, OutputUnwritable: as the stages raise them; all threads are joined before.
    """
    # Batches are cut from the grid alone, so a resumed run computes each row in the same company.
    first = store.rows_done - store.rows_done % backend.batch
    skip = store.rows_done - first
    todo = coords[first:]
    times = RunTimes(tiles=len(coords) - store.rows_done)
    times.read.threads = readers
    run = _Run(todo, backend.batch, tile_px, backend.depth + 2, readers)
    batches = -(-len(todo) // backend.batch)
    in_flight: queue.Queue[tuple[int, _Batch, float] | None] = queue.Queue()  # `slots` bounds it
    done: queue.Queue[tuple[Mapping[str, NDArray[np.float32]], NDArray[np.uint8]] | None] = queue.Queue(8)
    slots = threading.Semaphore(backend.depth)

    def read() -> None:
        own = StageTime("read", 1)
        while (claimed := run.claim(own)) is not None:
            tiles, batch = claimed
            start = time.perf_counter()
            for index in tiles:
                row = index % run.batch
                x0, y0 = int(todo[index, 0]), int(todo[index, 1])
                status, reason = read_tile(slide, batch.tiles[row], x0, y0, scale)
                batch.status[row] = status
                if status != TileStatus.GOOD:
                    _note_bad(run, reason, fail_on_bad_tile)
            own.busy_s += time.perf_counter() - start
            own.items += len(tiles)
            run.filled(batch, len(tiles))
        with run.condition:
            times.read.items += own.items
            times.read.busy_s += own.busy_s
            times.read.blocked_s += own.blocked_s

    def collect() -> None:
        idle_since = time.perf_counter()
        while (entry := _get(run, in_flight)) is not None:
            ticket, batch, submitted_s = entry
            times.infer.starved_s += max(0.0, submitted_s - idle_since)
            outputs = backend.result(ticket)
            slots.release()
            now = time.perf_counter()
            times.infer.busy_s += now - max(submitted_s, idle_since)
            times.infer.items += batch.rows
            idle_since = now
            rows = {name: values[: batch.rows] for name, values in outputs.items()}
            status = batch.status[: batch.rows].copy()
            run.give_back(batch)
            times.infer.blocked_s += _put(run, done, (rows, status))
        _put(run, done, None)

    def write() -> None:
        left_out = skip
        while (entry := _get(run, done)) is not None:
            outputs, status = entry
            start = time.perf_counter()
            store.append({name: values[left_out:] for name, values in outputs.items()}, status[left_out:])
            times.store.busy_s += time.perf_counter() - start
            times.store.items += len(status) - left_out
            if on_progress is not None:
                on_progress(len(status) - left_out)
            left_out = 0

    start = time.perf_counter()
    threads = [_thread(run, read, f"read-{i}") for i in range(readers)]
    threads += [_thread(run, collect, "collect"), _thread(run, write, "store")]

    def drain() -> None:
        # A slide may fail after its last batch was submitted and before anybody waits for it; the engine that the next
        # slide gets must have nothing in flight. An engine that failed itself is not asked again.
        while not isinstance(run.error, BackendError) and not in_flight.empty():
            entry = in_flight.get_nowait()
            if entry is not None:
                with suppress(Exception):
                    backend.result(entry[0])

    with _joined(run, threads, drain):
        for number in range(batches):
            while not slots.acquire(timeout=0.1):
                if run.error is not None:
                    raise Stopped
            batch = run.take(number)
            submitted_s = time.perf_counter()
            _put(run, in_flight, (backend.submit(batch.tiles), batch, submitted_s))
            if number + 1 == backend.depth:
                run.engine_is_fed()
        _put(run, in_flight, None)
    times.readers = run.turns
    times.wall_s = time.perf_counter() - start
    return times, run.bad


def _note_bad(run: _Run, reason: str, fail: bool) -> None:
    if fail:
        raise TileUnreadable(reason, hint="Leave out --on-bad-tile fail to store such tiles as NaN, with their status.")
    with run.condition:
        run.bad.count += 1
        if len(run.bad.reasons) < 20:
            run.bad.reasons.append(reason)


def _thread(run: _Run, work: Callable[[], None], name: str) -> threading.Thread:
    def guarded() -> None:
        try:
            work()
        except Stopped:
            pass
        except BaseException as error:
            run.fail(error)

    return threading.Thread(target=guarded, name=f"mtdp-{name}", daemon=True)


@contextmanager
def _joined(run: _Run, threads: list[threading.Thread], drain: Callable[[], None]) -> Iterator[None]:
    """Start the threads; on the way out wait for all of them, and raise the first error after `drain`."""
    for thread in threads:
        thread.start()
    try:
        yield
    except Stopped:
        pass
    except BaseException as error:  # an interrupt, too: the threads must end before the store closes
        run.fail(error)
    for thread in threads:
        thread.join()
    if run.error is not None:
        drain()
        raise run.error


def _get(run: _Run, items: queue.Queue[T]) -> T:
    while True:
        try:
            return items.get(timeout=0.1)
        except queue.Empty:
            if run.error is not None:
                raise Stopped from None


def _put(run: _Run, items: queue.Queue[T], item: T) -> float:
    """Put an item; return the seconds waited for room."""
    start = time.perf_counter()
    while True:
        try:
            items.put(item, timeout=0.1)
            return time.perf_counter() - start
        except queue.Full:
            if run.error is not None:
                raise Stopped from None
