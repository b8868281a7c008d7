"""The fast reader equals OpenSlide to the pixel, or leaves the slide to it and says why."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mtdp_runtime.errors import SlideError, TileUnreadable
from mtdp_runtime.settings import ExtractSettings
from mtdp_runtime.slide import Slide, Source
from mtdp_runtime.slide.image import ImageReader
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.slide.openslide import OpenSlideReader
from mtdp_runtime.slide.source import resampling_of
from mtdp_runtime.slide.tile_cache import Key, TileCache
from mtdp_runtime.slide.tile_jpeg import decode_tile
from mtdp_runtime.slide.tiled_tiff import TiledTiffReader
from mtdp_runtime.tiling.plan import make_plan
from support import damage_tile, pyramid, read_square, stained

VARIANTS = {
    "YCbCr 4:2:0": {"photometric": "rgb", "compressionargs": {"level": 85}, "subsampling": (2, 2)},
    "YCbCr 4:2:2": {"photometric": "rgb", "compressionargs": {"level": 85}, "subsampling": (2, 1)},
    "YCbCr 4:4:4": {"photometric": "rgb", "compressionargs": {"level": 85}, "subsampling": (1, 1)},
    "RGB": {"photometric": "rgb", "compressionargs": {"level": 85, "outcolorspace": "RGB"}},
}


@pytest.fixture(scope="module", params=[(name, tile) for name in VARIANTS for tile in (64, 240)], ids=str)
def generated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide of three levels whose sides are no multiples of the tile."""
    name, tile = request.param
    path = tmp_path_factory.mktemp("slides") / "slide.tiff"
    image = stained(700, 1000)
    with tifffile.TiffWriter(path) as tiff:
        for level in range(3):
            data = np.ascontiguousarray(image[:: 2**level, :: 2**level])
            tiff.write(
                data, tile=(tile, tile), compression="jpeg", metadata=None, subfiletype=min(level, 1), **VARIANTS[name]
            )
    return path


@pytest.fixture(scope="module")
def pair(generated: Path) -> Iterator[tuple[Slide, Slide]]:
    with open_slide(generated, 0.5) as fast, OpenSlideReader(generated, 0.5, "test") as reference:
        assert isinstance(fast, TiledTiffReader), fast.info.reader_reason
        yield fast, reference


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(x0=st.integers(-50, 1050), y0=st.integers(-50, 750), side=st.integers(1, 300), level=st.integers(0, 2))
def test_any_window_at_a_levels_own_scale_equals_openslide(
    pair: tuple[Slide, Slide], x0: int, y0: int, side: int, level: int
) -> None:
    fast, reference = pair
    downsample = 2**level
    x0, y0 = x0 // downsample * downsample, y0 // downsample * downsample
    expected = read_square(reference, x0, y0, side, downsample)
    np.testing.assert_array_equal(read_square(fast, x0, y0, side, downsample), expected)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(x0=st.integers(-20, 600), y0=st.integers(-20, 400), scale=st.floats(0.9, 9), level=st.integers(0, 2))
def test_any_scale_from_any_level_equals_openslide(
    pair: tuple[Slide, Slide], x0: int, y0: int, scale: float, level: int
) -> None:
    """To the pixel: both read the same whole pixels and resample them by the same code."""
    tiles = [np.zeros((40, 40, 3), np.uint8) for _ in pair]
    for slide, tile in zip(pair, tiles, strict=True):
        slide.read_into(tile, x0, y0, scale, Source(level))
    np.testing.assert_array_equal(*tiles)


def test_a_real_aperio_slide(slides_dir: Path) -> None:
    path = slides_dir / "CMU-1-Small-Region.svs"
    with open_slide(path) as fast, openslide.OpenSlide(path) as reference:
        assert isinstance(fast, TiledTiffReader)
        assert fast.info.mpp == pytest.approx(0.499)
        for x0, y0 in ((0, 0), (113, 777), (2000, 2700), (1996, 2743)):
            region = np.asarray(reference.read_region((x0, y0), 0, (224, 224)))
            inside = region[..., 3] == 255
            ours = read_square(fast, x0, y0, 224, 1.0)
            np.testing.assert_array_equal(ours[inside], region[inside][:, :3])
            assert (ours[~inside] == 255).all()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("odd/yb10kx5k.zstd.tiff", "compression 50000"),
    ],
)
def test_what_it_does_not_understand_goes_to_openslide_with_the_reason(
    slides_dir: Path, name: str, reason: str
) -> None:
    with open_slide(slides_dir / name) as slide:
        assert isinstance(slide, OpenSlideReader)
        assert reason in slide.info.reader_reason


