"""Decoding, the cache, and the views of an image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from mtdp.augment import evaluation_view, training_view
from mtdp.converters.source import read_rgb as of_a_converter
from mtdp.errors import ImageUnreadable
from mtdp.images import ImageCache, allow_huge_images, check_image, load_image, read_rgb

Make = Callable[..., Path]  # writes files, returns where


def numbered(height: int, width: int) -> NDArray[np.uint8]:
    """uint8[H, W, 3] whose pixels name their place: (row, column, 0)."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.zeros_like(rows)], axis=2).astype(np.uint8)


@pytest.mark.parametrize(
    ("width", "height", "shape"), [(80, 60, (32, 43, 3)), (20, 50, (80, 32, 3)), (32, 32, (32, 32, 3))]
)
def test_the_shorter_side_becomes_image_px(
    tmp_path: Path, width: int, height: int, shape: tuple[int, ...], write_image: Make
) -> None:
    assert load_image(write_image(tmp_path / "a.png", width, height), 32).shape == shape


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_colour_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (32, 32), (102, 102, 102)).convert(mode).save(path)
    image = load_image(path, 32)
    assert image.shape == (32, 32, 3)
    assert np.abs(image.astype(int) - 102).max() <= 1


def test_sixteen_bits_are_refused_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(tmp_path / "deep.png")
    for read in (check_image, lambda path: load_image(path, 32)):
        with pytest.raises(ImageUnreadable, match=r"deep\.png has more than 8 bits"):
            read(tmp_path / "deep.png")


def deep_rgb(path: Path) -> None:
    """12-bit data in 16 bits for each channel, as microscopes write it: its high byte is black."""
    pixels = np.full((32, 32, 3), 3_000, np.uint16)
    if path.suffix == ".ppm":
        path.write_bytes(b"P6\n32 32\n65535\n" + pixels.astype(">u2").tobytes())
    elif path.suffix == ".jp2":
        imagecodecs.imwrite(path, pixels)
    elif path.suffix == ".png":
        path.write_bytes(imagecodecs.png_encode(pixels))
    else:
        tifffile.imwrite(path, pixels, photometric="rgb", compression="zlib" if "zlib" in path.name else None)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep-zlib.tif", "deep.ppm", "deep.jp2"])
def test_sixteen_bits_of_colour_are_refused_not_made_black(tmp_path: Path, name: str) -> None:
    deep_rgb(tmp_path / name)
    for read in (check_image, lambda path: load_image(path, 32), of_a_converter):
        with pytest.raises(ImageUnreadable, match=r"deep.*has more than 8 bits"):
            read(tmp_path / name)


def test_eight_bits_are_taken_in_the_same_formats(tmp_path: Path) -> None:
    for name in ("a.png", "a.tif", "a.ppm", "a.jp2", "a.bmp", "a.gif"):
        Image.new("RGB", (32, 32), (51, 102, 153)).save(tmp_path / name)
        assert np.abs(load_image(tmp_path / name, 32).astype(int) - (51, 102, 153)).max() <= 2, name


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "colour key"])
def test_what_is_transparent_is_white(tmp_path: Path, kind: str) -> None:
    """As in extraction. The hidden colour is black, which would make tissue of nothing."""
    path = tmp_path / "a.png"
    if kind == "RGBA":
        image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
        image.paste((100, 100, 100, 255), (0, 0, 16, 32))
        image.paste((0, 0, 0, 128), (0, 0, 1, 1))
        image.save(path)
    elif kind == "LA":
        grey = Image.new("LA", (32, 32), (0, 0))
        grey.paste((100, 255), (0, 0, 16, 32))
        grey.save(path)
    elif kind == "palette":
        indexed = Image.new("P", (32, 32), 0)
        indexed.putpalette([0, 0, 0, 100, 100, 100])
        indexed.paste(1, (0, 0, 16, 32))
        indexed.save(path, transparency=0)
    else:
        keyed = Image.new("RGB", (32, 32), (0, 0, 0))
        keyed.paste((100, 100, 100), (0, 0, 16, 32))
        keyed.save(path, transparency=(0, 0, 0))
    for pixels in (load_image(path, 32), np.asarray(of_a_converter(path))):
        assert (pixels[:, 16:] == 255).all()
        assert (pixels[1:, :16] == 100).all()
    if kind == "RGBA":
        assert abs(int(load_image(path, 32)[0, 0, 0]) - 127) <= 1  # half black over white


