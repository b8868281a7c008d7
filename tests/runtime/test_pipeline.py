"""The pipeline: in order, in bounded memory, and it ends whatever fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from mtdp_runtime.backends import Probe
from mtdp_runtime.bundle import Bundle
from mtdp_runtime.errors import BackendError, OutputUnwritable, TileUnreadable
from mtdp_runtime.pipeline.buffers import Batch, Buffers, Stopped
from mtdp_runtime.pipeline.run import run_pipeline
from mtdp_runtime.pipeline.timing import StageTime
from mtdp_runtime.store.layout import Layout, TileStatus
from mtdp_runtime.store.writer import FeatureStore
from support import info_of

TILE_PX, BATCH = 4, 8


class CountingSlide:
    """Its pixel at (x, y) is x; reads take random times; some places are damaged."""

    def __init__(self, bad: frozenset[int] = frozenset(), jitter_s: float = 0.0) -> None:
        self.info = info_of(100_000, 100, 0.5)
        self.bad = bad
        self.jitter_s = jitter_s
        self.reads = 0

    def read_into(self, out: NDArray[np.uint8], x0: int, y0: int, scale: float) -> None:
        self.reads += 1
        if self.jitter_s:
            time.sleep(float(np.random.default_rng(x0).uniform(0, self.jitter_s)))
        if x0 in self.bad:
            raise TileUnreadable(f"damaged at {x0}")
        out[..., 0], out[..., 1], out[..., 2] = x0 % 256, x0 // 256, 7

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None: ...


class EchoBackend:
    """Features are the tile's first pixel and the sum of its whole batch, so company shows."""

    name, precision, batch, depth, note = "echo", "fp32", BATCH, 2, ""

    def __init__(self, fail_at: int = -1, delay_s: float = 0.0) -> None:
        self.fail_at = fail_at
        self.delay_s = delay_s
        self.pending: dict[int, NDArray[np.uint8]] = {}
        self.submitted = 0
        self.most_in_flight = 0

    @classmethod
    def probe(cls) -> Probe:
        return Probe("echo", True, "")

    @classmethod
    def load(cls, bundle: Bundle, precision: str, batch: int, threads: int) -> Self:
        return cls()

    def submit(self, tiles: NDArray[np.uint8]) -> int:
        self.pending[self.submitted] = tiles
        self.most_in_flight = max(self.most_in_flight, len(self.pending))
        self.submitted += 1
        return self.submitted - 1

    def result(self, ticket: int) -> Mapping[str, NDArray[np.float32]]:
        time.sleep(self.delay_s)
        if ticket == self.fail_at:
            raise BackendError("the engine broke")
        tiles = self.pending.pop(ticket)
        company = np.full((BATCH, 1), tiles.astype(np.float64).sum(), np.float32)
        return {"features": np.concatenate([tiles[:, 0, 0, :].astype(np.float32), company], axis=1)}

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None: ...


def coords_of(rows: int) -> NDArray[np.int64]:
    return np.stack([np.arange(rows) * 3, np.zeros(rows)], axis=1).astype(np.int64)


def store_at(path: Path, rows: int) -> FeatureStore:
    layout = Layout(
        coords_of(rows), np.ones(rows, np.float32), {"features": 4}, {"name": "s"}, {"model": "m"}, {"slide": "s"}, "r"
    )
    return FeatureStore(path, layout)


