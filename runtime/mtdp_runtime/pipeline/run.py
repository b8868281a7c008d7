"""Reads, infers and stores at once, in bounded memory and in order.

    readers (threads)  ->  submit (calling thread)  ->  collect (thread)  ->  store (thread)

Readers fill batch buffers that the backend takes as they are. A fixed number of buffers exists: when all are in use the
readers wait. Batches are submitted, collected and stored in the order of the tiles. Only this module and `buffers` know
threads, queues and clocks.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import BackendError, TileUnreadable
from mtdp_runtime.pipeline.buffers import Batch, Buffers, Stopped
from mtdp_runtime.pipeline.read import read_tile
from mtdp_runtime.pipeline.timing import BadTiles, RunTimes, StageTime
from mtdp_runtime.slide import Slide, Source
from mtdp_runtime.store.layout import TileStatus

Progress = Callable[[int], None]
T = TypeVar("T")


class BatchEngine(Protocol):
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


def run_pipeline(
    slide: Slide,
    coords: NDArray[np.int64],
    scale: float,
    tile_px: int,
    engine: BatchEngine,
    store: RowStore,
    *,
    readers: int,
    on_progress: Progress | None = None,
    fail_on_bad_tile: bool = False,
    source: Source | None = None,
    queued: int = 8,
) -> tuple[RunTimes, BadTiles]:
    """Extract the features of all tiles that the store does not hold yet.

    Args:
        slide: any number of threads reads it.
        coords: int64[N, 2], level-0 origins of all tiles, in the order of the rows.
        scale: level-0 pixels per output pixel.
        tile_px: side of a tile.
        engine: loaded; its batch size decides how rows are grouped, from row 0 of the slide on.
        store: open; rows before `store.rows_done` are kept as they are.
        readers: reading threads, at most; as few of them read at a time as keep the engine fed.
        on_progress: called from a thread with the number of rows just stored.
        fail_on_bad_tile: raise at the first tile that cannot be read.
        source: what all tiles are resampled from; each by itself what the law allows where None.
        queued: batches that may wait to be stored.

    Raises:
        TileUnreadable: only with fail_on_bad_tile.
        BackendError, OutputUnwritable: as the stages raise them; all threads are joined before.
    """
    run = _Run(
        slide,
        coords,
        scale,
        tile_px,
        engine,
        store,
        readers=readers,
        on_progress=on_progress or (lambda rows: None),
        fail_on_bad_tile=fail_on_bad_tile,
        source=source,
        queued=queued,
    )
    start = time.perf_counter()
    with run.threads():
        run.submit()
    run.times.readers = run.buffers.turns
    run.times.wall_s = time.perf_counter() - start
    return run.times, run.buffers.bad


class _Run:
    """One slide on its way: what the stages share, and each stage as a method."""

    def __init__(
        self,
        slide: Slide,
        coords: NDArray[np.int64],
        scale: float,
        tile_px: int,
        engine: BatchEngine,
        store: RowStore,
        *,
        readers: int,
        on_progress: Progress,
        fail_on_bad_tile: bool,
        source: Source | None,
        queued: int,
    ) -> None:
        # Batches are cut from the grid alone, so a resumed run computes each row in the same company.
        first = store.rows_done - store.rows_done % engine.batch
        self.skip = store.rows_done - first  # rows of the first batch that the store holds
        self.todo = coords[first:]
        self.slide, self.scale, self.source = slide, scale, source
        self.engine, self.store = engine, store
        self.on_progress = on_progress
        self.fail_on_bad_tile = fail_on_bad_tile
        self.times = RunTimes(tiles=len(coords) - store.rows_done)
        self.times.read.threads = readers
        self.buffers = Buffers(self.todo, engine.batch, tile_px, engine.depth + 2, readers)
        self.slots = threading.Semaphore(engine.depth)
        self.in_flight: queue.Queue[tuple[int, Batch, float] | None] = queue.Queue()  # `slots` bounds it
        self.done: queue.Queue[tuple[Mapping[str, NDArray[np.float32]], NDArray[np.uint8]] | None]
        self.done = queue.Queue(queued)

    @contextmanager
    def threads(self) -> Iterator[None]:
        """Start the threads; on the way out wait for all of them, and raise the first error after `drain`."""
        threads = [_thread(self.buffers, self.read, f"read-{i}") for i in range(self.buffers.readers)]
        threads += [_thread(self.buffers, self.collect, "collect"), _thread(self.buffers, self.write, "store")]
        for thread in threads:
            thread.start()
        try:
            yield
        except Stopped:
            pass
        except BaseException as error:  # an interrupt, too: the threads must end before the store closes
            self.buffers.fail(error)
        for thread in threads:
            thread.join()
        if self.buffers.error is not None:
            self.drain()
            raise self.buffers.error

    def read(self) -> None:
        """Fill buffers with tiles, in the order of the grid; any number of threads does."""
        buffers, own = self.buffers, StageTime("read", 1)
        while (claimed := buffers.claim(own)) is not None:
            tiles, batch = claimed
            start = time.perf_counter()
            for index in tiles:
                row = index % buffers.batch
                x0, y0 = int(self.todo[index, 0]), int(self.todo[index, 1])
                status, reason = read_tile(self.slide, batch.tiles[row], x0, y0, self.scale, self.source)
                batch.status[row] = status
                if status != TileStatus.GOOD:
                    _note_bad(buffers, reason, self.fail_on_bad_tile)
            own.busy_s += time.perf_counter() - start
            own.items += len(tiles)
            buffers.filled(batch, len(tiles))
        with buffers.condition:
            times = self.times.read
            times.items += own.items
            times.busy_s += own.busy_s
            times.blocked_s += own.blocked_s

    def submit(self) -> None:
        """Give full batches to the engine, as many as it takes; runs in the calling thread."""
        buffers = self.buffers
        for number in range(-(-len(self.todo) // self.engine.batch)):
            while not self.slots.acquire(timeout=0.1):
                if buffers.error is not None:
                    raise Stopped
            batch = buffers.take(number)
            submitted_s = time.perf_counter()
            _put(buffers, self.in_flight, (self.engine.submit(batch.tiles), batch, submitted_s))
            if number + 1 == self.engine.depth:
                buffers.engine_is_fed()
        _put(buffers, self.in_flight, None)

    def collect(self) -> None:
        """Take the engine's results, and give the buffers back."""
        buffers, times = self.buffers, self.times.infer
        idle_since = time.perf_counter()
        while (entry := _get(buffers, self.in_flight)) is not None:
            ticket, batch, submitted_s = entry
            times.starved_s += max(0.0, submitted_s - idle_since)
            outputs = self.engine.result(ticket)
            self.slots.release()
            now = time.perf_counter()
            times.busy_s += now - max(submitted_s, idle_since)
            times.items += batch.rows
            idle_since = now
            rows = {name: values[: batch.rows] for name, values in outputs.items()}
            status = batch.status[: batch.rows].copy()
            buffers.give_back(batch)
            times.blocked_s += _put(buffers, self.done, (rows, status))
        _put(buffers, self.done, None)

    def write(self) -> None:
        """Store the rows, without those that an earlier run stored."""
        times, left_out = self.times.store, self.skip
        while (entry := _get(self.buffers, self.done)) is not None:
            outputs, status = entry
            start = time.perf_counter()
            self.store.append({name: values[left_out:] for name, values in outputs.items()}, status[left_out:])
            times.busy_s += time.perf_counter() - start
            times.items += len(status) - left_out
            self.on_progress(len(status) - left_out)
            left_out = 0

    def drain(self) -> None:
        """Take what is still in flight out of the engine, after a failure.

        A slide may fail after its last batch was submitted and before anybody waits for it; the engine that the next
        slide gets must have nothing in flight. An engine that failed itself is not asked again.
        """
        while not isinstance(self.buffers.error, BackendError) and not self.in_flight.empty():
            entry = self.in_flight.get_nowait()
            if entry is not None:
                with suppress(Exception):
                    self.engine.result(entry[0])


def _note_bad(buffers: Buffers, reason: str, fail: bool) -> None:
    if fail:
        raise TileUnreadable(reason, hint="Leave out --on-bad-tile fail to store such tiles as NaN, with their status.")
    with buffers.condition:
        buffers.bad.count += 1
        if len(buffers.bad.reasons) < 20:
            buffers.bad.reasons.append(reason)


def _thread(buffers: Buffers, work: Callable[[], None], name: str) -> threading.Thread:
    def guarded() -> None:
        try:
            work()
        except Stopped:
            pass
        except BaseException as error:
            buffers.fail(error)

    return threading.Thread(target=guarded, name=f"mtdp-{name}", daemon=True)


def _get(buffers: Buffers, items: queue.Queue[T]) -> T:
    while True:
        try:
            return items.get(timeout=0.1)
        except queue.Empty:
            if buffers.error is not None:
                raise Stopped from None


def _put(buffers: Buffers, items: queue.Queue[T], item: T) -> float:
    """Put an item; return the seconds waited for room."""
    start = time.perf_counter()
    while True:
        try:
            items.put(item, timeout=0.1)
            return time.perf_counter() - start
        except queue.Full:
            if buffers.error is not None:
                raise Stopped from None