@pytest.mark.parametrize("error", [struct.error("unpack"), TypeError("NoneType"), ZeroDivisionError("by zero")])
def test_a_structure_that_the_fast_reader_stumbles_over_goes_to_the_strict_one_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = pyramid(stained(256, 256), tmp_path / "odd.tiff", 0.5, lossy=True)

    def stumble(*_: object) -> None:
        raise error

    monkeypatch.setattr("mtdp_runtime.slide.tiled_tiff._level_of", stumble)
    with open_slide(path) as slide:
        assert isinstance(slide, ImageReader)
        assert f"its TIFF structure: {error}; and OpenSlide does not tell damage" in slide.info.reader_reason


def test_a_damaged_tile_is_an_error_and_harms_no_other(tmp_path: Path) -> None:
    path = pyramid(stained(768, 1024), tmp_path / "damaged.tiff", 0.5, lossy=True)
    damage_tile(path, 3)
    with open_slide(path) as slide:
        assert isinstance(slide, TiledTiffReader)
        good = read_square(slide, 0, 0, 128, 1.0)
        for _ in range(2):
            with pytest.raises(TileUnreadable, match="cannot decode"):
                read_square(slide, 400, 10, 64, 1.0)
        np.testing.assert_array_equal(read_square(slide, 0, 0, 128, 1.0), good)


def test_a_file_cut_while_it_is_open_gives_errors_and_no_invented_pixels(tmp_path: Path) -> None:
    path = pyramid(stained(768, 1024), tmp_path / "cut.tiff", 0.5, lossy=True)
    with open_slide(path) as slide:
        with path.open("r+b") as stream:
            stream.truncate(2000)
        with pytest.raises(SlideError):
            read_square(slide, 700, 600, 64, 1.0)


SHAPE = (8, 8, 3)


class TestTileCache:
    def test_a_tile_is_decoded_once_however_many_ask(self) -> None:
        cache, decoded, barrier = TileCache(1 << 20), [], threading.Barrier(8)

        def decode(key: Key, out: NDArray[np.uint8]) -> None:
            decoded.append(key)
            out[...] = key[2]

        def ask() -> None:
            barrier.wait()
            for number in range(20):
                assert (cache.acquire((0, 1, number), SHAPE, decode) == number).all()
                cache.release((0, 1, number))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(decoded) == [(0, 1, number) for number in range(20)]

    def test_it_holds_no_more_than_it_may_and_drops_the_oldest(self) -> None:
        cache, decoded = TileCache(3 * 192), []

        def decode(key: Key, out: NDArray[np.uint8]) -> None:
            decoded.append(key[2])

        for number in (0, 1, 2, 0, 3, 0, 1):
            cache.acquire((0, 1, number), SHAPE, decode)
            cache.release((0, 1, number))
        assert decoded == [0, 1, 2, 3, 1]

    def test_memory_that_somebody_looks_at_is_not_used_again(self) -> None:
        cache = TileCache(2 * 192)

        def decode(key: Key, out: NDArray[np.uint8]) -> None:
            out[...] = key[2]

        held = cache.acquire((0, 1, 200), SHAPE, decode)
        dropped = cache.acquire((0, 1, 201), SHAPE, decode)
        cache.release((0, 1, 201))
        for number in range(10):
            latest = cache.acquire((0, 1, number), SHAPE, decode)
            cache.release((0, 1, number))
        assert (held == 200).all()
        assert np.shares_memory(latest, dropped)

    def test_readers_who_press_each_other_out_of_a_small_cache_see_their_own_tiles(self) -> None:
        cache, wrong = TileCache(2 * 192), []

        def decode(key: Key, out: NDArray[np.uint8]) -> None:
            out[...] = key[2]

        def ask(seed: int) -> None:
            for number in np.random.default_rng(seed).integers(0, 12, 400).tolist():
                tile = cache.acquire((0, 1, number), SHAPE, decode)
                if (tile != number).any():
                    wrong.append(number)
                cache.release((0, 1, number))

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_an_error_is_not_remembered(self) -> None:
        cache, calls = TileCache(1 << 20), []

        def decode(key: Key, out: NDArray[np.uint8]) -> None:
            calls.append(key)
            if len(calls) == 1:
                raise ValueError("damaged")

        with pytest.raises(ValueError, match="damaged"):
            cache.acquire((0, 1, 0), SHAPE, decode)
        assert cache.acquire((0, 1, 0), SHAPE, decode).shape == SHAPE


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    x=st.integers(-2, 60), y=st.integers(-2, 60), side=st.integers(1, 60), scale=st.sampled_from([2.0, 2.5, 4.0, 33.0])
)
def test_where_the_decoder_could_reduce_a_tile_is_openslides_average(
    photograph: tuple[Slide, Slide], x: int, y: int, side: int, scale: float
) -> None:
    """Wherever the tile lies, on the grid of reduced pixels or not, inside the slide or across its edge."""
    fast, reference = photograph
    ours = read_square(fast, 8 * x, 4 * y, side, scale).astype(int)
    exact = read_square(reference, 8 * x, 4 * y, side, scale)
    np.testing.assert_array_equal(ours, exact)


