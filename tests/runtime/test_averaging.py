"""One law of averaging, whatever computes it: C with and without AVX2, and NumPy, give the same bits."""

from __future__ import annotations

import importlib.util
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mtdp_runtime.slide import compiled
from mtdp_runtime.slide.cells import Cells, cells
from mtdp_runtime.slide.compiled import Compiled
from mtdp_runtime.slide.resample import is_still, resample_into, span_of

ROOT = Path(__file__).resolve().parents[2]
Pixels = NDArray[np.uint8]
SCALES = st.one_of(
    st.floats(0.3, 9.0),
    st.floats(9, 300),
    st.sampled_from([1.25, 1.979, 2.0, 2.035, 2.5, 3.0, 4.0, 4.008, 6.0, 8.0, 16.0]),
)


def hook() -> ModuleType:
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The library, built here and now: what is installed may be of another day."""
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("needs a C compiler")
    path = tmp_path_factory.mktemp("built") / "lib.so"
    assert hook().compile_library(compiled.SOURCE, path) == ""
    found = compiled.load(path)
    assert isinstance(found, Compiled), found
    return found


@pytest.fixture(scope="module")
def ways(library: Compiled) -> dict[str, Compiled | str]:
    return {"AVX2": library, "C": library._replace(level=0), "NumPy": "left out by the test"}


def tile(
    way: Compiled | str, source: Pixels, shape: tuple[int, int], scale: float, phases: tuple[float, float] = (0, 0)
) -> Pixels:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "compiled", lambda: way)
        out = np.full((*shape, 3), 77, np.uint8)
        resample_into(out, source, scale, *phases)
        return out


def plainly(source: Pixels, shape: tuple[int, int], scale: float, phases: tuple[float, float]) -> Pixels:
    """The law, step by step, in integers of any length and the float32 that it names."""
    (height, width), (h, w) = shape, source.shape[:2]
    down, across = cells(height, h, scale, phases[1]), cells(width, w, scale, phases[0])
    out = np.zeros((height, width, 3), np.uint8)
    for y in range(height):
        for channel in range(3):
            line = [
                nearest(summed(down, y, source[:, x, channel].tolist()), np.float32(128 / int(down.units[y])))
                for x in range(w)
            ]
            for x in range(width):
                out[y, x, channel] = nearest(summed(across, x, line), np.float32(1 / (128 * int(across.units[x]))))
    return out


def summed(of: Cells, number: int, values: list[int]) -> int:
    """What lies beyond the values has no weight."""
    first, weights = int(of.first[number]), of.weights[number].tolist()
    assert not any(weights[len(values) - first :])
    return sum(weight * value for weight, value in zip(weights, values[first:], strict=False))


def nearest(sums: int, factor: np.float32) -> int:
    return int(np.rint(np.float32(sums) * factor))


@settings(max_examples=150, deadline=None)
@given(
    scale=SCALES,
    start=st.tuples(st.floats(0, 3), st.floats(0, 3)),
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    cut=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    greys=st.sampled_from([2, 3, 256]),
    seed=st.integers(0, 99),
)
@example(2.0, (0.0, 0.0), (24, 23), (0, 0), 3, 0)  # many sums lie just between two grey levels
@example(1.0, (0.5, 0.5), (20, 20), (0, 0), 256, 0)  # two rows that weigh alike
@example(0.5, (0.0, 0.0), (1, 1), (5, 5), 256, 0)  # a source of one pixel
def test_every_way_gives_the_same_bits(
    ways: dict[str, Compiled | str],
    scale: float,
    start: tuple[float, float],
    shape: tuple[int, int],
    cut: tuple[int, int],
    greys: int,
    seed: int,
) -> None:
    """At any scale, place and size, where the source ends before the cells do, and where lines are not side by side."""
    if scale > 9:
        shape = (min(shape[0], 3), min(shape[1], 3))
    (x0, x1, phase_x), (y0, y1, phase_y) = span_of(start[0], shape[1], scale), span_of(start[1], shape[0], scale)
    if is_still(scale, max(shape)) and not phase_x and not phase_y:
        return
    size = max(1, y1 - y0 - cut[0]), max(1, x1 - x0 - cut[1])
    source = (np.random.default_rng(seed).integers(0, greys, (size[0], size[1] + 2, 3)) * (255 // (greys - 1))).astype(
        np.uint8
    )
    for given_ in (source[:, :-2], np.ascontiguousarray(source[:, :-2])):
        found = {name: tile(way, given_, shape, scale, (phase_x, phase_y)) for name, way in ways.items()}
        np.testing.assert_array_equal(found["AVX2"], found["NumPy"])
        np.testing.assert_array_equal(found["C"], found["NumPy"])


@settings(max_examples=20, deadline=None)
@given(
    scale=st.one_of(st.floats(0.3, 6), st.sampled_from([2.0, 3.0, 6.0])),
    phases=st.tuples(st.floats(0, 0.9), st.floats(0, 0.9)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    cut=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_they_are_the_bits_of_the_law(
    ways: dict[str, Compiled | str],
    scale: float,
    phases: tuple[float, float],
    shape: tuple[int, int],
    cut: int,
    seed: int,
) -> None:
    side = max(1, span_of(max(phases), max(shape), scale)[1] - cut)
    source = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    if is_still(scale, max(shape)):
        return
    wanted = plainly(source, shape, scale, phases)
    for name, way in ways.items():
        np.testing.assert_array_equal(tile(way, source, shape, scale, phases), wanted, name)


@settings(max_examples=60, deadline=None)
@given(
    scale=st.one_of(st.floats(1, 4000), st.floats(0.05, 1)),
    phase=st.floats(0, 0.999),
    out_px=st.integers(1, 40),
    cut=st.floats(0, 1),
)
def test_no_sum_is_more_than_its_numbers_hold(scale: float, phase: float, out_px: int, cut: float) -> None:
    source_px = max(1, int(span_of(phase, out_px, scale)[1] * cut))
    of = cells(out_px, source_px, scale, phase)
    assert 255 * of.units.max() < 2**24, "rows: float32 has every whole number up to there"
    assert 255 * 128 * of.units.max() < 2**31
    assert of.weights.min() >= 0
    assert (of.weights.sum(axis=1, dtype=np.int64) == of.units).all()
    assert of.units.min() > 0
    assert of.first.min() >= 0
    assert of.source_px <= source_px + source_px % 2 or of.source_px <= of.weights.shape[1]
    assert np.rint(np.float32(255 * of.units) * of.down_factors()).max() <= 255 * 128


@settings(max_examples=60, deadline=None)
@given(scale=st.floats(1, 60), start=st.floats(0, 1000), out_px=st.integers(1, 30))
def test_neighbours_share_their_edge_so_no_pixel_counts_twice_or_not_at_all(
    scale: float, start: float, out_px: int
) -> None:
    first, end, phase = span_of(start, out_px, scale)
    of = cells(out_px, end - first + 2, scale, phase)
    counted = np.zeros(end - first + 3, np.int64)
    np.add.at(counted, of.first[:, None] + np.arange(of.weights.shape[1]), of.weights)
    within = counted[1 : int(phase + out_px * scale - 1e-3)]
    unit = 2 ** min(14, int(np.log2(65536 / scale)))
    assert (within == unit).all()


@given(scale=st.floats(1, 60), start=st.floats(0, 100), moved=st.integers(1, 300), out_px=st.integers(1, 30))
def test_an_edge_lies_where_it_lies_whatever_window_it_is_seen_through(
    scale: float, start: float, moved: int, out_px: int
) -> None:
    _, end, phase = span_of(start, out_px, scale)
    near, far = cells(out_px, end + 2, scale, phase), cells(out_px, end + 2 + moved, scale, phase + moved)
    assert np.abs(near.units - far.units).max() <= 1, "floats put a place halfway between two units on either side"
    assert (near.units != far.units).mean() <= 0.5


@pytest.mark.parametrize("scale", [0.7, 1.002, 1.979, 2.035, 4.008, 6.3, 16.3, 64.2, 200.7])
def test_it_is_the_exact_average_to_two_hundredths_of_a_grey_level_beside_the_rounding(
    ways: dict[str, Compiled | str], scale: float
) -> None:
    """On black and white alone, whose differences are the largest there are."""
    out_px = 40 if scale < 10 else 6
    _, side, phase = span_of(0.37, out_px, scale)
    source = (np.random.default_rng(3).integers(0, 2, (side, side, 3)) * 255).astype(np.uint8)
    if scale < 1:
        centre = np.clip(phase + (np.arange(out_px) + 0.5) * scale, 0.5, side - 0.5)[:, None]
        low, size = centre - 0.5, 1.0
    else:
        low, size = phase + np.arange(out_px)[:, None] * scale, scale
    pixel = np.arange(side)
    weights = np.clip(np.minimum(low + size, pixel + 1) - np.maximum(low, pixel), 0, None) / size
    exact = np.einsum("ij,jkc,lk->ilc", weights, source.astype(np.float64), weights, optimize=True)
    assert np.abs(tile(ways["NumPy"], source, (out_px, out_px), scale, (phase, phase)) - exact).max() <= 0.52


def test_threads_share_a_library(library: Compiled) -> None:
    source = np.random.default_rng(0).integers(0, 256, (500, 500, 3), np.uint8)
    cases = [(1.0 + number / 7, number / 20) for number in range(16)]

    def one(case: tuple[float, float]) -> Pixels:
        out = np.zeros((90, 150, 3), np.uint8)
        axes = cells(90, 500, *case), cells(150, 500, *case)
        compiled.average(library, out, source, *axes)
        return out

    alone = [one(case) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(one, cases * 3))
    for number, found in enumerate(together):
        np.testing.assert_array_equal(found, alone[number % len(cases)])


def test_nothing_is_written_beyond_a_part_of_a_picture(library: Compiled) -> None:
    source = np.random.default_rng(0).integers(0, 256, (41, 41, 3), np.uint8)
    whole = np.full((22, 22, 3), 7, np.uint8)
    compiled.average(library, whole[1:21, 1:21], source, cells(20, 41, 2.05, 0.0), cells(20, 41, 2.05, 0.0))
    inside = whole[1:21, 1:21].copy()
    whole[1:21, 1:21] = 7
    assert (whole == 7).all()
    np.testing.assert_array_equal(inside, tile("none", source, (20, 20), 2.05))


class TestWhatIsInstalled:
    def test_without_a_library_numpy_averages_and_it_is_said_why(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        why = compiled.load(tmp_path / "none.so")
        assert why == "none.so is missing: install again where there is a C compiler"
        monkeypatch.setattr(compiled, "compiled", lambda: why)
        assert compiled.described() == f"by NumPy, which takes several times as long: {why}"

    def test_a_library_of_another_source_is_not_used(self, tmp_path: Path, library: Compiled) -> None:
        other = tmp_path / "average.c"
        other.write_text(compiled.SOURCE.read_text() + "\n/* older */\n")
        assert hook().compile_library(other, tmp_path / "lib.so") == ""
        assert compiled.load(tmp_path / "lib.so") == "lib.so was built from another version: install again"

    @pytest.mark.parametrize("content", [b"", b"\x7fELF" + b"\0" * 400])
    def test_a_file_that_is_no_library_is_said(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "lib.so").write_bytes(content)
        why = compiled.load(tmp_path / "lib.so")
        assert isinstance(why, str)
        assert why.startswith("lib.so cannot be loaded: ")

    def test_a_library_without_the_function_is_said(self, tmp_path: Path, library: Compiled) -> None:
        (tmp_path / "other.c").write_text("int other(void) { return 1; }\n")
        assert hook().compile_library(tmp_path / "other.c", tmp_path / "lib.so") == ""
        assert "cannot be loaded" in str(compiled.load(tmp_path / "lib.so"))

    def test_its_name_says_what_of_the_processor_it_uses(self, library: Compiled) -> None:
        assert library._replace(level=1).name == "compiled, AVX2"
        assert library._replace(level=0).name == "compiled, without AVX2"