def test_a_huge_image_is_refused_unless_it_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageUnreadable, match=r"huge\.png is huge") as caught:
        check_image(tmp_path / "huge.png")
    assert "--huge-images" in caught.value.hint
    allow_huge_images()
    assert load_image(tmp_path / "huge.png", 64).shape == (64, 64, 3)


def test_shrinking_averages_areas(tmp_path: Path) -> None:
    board = np.zeros((256, 256, 3), np.uint8)
    board[::2, ::2] = board[1::2, 1::2] = 255  # a fine checkerboard must turn grey, not alias
    Image.fromarray(board).save(tmp_path / "board.png")
    assert np.abs(load_image(tmp_path / "board.png", 32).astype(int) - 128).max() <= 1


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ImageUnreadable, match=r"a\.png"):
        load_image(tmp_path / "a.png", 32)


def test_the_cache_gives_what_the_file_gives_and_keeps_to_its_budget(tmp_path: Path, write_image: Make) -> None:
    one, two = write_image(tmp_path / "1.png", seed=1), write_image(tmp_path / "2.png", seed=2)
    cache = ImageCache(32, budget_bytes=32 * 32 * 3)
    wanted = [load_image(path, 32) for path in (one, two)]
    for _ in range(2):
        for path, image in zip((one, two), wanted, strict=True):
            np.testing.assert_array_equal(cache.get(path), image)
    one.unlink()
    np.testing.assert_array_equal(cache.get(one), wanted[0])  # remembered
    two.unlink()
    with pytest.raises(ImageUnreadable):
        cache.get(two)  # there was no room for it


def test_views_by_hand() -> None:
    image = numbered(2, 4)
    assert training_view(image, 0.0, False, False)[0, :, 1].tolist() == [0, 1]
    assert training_view(image, 0.99, False, False)[0, :, 1].tolist() == [2, 3]
    assert training_view(image, 0.0, True, False)[0, :, 1].tolist() == [1, 0]
    assert training_view(image, 0.0, False, True)[:, 0, 0].tolist() == [1, 0]
    assert evaluation_view(image)[0, :, 1].tolist() == [1, 2]


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1, exclude_max=True), st.booleans(), st.booleans())
def test_a_view_is_a_largest_square_of_the_image(height: int, width: int, offset: float, h: bool, v: bool) -> None:
    view = training_view(numbered(height, width), offset, h, v)
    side = min(height, width)
    assert view.shape == (side, side, 3)
    rows, columns = view[:, 0, 0].astype(int), view[0, :, 1].astype(int)
    assert sorted(rows) == list(range(rows.min(), rows.min() + side))
    assert sorted(columns) == list(range(columns.min(), columns.min() + side))


@given(st.integers(2, 9))
def test_every_place_of_the_crop_is_equally_likely(places: int) -> None:
    image = numbered(3, 3 + places - 1)
    lefts = [int(training_view(image, (k + 0.5) / (100 * places), False, False)[0, 0, 1]) for k in range(100 * places)]
    assert np.bincount(lefts).tolist() == [100] * places


def test_postscript_by_another_name_starts_no_other_program(tmp_path: Path) -> None:
    """Pillow runs `gs` for it, whatever the file is called."""
    path = tmp_path / "tile.png"
    Image.new("RGB", (8, 8)).save(path, "EPS")
    with pytest.raises(ImageUnreadable, match="not a readable image"):
        read_rgb(path)


def with_orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = number
    return exif


@pytest.mark.parametrize("suffix", [".tif", ".gif", ".png", ".webp"])
def test_a_file_of_several_pictures_is_refused_and_not_its_first_taken(tmp_path: Path, suffix: str) -> None:
    first, second = (Image.new("RGB", (32, 32), (level, 90, 120)) for level in (60, 200))
    first.save(tmp_path / f"a{suffix}", save_all=True, append_images=[second])
    with pytest.raises(ImageUnreadable, match=r"a\.\w+ holds 2 pictures"):
        check_image(tmp_path / f"a{suffix}")