def run(
    path: Path, rows: int, slide: CountingSlide, backend: EchoBackend, readers: int = 3, fail: bool = False
) -> NDArray[np.float32]:
    with store_at(path, rows) as store:
        times, _ = run_pipeline(slide, coords_of(rows), 1.0, TILE_PX, backend, store, readers, None, fail)
        store.finish({})
    assert times.read.items >= times.tiles
    with h5py.File(path) as file:
        features: NDArray[np.float32] = file["features"][:]
        return features


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 16, 203])
@pytest.mark.parametrize("readers", [1, 3])
def test_rows_come_in_the_order_of_the_tiles(tmp_path: Path, rows: int, readers: int) -> None:
    features = run(tmp_path / "s.h5", rows, CountingSlide(jitter_s=0.001), EchoBackend(), readers)
    xs = coords_of(rows)[:, 0]
    np.testing.assert_array_equal(features[:, :3], np.stack([xs % 256, xs // 256, np.full(rows, 7)], axis=1))


def test_the_engine_is_kept_two_batches_deep_and_never_deeper(tmp_path: Path) -> None:
    backend = EchoBackend(delay_s=0.005)
    run(tmp_path / "s.h5", 120, CountingSlide(), backend)
    assert backend.most_in_flight == 2


def test_reading_waits_for_the_engine_in_bounded_memory(tmp_path: Path) -> None:
    slide = CountingSlide()
    gate = threading.Event()

    class Held(EchoBackend):
        def result(self, ticket: int) -> Mapping[str, NDArray[np.float32]]:
            assert gate.wait(10)
            return super().result(ticket)

    worker = threading.Thread(target=run, args=(tmp_path / "s.h5", 400, slide, Held()))
    worker.start()
    time.sleep(0.3)
    read_while_held = slide.reads
    gate.set()
    worker.join(10)
    assert read_while_held == 4 * BATCH  # depth 2, and two buffers more
    assert slide.reads == 400


class CrowdedSlide(CountingSlide):
    """Notes, for each read, how many threads read at that moment."""

    def __init__(self, read_s: float) -> None:
        super().__init__()
        self.read_s = read_s
        self.lock = threading.Lock()
        self.inside = 0
        self.crowd: list[int] = []

    def read_into(self, out: NDArray[np.uint8], x0: int, y0: int, scale: float) -> None:
        with self.lock:
            self.inside += 1
            self.crowd.append(self.inside)
        time.sleep(self.read_s)
        super().read_into(out, x0, y0, scale)
        with self.lock:
            self.inside -= 1


def test_one_reader_reads_while_that_keeps_the_engine_fed() -> None:
    """Without an engine and without clocks: who gets tiles to read, and when."""
    buffers = Buffers(coords_of(10 * BATCH), BATCH, TILE_PX, count=4, readers=4)
    times = StageTime("read", 4)

    def claim() -> tuple[range, Batch]:
        claimed = buffers.claim(times)
        assert claimed is not None
        return claimed

    def take() -> None:
        with suppress(Stopped):
            buffers.take(9)  # the engine has room, and no batch is there

    at_the_start = [claim() for _ in range(4)]  # the engine has nothing to do: each gets some
    for tiles, batch in at_the_start:
        buffers.filled(batch, len(tiles))
    buffers.engine_is_fed()
    tiles, batch = claim()
    second = threading.Thread(target=claim, daemon=True)
    second.start()
    second.join(0.2)
    assert second.is_alive()  # it has no turn
    buffers.filled(batch, len(tiles))
    tiles, batch = claim()  # whoever is done goes on itself
    second.join(0.2)
    assert second.is_alive()
    lagging = threading.Thread(target=take, daemon=True)
    lagging.start()
    second.join(10)
    assert not second.is_alive()
    assert buffers.turns == 2
    buffers.fail(RuntimeError("the end of the test"))
    lagging.join(10)


def test_nobody_gets_a_turn_where_all_is_claimed() -> None:
    """Waiting for the last batch is no sign that the readers are too few."""
    buffers, times = Buffers(coords_of(BATCH), BATCH, TILE_PX, count=4, readers=4), StageTime("read", 4)
    claimed = []
    while sum(len(tiles) for tiles, _ in claimed) < BATCH:
        tiles, batch = buffers.claim(times) or (range(0), None)
        assert batch is not None
        claimed.append((tiles, batch))
    buffers.engine_is_fed()
    taker = threading.Thread(target=buffers.take, args=(0,), daemon=True)
    taker.start()
    taker.join(0.2)
    assert taker.is_alive()  # it waits for what was claimed
    for tiles, batch in claimed:
        buffers.filled(batch, len(tiles))
    taker.join(10)
    assert not taker.is_alive()
    assert buffers.turns == 1


def test_all_readers_read_where_the_engine_waits_for_them(tmp_path: Path) -> None:
    slide = CrowdedSlide(read_s=0.005)
    run(tmp_path / "s.h5", 20 * BATCH, slide, EchoBackend(), readers=4)
    rest = slide.crowd[len(slide.crowd) // 2 :]
    assert np.median(rest) >= 3


@pytest.mark.parametrize("done", [0, 8, 13, 40, 203])
def test_a_resumed_run_computes_rows_in_the_same_company(tmp_path: Path, done: int) -> None:
    whole = run(tmp_path / "whole.h5", 203, CountingSlide(), EchoBackend())
    with store_at(tmp_path / "s.h5", 203) as store:
        if done:
            store.append({"features": whole[:done]}, np.zeros(done, np.uint8))
    slide = CountingSlide()
    resumed = run_resumed(tmp_path / "s.h5", 203, slide)
    np.testing.assert_array_equal(resumed, whole)
    assert slide.reads == 203 - done // BATCH * BATCH


def run_resumed(path: Path, rows: int, slide: CountingSlide) -> NDArray[np.float32]:
    with store_at(path, rows) as store:
        run_pipeline(slide, coords_of(rows), 1.0, TILE_PX, EchoBackend(), store, 2)
        store.finish({})
    with h5py.File(path) as file:
        features: NDArray[np.float32] = file["features"][:]
        return features


def test_bad_tiles_are_counted_and_stored_as_nan(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    with store_at(path, 20) as store:
        _, bad = run_pipeline(CountingSlide(frozenset({3, 57})), coords_of(20), 1.0, TILE_PX, EchoBackend(), store, 3)
        store.finish({})
    assert bad.count == 2
    assert sorted(bad.reasons) == ["damaged at 3", "damaged at 57"]
    with h5py.File(path) as file:
        assert np.flatnonzero(file["status"][:] == TileStatus.UNREADABLE).tolist() == [1, 19]
        assert np.flatnonzero(np.isnan(file["features"][:]).any(axis=1)).tolist() == [1, 19]


def test_a_bad_tile_ends_the_slide_where_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(TileUnreadable, match="damaged at 57"):
        run(tmp_path / "s.h5", 200, CountingSlide(frozenset({57})), EchoBackend(), fail=True)
    assert not (tmp_path / "s.h5").exists()


def test_an_engine_that_fails_ends_the_run_and_all_threads(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="the engine broke"):
        run(tmp_path / "s.h5", 200, CountingSlide(), EchoBackend(fail_at=5))
    assert not [t for t in threading.enumerate() if t.name.startswith("mtdp-")]
    with store_at(tmp_path / "s.h5", 200) as store:
        assert store.rows_done == 5 * BATCH


def test_a_disk_that_fails_ends_the_run_and_all_threads(tmp_path: Path) -> None:
    with store_at(tmp_path / "s.h5", 200) as store:
        append, calls = store.append, []

        def full(outputs: Mapping[str, NDArray[np.float32]], status: NDArray[np.uint8]) -> None:
            calls.append(1)
            if len(calls) == 4:
                raise OutputUnwritable("no space left")
            append(outputs, status)

        store.append = full  # type: ignore[method-assign]
        with pytest.raises(OutputUnwritable, match="no space left"):
            run_pipeline(CountingSlide(), coords_of(200), 1.0, TILE_PX, EchoBackend(), store, 3)
    assert not [t for t in threading.enumerate() if t.name.startswith("mtdp-")]


def test_the_record_names_the_bottleneck(tmp_path: Path) -> None:
    with store_at(tmp_path / "a.h5", 80) as store:
        slow_model, _ = run_pipeline(CountingSlide(), coords_of(80), 1.0, TILE_PX, EchoBackend(delay_s=0.02), store, 2)
    with store_at(tmp_path / "b.h5", 80) as store:
        slow_disk, _ = run_pipeline(CountingSlide(jitter_s=0.02), coords_of(80), 1.0, TILE_PX, EchoBackend(), store, 2)
    assert (slow_model.bottleneck, slow_disk.bottleneck) == ("infer", "read")
    assert slow_model.device_idle < 0.3 < slow_disk.device_idle
    assert slow_model.infer.items == slow_model.store.items == 80


def test_a_slide_that_fails_leaves_nothing_in_flight(tmp_path: Path) -> None:
    """The next slide gets the same engine, also where this one fails right before its next batch is submitted."""
    submitting, failed = threading.Event(), threading.Event()

    class Slow(EchoBackend):
        def submit(self, tiles: NDArray[np.uint8]) -> int:
            if self.submitted == 1 and not failed.is_set():
                submitting.set()
                failed.wait(10)
                time.sleep(0.5)  # who takes results finds the error, and goes
            return super().submit(tiles)

    class Failing(CountingSlide):
        def read_into(self, out: NDArray[np.uint8], x0: int, y0: int, scale: float) -> None:
            try:
                super().read_into(out, x0, y0, scale)
            except TileUnreadable:
                submitting.wait(10)
                failed.set()
                raise

    backend = Slow()
    with pytest.raises(TileUnreadable):
        run(tmp_path / "s.h5", 200, Failing(frozenset({3 * 3 * BATCH})), backend, fail=True)
    assert backend.submitted == 2
    assert backend.pending == {}
    run(tmp_path / "t.h5", 50, CountingSlide(), backend)