@pytest.fixture(scope="module", params=list(VARIANTS))
def photograph(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Slide, Slide]]:
    """A slide of one level, smooth as scanned tissue is, with tiles of 240 px and colours of every kind."""
    path = tmp_path_factory.mktemp("slides") / "photograph.tiff"
    ys, xs = np.mgrid[0:500, 0:620]
    image = np.stack([128 + 100 * np.sin(xs / 40), 128 + 100 * np.cos(ys / 50), (xs + ys) / 6], axis=-1)
    tifffile.imwrite(
        path, image.astype(np.uint8), tile=(240, 240), compression="jpeg", metadata=None, **VARIANTS[request.param]
    )
    with open_slide(path, 0.25) as fast, OpenSlideReader(path, 0.25, "test") as reference:
        yield fast, reference


def test_what_is_done_to_the_pixels_is_named(photograph: tuple[Slide, Slide]) -> None:
    fast, reference = photograph
    texts = {scale: resampling_of(fast.info, scale, 224) for scale in (0.9, 1.0, 2.5, 4.0, 33.0)}
    assert texts[0.9] == "level 0, linear, 2"
    assert texts[1.0] == "level 0, as it is"
    assert texts[2.5] == resampling_of(reference.info, 2.5, 224) == "level 0, exact area average, 2"
    assert texts[4.0] == texts[33.0] == texts[2.5]


def test_colours_are_what_the_tiff_says_and_not_what_the_jpeg_says() -> None:
    """A JFIF marker claims YCbCr; OpenSlide believes the TIFF, and so does the reduction."""
    red = np.full((64, 64, 3), (220, 20, 30), np.uint8)
    as_rgb = imagecodecs.jpeg8_encode(red, level=95, colorspace="RGB", outcolorspace="RGB")
    jfif = as_rgb[:2] + b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00" + as_rgb[2:]
    out = np.zeros((32, 32, 3), np.uint8)
    for stream in (as_rgb, jfif):
        decode_tile(stream, None, "RGB", 2, out)
        assert np.abs(out.astype(int) - red[::2, ::2]).max() <= 3


@pytest.mark.parametrize("cut", [0, 1, 30, 300, -40])
def test_a_cut_jpeg_is_refused_at_a_reduction_too(cut: int) -> None:
    whole = imagecodecs.jpeg8_encode(stained(64, 64), level=90)
    with pytest.raises(ValueError):
        decode_tile(whole[:cut], None, "YCBCR", 2, np.zeros((32, 32, 3), np.uint8))


def write_sparse(path: Path, side: int, vendor: str = "", tile: int = 256) -> Path:
    """Write a level without a pyramid, stained in two opposite corners; elsewhere tiles take no bytes."""
    across = side // tile
    code = imagecodecs.jpeg8_encode(stained(tile, tile)[:, ::-1].copy(), level=85)
    tiles = [code if number in (0, across * across - 1) else b"" for number in range(across * across)]
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tiff.write(
            iter(tiles),
            shape=(side, side, 3),
            dtype="uint8",
            tile=(tile, tile),
            photometric="ycbcr",
            subsampling=(2, 2),
            compression="jpeg",
            resolution=(20000, 20000),
            resolutionunit="CENTIMETER",
            metadata=None,
            description=vendor,
        )
    return path


@pytest.mark.parametrize("vendor", ["", "Aperio Image Library v11\n1024x1024|MPP = 0.5"])
def test_what_was_never_scanned_is_the_background_as_openslide_has_it(tmp_path: Path, vendor: str) -> None:
    path = write_sparse(tmp_path / "sparse.tiff", 1024, vendor)
    with open_slide(path) as fast, OpenSlideReader(path, None, "test") as reference:
        assert isinstance(fast, TiledTiffReader)
        for x0, y0, side, scale in ((0, 0, 256, 1.0), (200, 100, 300, 1.0), (-50, 900, 200, 1.0), (900, 900, 90, 1.5)):
            expected = read_square(reference, x0, y0, side, scale)
            np.testing.assert_array_equal(read_square(fast, x0, y0, side, scale), expected)


def test_a_huge_slide_that_is_nearly_empty_is_planned_without_reading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(OpenSlideReader, "read_into", lambda *_: asked.append(1))
    decoded: list[Key] = []
    decode = TiledTiffReader._decode

    def counting(self: TiledTiffReader, key: Key, out: NDArray[np.uint8]) -> None:
        decoded.append(key)
        decode(self, key, out)

    monkeypatch.setattr(TiledTiffReader, "_decode", counting)
    with open_slide(write_sparse(tmp_path / "sparse.tiff", 20480, tile=512)) as slide:
        plan = make_plan(slide, 64, ExtractSettings(mpp=0.5, stride_px=64))
    assert len(plan.grid) == 320 * 320
    corners = {(int(x) // 10240, int(y) // 10240) for x, y in plan.coords}
    assert corners == {(0, 0), (1, 1)}
    assert not asked
    assert len(decoded) == 2