def test_smaller_copies_behind_a_picture_are_no_pictures_of_their_own_and_before_it_they_are(tmp_path: Path) -> None:
    picture = numbered(32, 32)
    for name, pages in (("behind.tif", (picture, picture[::2, ::2])), ("before.tif", (picture[::2, ::2], picture))):
        with tifffile.TiffWriter(tmp_path / name) as file:
            for page in pages:
                file.write(page, photometric="rgb", subfiletype=int(page is not picture))
    np.testing.assert_array_equal(load_image(tmp_path / "behind.tif", 32), picture)
    with pytest.raises(ImageUnreadable, match="holds 2 pictures"):
        read_rgb(tmp_path / "before.tif")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_what_is_to_be_turned_is_refused_as_in_extraction(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (32, 24)).save(tmp_path / name, exif=with_orientation(1))
    assert read_rgb(tmp_path / name).size == (32, 24)
    Image.new("RGB", (32, 24)).save(tmp_path / name, exif=with_orientation(6))
    with pytest.raises(ImageUnreadable, match=r"turned or mirrored .*Orientation 6"):
        read_rgb(tmp_path / name)


def test_sixteen_bits_in_planes_and_signed_numbers_are_refused(tmp_path: Path) -> None:
    """Of both, Pillow makes a picture: of other pixels."""
    planes = np.full((3, 32, 32), 30_000, np.uint16)
    tifffile.imwrite(tmp_path / "planes.tif", planes, photometric="rgb", planarconfig="separate")
    tifffile.imwrite(tmp_path / "signed.tif", np.full((32, 32), -5, np.int8))
    tifffile.imwrite(tmp_path / "eight.tif", planes.astype(np.uint8), photometric="rgb", planarconfig="separate")
    for name, words in (("planes.tif", "more than 8 bits"), ("signed.tif", "signed numbers")):
        with pytest.raises(ImageUnreadable, match=words):
            read_rgb(tmp_path / name)
    assert (np.asarray(read_rgb(tmp_path / "eight.tif")) == 30_000 % 256).all()


def test_a_jpeg_with_damage_that_pillow_takes_is_refused(tmp_path: Path, write_image: Make) -> None:
    """Its end is put into its middle: the rest would be grey."""
    whole = write_image(tmp_path / "a.jpg", 64, 64).read_bytes()
    assert check_image(tmp_path / "a.jpg")
    place = len(whole) * 2 // 3
    (tmp_path / "a.jpg").write_bytes(whole[:place] + b"\xff\xd9" + whole[place + 2 :])
    read_rgb(tmp_path / "a.jpg")
    for read in (check_image, of_a_converter):
        with pytest.raises(ImageUnreadable, match=r"a\.jpg cannot be decoded: .*premature"):
            read(tmp_path / "a.jpg")


def test_a_tiff_whose_next_page_is_garbage_is_an_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.new("RGB", (32, 32)).save(path)
    data = bytearray(path.read_bytes())
    first = int.from_bytes(data[4:8], "little")
    behind = first + 2 + 12 * int.from_bytes(data[first : first + 2], "little")
    data[behind : behind + 4] = len(data).to_bytes(4, "little")
    path.write_bytes(data + bytes(6))  # a page without a width
    with pytest.raises(ImageUnreadable, match=r"a\.tif"):
        check_image(path)


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "lanczos"])
def test_an_interpolation_is_pillows_of_that_name(tmp_path: Path, write_image: Make, name: str) -> None:
    path = write_image(tmp_path / "a.png", 45, 45)
    with Image.open(path) as image:
        wanted = np.asarray(image.resize((32, 32), Image.Resampling[name.upper()]))
    np.testing.assert_array_equal(load_image(path, 32, name), wanted)


def test_the_same_pixels_in_another_shape_are_another_image(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (16, 64, 3), dtype=np.uint8)
    for name, shape in (("a.png", (16, 64, 3)), ("b.png", (64, 16, 3))):
        Image.fromarray(pixels.reshape(shape)).save(tmp_path / name)
    assert check_image(tmp_path / "a.png") != check_image(tmp_path / "b.png")


def test_an_image_is_blank_where_its_colour_is_one_and_not_where_a_channel_is(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    pixels[..., 0] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert check_image(tmp_path / "a.png")
    pixels[3:] = pixels[0, 0]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert check_image(tmp_path / "a.png") == 0
