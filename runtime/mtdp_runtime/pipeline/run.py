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
from mtdp_runtime.slide import Slide
from mtdp_runtime.store.layout import TileStatus

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
    buffers = Buffers(todo, backend.batch, tile_px, backend.depth + 2, readers)
    batches = -(-len(todo) // backend.batch)
    in_flight: queue.Queue[tuple[int, Batch, float] | None] = queue.Queue()  # `slots` bounds it
    done: queue.Queue[tuple[Mapping[str, NDArray[np.float32]], NDArray[np.uint8]] | None] = queue.Queue(8)
    slots = threading.Semaphore(backend.depth)

    def read() -> None:
        own = StageTime("read", 1)
        while (claimed := buffers.claim(own)) is not None:
            tiles, batch = claimed
            start = time.perf_counter()
            for index in tiles:
                row = index % buffers.batch
                x0, y0 = int(todo[index, 0]), int(todo[index, 1])
                status, reason = read_tile(slide, batch.tiles[row], x0, y0, scale)
                batch.status[row] = status
                if status != TileStatus.GOOD:
                    _note_bad(buffers, reason, fail_on_bad_tile)
            own.busy_s += time.perf_counter() - start
            own.items += len(tiles)
            buffers.filled(batch, len(tiles))
        with buffers.condition:
            times.read.items += own.items
            times.read.busy_s += own.busy_s
            times.read.blocked_s += own.blocked_s

    def collect() -> None:
        idle_since = time.perf_counter()
        while (entry := _get(buffers, in_flight)) is not None:
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
            buffers.give_back(batch)
            times.infer.blocked_s += _put(buffers, done, (rows, status))
        _put(buffers, done, None)

    def write() -> None:
        left_out = skip
        while (entry := _get(buffers, done)) is not None:
            outputs, status = entry
            start = time.perf_counter()
            store.append({name: values[left_out:] for name, values in outputs.items()}, status[left_out:])
            times.store.busy_s += time.perf_counter() - start
            times.store.items += len(status) - left_out
            if on_progress is not None:
                on_progress(len(status) - left_out)
            left_out = 0

    start = time.perf_counter()
    threads = [_thread(buffers, read, f"read-{i}") for i in range(readers)]
    threads += [_thread(buffers, collect, "collect"), _thread(buffers, write, "store")]

    def drain() -> None:
        # A slide may fail after its last batch was submitted and before anybody waits for it; the engine that the next
        # slide gets must have nothing in flight. An engine that failed itself is not asked again.
        while not isinstance(buffers.error, BackendError) and not in_flight.empty():
            entry = in_flight.get_nowait()
            if entry is not None:
                with suppress(Exception):
                    backend.result(entry[0])

    with _joined(buffers, threads, drain):
        for number in range(batches):
            while not slots.acquire(timeout=0.1):
                if buffers.error is not None:
                    raise Stopped
            batch = buffers.take(number)
            submitted_s = time.perf_counter()
            _put(buffers, in_flight, (backend.submit(batch.tiles), batch, submitted_s))
            if number + 1 == backend.depth:
                buffers.engine_is_fed()
        _put(buffers, in_flight, None)
    times.readers = buffers.turns
    times.wall_s = time.perf_counter() - start
    return times, buffers.bad


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


@contextmanager
def _joined(buffers: Buffers, threads: list[threading.Thread], drain: Callable[[], None]) -> Iterator[None]:
    """Start the threads; on the way out wait for all of them, and raise the first error after `drain`."""
    for thread in threads:
        thread.start()
    try:
        yield
    except Stopped:
        pass
    except BaseException as error:  # an interrupt, too: the threads must end before the store closes
        buffers.fail(error)
    for thread in threads:
        thread.join()
    if buffers.error is not None:
        drain()
        raise buffers.error


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
