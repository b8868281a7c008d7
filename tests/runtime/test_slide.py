"""Reading a slide: the contract of every reader, tried on the reference reader."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mtdp_runtime.errors import SlideUnreadable, TileUnreadable
from mtdp_runtime.slide import Slide
from mtdp_runtime.slide.open import open_slide
from support import damage_tile, pyramid, read_square, stained


@pytest.fixture(scope="module")
def image() -> NDArray[np.uint8]:
    return stained(768, 1024)


@pytest.fixture(scope="module")
def slide(image: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slide]:
    path = pyramid(image, tmp_path_factory.mktemp("slides") / "pyramid.tiff", 0.25, levels=3)
    with open_slide(path) as opened:
        yield opened


def test_its_facts(slide: Slide) -> None:
    info = slide.info
    assert (info.width, info.height) == (1024, 768)
    assert [level.downsample for level in info.levels] == [1, 2, 4]
    assert info.mpp == pytest.approx(0.25, rel=1e-6)
    assert info.mpp_source == "TIFF resolution tags"
    assert info.bounds == (0, 0, 1024, 768)
    assert info.reader.startswith("openslide 4")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(x0=st.integers(0, 900), y0=st.integers(0, 700), side=st.integers(1, 64))
def test_any_window_at_level_0_is_the_image(
    slide: Slide, image: NDArray[np.uint8], x0: int, y0: int, side: int
) -> None:
    np.testing.assert_array_equal(read_square(slide, x0, y0, side, 1.0), image[y0 : y0 + side, x0 : x0 + side])


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_a_whole_scale_is_the_mean_of_its_pixels(slide: Slide, image: NDArray[np.uint8], scale: int) -> None:
    cells = image[: 32 * scale, 256 : 256 + 32 * scale].reshape(32, scale, 32, scale, 3)
    # levels were rounded once or twice when the slide was made
    assert np.abs(read_square(slide, 256, 0, 32, scale) - cells.mean(axis=(1, 3))).max() <= 1.6


def test_one_grating_at_several_mpp_gives_one_tile(tmp_path: Path) -> None:
    """A grating of 32 µm, scanned at four scales, looks the same at 1 µm per pixel."""
    tiles = []
    for mpp in (0.2527, 0.25, 0.4612, 0.5):
        um = (np.arange(1500) + 0.5) * mpp
        line = np.rint(128 + 90 * np.sin(2 * np.pi * um / 32)).astype(np.uint8)
        path = pyramid(np.broadcast_to(line[None, :, None], (200, 1500, 3)).copy(), tmp_path / f"{mpp}.tiff", mpp)
        with open_slide(path) as slide:
            assert slide.info.mpp is not None
            out = np.zeros((32, 224, 3), np.uint8)
            slide.read_into(out, 0, 0, 1.0 / slide.info.mpp)
            tiles.append(out[16, :, 0].astype(int))
    for tile in tiles[1:]:
        assert np.abs(tile - tiles[0]).max() <= 2


def test_outside_the_slide_is_background(slide: Slide, image: NDArray[np.uint8]) -> None:
    out = read_square(slide, 1000, 700, 100, 1.0)
    np.testing.assert_array_equal(out[:68, :24], image[700:, 1000:])
    assert (out[68:] == 255).all()
    assert (out[:, 24:] == 255).all()


def test_threads_read_the_same_bytes(slide: Slide, image: NDArray[np.uint8]) -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for x0, y0 in rng.integers(0, 600, (30, 2)).tolist():
            if not np.array_equal(read_square(slide, x0, y0, 100, 1.0), image[y0 : y0 + 100, x0 : x0 + 100]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_damaged_tile_raises_is_never_padded_and_harms_no_other(tmp_path: Path) -> None:
    path = pyramid(stained(768, 1024), tmp_path / "damaged.tiff", 0.5, lossy=True)
    damage_tile(path, 3)
    with open_slide(path) as slide:
        good = read_square(slide, 0, 0, 128, 1.0)
        with pytest.raises(TileUnreadable, match=r"damaged\.tiff: cannot decode the tile in column 3, row 0"):
            read_square(slide, 400, 10, 64, 1.0)
        np.testing.assert_array_equal(read_square(slide, 0, 0, 128, 1.0), good)
        with pytest.raises(TileUnreadable):
            read_square(slide, 400, 10, 64, 1.0)


def test_a_given_mpp_wins_and_is_recorded(make_slide: Callable[..., Path]) -> None:
    with open_slide(make_slide(mpp=0.5), 0.31, "--slide-mpp") as slide:
        assert slide.info.mpp == 0.31
        assert slide.info.mpp_source == "--slide-mpp"


def test_a_slide_without_mpp_says_so(make_slide: Callable[..., Path]) -> None:
    with open_slide(make_slide(mpp=None)) as slide:
        assert slide.info.mpp is None
        assert slide.info.mpp_source == "the slide does not say"


def test_pixels_that_are_not_square_have_no_scale(tmp_path: Path) -> None:
    path = tmp_path / "anisotropic.tiff"
    resolution = {"resolution": (20000, 40000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, stained(256, 256), tile=(128, 128), photometric="rgb", compression="zlib", **resolution)
    with open_slide(path) as slide:
        assert slide.info.mpp is None
        assert slide.info.mpp_source == "TIFF resolution tags say 0.5 x 0.25 µm/px: the pixels are not square"
    with open_slide(path, 0.5, "--slide-mpp") as slide:
        assert slide.info.mpp == 0.5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken.svs", "not a slide that OpenSlide can read"),
        ("zero_gi.tif", "not a slide that OpenSlide can read"),
        ("unopenable.tiff", "Unsupported TIFF compression: 52479"),
        ("sm_image_jpegls.dcm", "transfer syntax 1.2.840.10008.1.2.4.80 is not read here"),
        ("test_wsi2.dcm", "no file of its series is a picture of the slide"),
    ],
)
def test_what_is_no_slide_is_refused(slides_dir: Path, name: str, message: str) -> None:
    path = slides_dir / "odd" / name
    assert path.is_file()
    with pytest.raises(SlideUnreadable, match=message) as caught:
        open_slide(path)
    assert caught.value.hint


def test_what_is_not_even_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.svs").touch()
    for path, message in (
        (tmp_path / "gone.svs", "no such file"),
        (tmp_path, "a folder"),
        (tmp_path / "empty.svs", "empty"),
    ):
        with pytest.raises(SlideUnreadable, match=message):
            open_slide(path)


def test_a_slide_that_opens_but_cannot_be_read(slides_dir: Path) -> None:
    with (
        open_slide(slides_dir / "odd" / "unreadable.svs") as slide,
        pytest.raises(TileUnreadable, match="no JPEG marker where one was expected"),
    ):
        read_square(slide, 0, 0, 8, 1.0)


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "tcga-cr-7395-01a-01-ts1.svs", "odd/yb10kx5k.zstd.tiff"])
def test_real_slides_equal_openslide_at_a_levels_own_scale(slides_dir: Path, name: str) -> None:
    path = slides_dir / name
    with open_slide(path) as slide, openslide.OpenSlide(path) as reference:
        for level_index, level in enumerate(slide.info.levels):
            if level.downsample != reference.level_downsamples[level_index]:
                continue  # there OpenSlide blends pixels
            region = reference.read_region((640, 320), level_index, (200, 200)).convert("RGB")
            np.testing.assert_array_equal(read_square(slide, 640, 320, 200, level.downsample), np.asarray(region))
