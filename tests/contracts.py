"""What every implementation of a protocol must do: a class of tests that each of them inherits.

A new reader or backend gets a subclass in test_slide_contract.py or test_backend_contract.py, and nothing else.
"""

from __future__ import annotations

import queue
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mtdp_runtime.backends import Backend, Probe
from mtdp_runtime.bundle.tolerance import MIN_COSINE
from mtdp_runtime.errors import TileUnreadable
from mtdp_runtime.slide import Slide
from support import read_square

WIDTH, HEIGHT = 900, 600
TOGETHER = settings(suppress_health_check=[HealthCheck.differing_executors, HealthCheck.function_scoped_fixture])


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class SlideContract:
    """Of `mtdp_runtime.slide.Slide`. A subclass says how to open a slide of WIDTH x HEIGHT px at 0.5 µm per pixel."""

    own_decoder = False  # whether the reader decodes tiles itself
    mean_error = 0.6  # grey levels that means of pixels may be off, on average: levels are rounded when a slide is made

    @pytest.fixture(scope="class")
    @classmethod
    def path(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return cls.write(tmp_path_factory.mktemp("contract"))

    @pytest.fixture(scope="class")
    @classmethod
    def pixels(cls, path: Path) -> NDArray[np.uint8]:
        return cls.read_plainly(path)

    @pytest.fixture
    def slide(self, path: Path) -> Slide:
        with self.open(path) as opened:
            yield opened  # type: ignore[misc]

    @classmethod
    def write(cls, folder: Path) -> Path:
        raise NotImplementedError

    @classmethod
    def read_plainly(cls, path: Path) -> NDArray[np.uint8]:
        """Return uint8[HEIGHT, WIDTH, 3]: level 0, read some other way."""
        raise NotImplementedError

    def open(self, path: Path) -> Slide:
        raise NotImplementedError

    def size_bytes(self, path: Path) -> int:
        return path.stat().st_size

    def damaged(self, path: Path, folder: Path) -> Path | None:
        """Return a copy of the slide whose pixels cannot be decoded at its top left; None where the format has none."""
        return None

    def test_its_facts_are_of_the_file(self, slide: Slide, path: Path) -> None:
        info = slide.info
        assert info.path == path
        assert info.size_bytes == self.size_bytes(path)
        assert (info.width, info.height) == (WIDTH, HEIGHT)
        assert info.mpp == pytest.approx(0.5, rel=1e-6)
        assert info.mpp_source
        assert info.reader
        assert info.reader_reason
        assert info.own_decoder == self.own_decoder
        downsamples = [level.downsample for level in info.levels]
        assert downsamples[0] == 1
        assert downsamples == sorted(downsamples)
        x0, y0, width, height = info.bounds
        assert 0 <= x0 < x0 + width <= WIDTH
        assert 0 <= y0 < y0 + height <= HEIGHT

    @TOGETHER
    @given(x0=st.integers(0, WIDTH - 64), y0=st.integers(0, HEIGHT - 64), side=st.integers(1, 64))
    def test_any_window_at_the_scale_of_level_0_is_its_pixels(
        self, slide: Slide, pixels: NDArray[np.uint8], x0: int, y0: int, side: int
    ) -> None:
        np.testing.assert_array_equal(read_square(slide, x0, y0, side, 1.0), pixels[y0 : y0 + side, x0 : x0 + side])

    @pytest.mark.parametrize("factor", [2, 4])
    def test_a_whole_factor_is_the_mean_of_its_pixels(
        self, slide: Slide, pixels: NDArray[np.uint8], factor: int
    ) -> None:
        cells = pixels[128 : 128 + 64 * factor, 256 : 256 + 64 * factor].reshape(64, factor, 64, factor, 3)
        seen = read_square(slide, 256, 128, 64, float(factor))
        assert np.abs(seen - cells.mean(axis=(1, 3))).mean() <= self.mean_error

    def test_outside_is_the_background(self, slide: Slide, pixels: NDArray[np.uint8]) -> None:
        seen = read_square(slide, WIDTH - 20, HEIGHT - 10, 64, 1.0)
        np.testing.assert_array_equal(seen[:10, :20], pixels[-10:, -20:])
        assert (seen[10:] == slide.info.background).all()
        assert (seen[:, 20:] == slide.info.background).all()
        assert (read_square(slide, -500, -500, 64, 1.0) == slide.info.background).all()

    @pytest.mark.parametrize("scale", [1.0, 1.7])
    def test_a_part_of_a_larger_buffer_is_filled_and_nothing_around_it(self, slide: Slide, scale: float) -> None:
        alone = read_square(slide, 300, 200, 48, scale)
        buffer = np.full((100, 120, 3), 7, np.uint8)
        slide.read_into(buffer[20:68, 30:78], 300, 200, scale)
        np.testing.assert_array_equal(buffer[20:68, 30:78], alone)
        buffer[20:68, 30:78] = 7
        assert (buffer == 7).all()

    def test_many_threads_read_what_one_reads(self, slide: Slide) -> None:
        places = [(x0, y0) for y0 in range(0, HEIGHT - 64, 61) for x0 in range(0, WIDTH - 64, 67)]

        def read(place: tuple[int, int]) -> NDArray[np.uint8]:
            return read_square(slide, *place, 64, 1.0)

        alone = [read(place) for place in places]
        with ThreadPoolExecutor(8) as pool:
            for one, other in zip(pool.map(read, places), alone, strict=True):
                np.testing.assert_array_equal(one, other)

    def test_leaving_closes_its_files(self, path: Path) -> None:
        self.open(path).close()  # what a library itself keeps is open from now on
        before = open_files()
        with self.open(path) as slide:
            read_square(slide, 0, 0, 64, 1.0)
        assert open_files() == before

    def test_what_cannot_be_decoded_is_an_error_and_the_rest_is_read(
        self, path: Path, pixels: NDArray[np.uint8], tmp_path: Path
    ) -> None:
        damaged = self.damaged(path, tmp_path)
        if damaged is None:
            pytest.skip("this format has no part that is damaged alone")
        with self.open(damaged) as slide:
            with pytest.raises(TileUnreadable, match=re.escape(str(damaged))):
                read_square(slide, 0, 0, 64, 1.0)
            np.testing.assert_array_equal(read_square(slide, 600, 400, 64, 1.0), pixels[400:464, 600:664])


class BackendContract:
    """Of `mtdp_runtime.backends.Backend`. A subclass loads an engine, and says what it must compute."""

    batch = 4
    tile_px = 64

    @pytest.fixture
    def engine(self) -> Backend:
        with self.load() as loaded:
            yield loaded  # type: ignore[misc]

    def load(self) -> Backend:
        raise NotImplementedError

    def expected(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the features of tiles, computed some other way."""
        raise NotImplementedError

    def batches(self, count: int) -> list[NDArray[np.uint8]]:
        shape = (count, self.batch, self.tile_px, self.tile_px, 3)
        return list(np.random.default_rng(1).integers(0, 256, shape, np.uint8))

    def test_it_says_what_it_is(self, engine: Backend) -> None:
        assert engine.name
        assert engine.precision in MIN_COSINE
        assert engine.batch == self.batch
        assert engine.depth >= 1
        assert isinstance(engine.note, str)
        assert engine.on_cores in (True, False)

    def test_asking_whether_it_runs_never_raises(self, engine: Backend) -> None:
        probe = type(engine).probe()
        assert isinstance(probe, Probe)
        assert probe.reason
        assert bool(probe.precisions) == probe.usable
        assert set(probe.converts) <= set(probe.precisions) <= set(MIN_COSINE)

    def test_its_own_batch_follows_from_the_threads_alone(self, engine: Backend) -> None:
        sizes = [type(engine).auto_batch(threads) for threads in (1, 2, 8, 64)]
        assert sizes == [type(engine).auto_batch(threads) for threads in (1, 2, 8, 64)]
        assert min(sizes) >= 1

    def test_a_batch_is_computed(self, engine: Backend) -> None:
        (tiles,) = self.batches(1)
        kept = tiles.copy()
        features = engine.result(engine.submit(tiles))["features"]
        assert (features.dtype, features.shape[0]) == (np.float32, self.batch)
        np.testing.assert_allclose(features, self.expected(tiles), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(tiles, kept)

    def test_batches_in_flight_come_back_in_order_with_the_bytes_that_each_has_alone(self, engine: Backend) -> None:
        batches = self.batches(3 * engine.depth + 1)
        alone = [engine.result(engine.submit(tiles))["features"] for tiles in batches]
        tickets: list[int] = []
        together = []
        for tiles in batches:
            if len(tickets) == engine.depth:
                together.append(engine.result(tickets.pop(0))["features"])
            tickets.append(engine.submit(tiles))
        together += [engine.result(ticket)["features"] for ticket in tickets]
        np.testing.assert_array_equal(together, alone)

    def test_results_are_the_callers_to_keep(self, engine: Backend) -> None:
        first, *others = self.batches(2 * engine.depth + 2)
        kept = engine.result(engine.submit(first))["features"]
        before = kept.copy()
        for tiles in others:
            engine.result(engine.submit(tiles))
        np.testing.assert_array_equal(kept, before)
        kept[:] = 0  # and to write into
        np.testing.assert_array_equal(engine.result(engine.submit(first))["features"], before)

    def test_one_thread_submits_and_another_takes(self, engine: Backend) -> None:
        batches = self.batches(12)
        alone = [engine.result(engine.submit(tiles))["features"] for tiles in batches]
        room, tickets = threading.Semaphore(engine.depth), queue.Queue[int]()
        got: list[NDArray[np.float32]] = []

        def take() -> None:
            for _ in batches:
                got.append(engine.result(tickets.get())["features"])
                room.release()

        taker = threading.Thread(target=take)
        taker.start()
        for tiles in batches:
            room.acquire()
            tickets.put(engine.submit(tiles))
        taker.join()
        np.testing.assert_array_equal(got, alone)

    def test_it_may_be_closed_with_a_batch_in_flight_and_more_than_once(self) -> None:
        engine = self.load()
        engine.submit(self.batches(1)[0])
        engine.close()
        engine.close()
