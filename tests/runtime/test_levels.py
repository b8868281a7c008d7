"""A level of a file is a level of the same picture, and a tile read from it comes from its own place."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
import pytest
import tifffile
from numpy.typing import NDArray

from mtdp_runtime.slide.open import open_slide
from support import halved, read_square, stained

Image = NDArray[np.uint8]


@cache
def clouds(height: int, width: int, cell: int = 160) -> Image:
    """Smooth random colours: no two places look alike, and JPEG and halving change little."""
    small = np.random.default_rng(0).integers(0, 255, (height // cell + 2, width // cell + 2, 3), np.uint8)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)


def rounded_up(image: Image) -> Image:
    """Half the size, an odd last row or column repeated."""
    odd = [(0, side % 2) for side in image.shape[:2]]
    return halved(np.pad(image, (*odd, (0, 0)), "edge"))


@cache
def narrow_levels(height: int, width: int, up: bool) -> list[Image]:
    levels = [clouds(height, width)]
    for _ in range(5):
        levels.append((rounded_up if up else halved)(levels[-1]))
    return levels


def area(image: Image, factor: int) -> NDArray[np.float64]:
    height, width = image.shape[0] // factor, image.shape[1] // factor
    return image[: height * factor, : width * factor].reshape(height, factor, width, factor, 3).mean(axis=(1, 3))


@pytest.mark.parametrize("up", [False, True], ids=["rounded down", "rounded up"])
@pytest.mark.parametrize("kind", ["plain.tif", "jpeg.tif", "pyramid.ome.tif"])
@pytest.mark.parametrize("size", [(1023, 9001), (9001, 1023)], ids=["tall", "wide"])
def test_a_tile_of_a_narrow_slide_comes_from_its_place(
    tmp_path: Path, kind: str, up: bool, size: tuple[int, int]
) -> None:
    width, height = size
    levels = narrow_levels(height, width, up)
    path = tmp_path / kind
    options: dict[str, Any] = {"tile": (256, 256), "photometric": "rgb"}
    options |= {"compression": "zlib", "compressionargs": {"level": 1}}
    if kind == "jpeg.tif":
        options |= {"compression": "jpeg", "compressionargs": {"level": 95}, "subsampling": (1, 1)}
    with tifffile.TiffWriter(path, ome=kind.endswith(".ome.tif")) as tiff:
        for number, level in enumerate(levels):
            if kind.endswith(".ome.tif"):
                tiff.write(level, subifds=0 if number else 5, metadata={"axes": "YXS"}, **options)
            else:
                tiff.write(level, metadata=None, subfiletype=int(number > 0), **options)
    with open_slide(path) as slide:
        assert [level.downsample for level in slide.info.levels] == [1, 2, 4, 8, 16, 32]
        for factor in (2, 8, 32):
            side = 960 // factor
            x0, y0 = (width - side * factor) // 32 * 32, (height - side * factor) // 32 * 32  # the far corner
            expected = area(levels[0][y0 : y0 + side * factor, x0 : x0 + side * factor], factor)
            off = np.abs(read_square(slide, x0, y0, side, factor) - expected)
            assert off.mean() < 3, (factor, off.mean())  # 40 and more where it comes from elsewhere


@pytest.mark.parametrize("compression", ["jpeg", "zlib"])
@pytest.mark.parametrize("height", [170, 400], ids=["OpenSlide opens it", "OpenSlide refuses it"])
def test_a_macro_that_is_flagged_as_reduced_is_no_level(tmp_path: Path, compression: str, height: int) -> None:
    path, picture = tmp_path / "macro.tif", stained(1024, 2048)
    options: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb", "metadata": None, "compression": compression}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(picture, **options)
        tiff.write(np.full((height, 380, 3), (0, 200, 0), np.uint8), subfiletype=1, **options)
        tiff.write(halved(halved(picture)), subfiletype=1, **options)
    with open_slide(path) as slide:
        assert [(level.width, level.downsample) for level in slide.info.levels] == [(2048, 1), (512, 4)]
        if height == 170:  # else tifffile reads it, which does not take the macro for a level either
            assert "no level of this picture: 380 x 170 px is 1/5.389 of the width" in slide.info.reader_reason
        for factor in (4, 6):  # 6 is beyond the macro's 5.4
            off = np.abs(read_square(slide, 0, 0, 128, factor) - area(picture, factor)[:128, :128])
            assert off.mean() < 3


def test_what_is_left_out_does_not_move_the_other_levels(tmp_path: Path) -> None:
    """OpenSlide counts the macro: it stands between two levels."""
    path, picture = tmp_path / "macro.tif", stained(1024, 2048)
    options: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb", "metadata": None, "compression": "zlib"}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(picture, **options)
        tiff.write(np.full((280, 700, 3), (0, 200, 0), np.uint8), subfiletype=1, **options)
        tiff.write(halved(halved(picture)), subfiletype=1, **options)
    with open_slide(path) as slide, openslide.OpenSlide(path) as counted:
        assert [width for width, _ in counted.level_dimensions] == [2048, 700, 512]
        assert [level.width for level in slide.info.levels] == [2048, 512]
        off = np.abs(read_square(slide, 0, 0, 128, 4.0) - area(picture, 4)[:128, :128])
        assert off.max() <= 1.6  # the level was rounded twice


@pytest.mark.parametrize("factor", [4, 5, 64])
def test_a_macro_of_the_slides_own_shape_is_no_level_either(tmp_path: Path, factor: int) -> None:
    path, picture = tmp_path / "macro.tif", stained(1280, 1920)
    macro = np.full((1280 // factor, 1920 // factor, 3), (30, 90, 40), np.uint8)
    options: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb", "metadata": None, "compression": "zlib"}
    with tifffile.TiffWriter(path) as tiff:
        for number, pixels in enumerate(sorted((picture, halved(picture), macro), key=lambda one: -one.size)):
            tiff.write(pixels, subfiletype=int(number > 0), **options)
    with open_slide(path) as slide:
        assert [level.downsample for level in slide.info.levels] == [1, 2]
        assert f"{1920 // factor} x {1280 // factor} px shows something else" in slide.info.reader_reason


@pytest.mark.parametrize("kind", ["planes", "webp", "ome"])
def test_nor_where_openslide_does_not_read_the_slide(tmp_path: Path, kind: str) -> None:
    path, picture = tmp_path / ("macro.ome.tif" if kind == "ome" else "macro.tif"), clouds(1280, 1920)
    macro = 255 - halved(halved(picture))
    options: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb", "compression": "zlib"}
    if kind == "webp":
        options |= {"compression": "webp", "compressionargs": {"lossless": True, "method": 0}}
    if kind == "planes":
        options |= {"planarconfig": "separate"}
    with tifffile.TiffWriter(path, ome=kind == "ome") as tiff:
        for number, pixels in enumerate((picture, halved(picture), macro)):
            pixels = pixels.transpose(2, 0, 1) if kind == "planes" else pixels
            if kind == "ome":
                tiff.write(pixels, subifds=0 if number else 2, metadata={"axes": "YXS"}, **options)
            else:
                tiff.write(pixels, subfiletype=int(number > 0), metadata=None, **options)
    with open_slide(path) as slide:
        assert slide.info.reader.startswith("tifffile")
        assert [level.downsample for level in slide.info.levels] == [1, 2]
        assert "480 x 320 px shows something else" in slide.info.reader_reason
        tile = read_square(slide, 320, 160, 64, 4.0)
        assert np.abs(tile - area(picture, 4)[40:104, 80:144]).mean() < 0.5


@pytest.mark.parametrize("factor", [2.9, 6.25, 10.5])
def test_a_level_in_one_strip_is_not_padded_to_it(tmp_path: Path, factor: float) -> None:
    """A side of a strip is a side of the image: it says nothing of whole tiles, which a level may be padded to."""
    path, picture = tmp_path / "strip.ome.tif", clouds(1603, 2074)
    size = (int(picture.shape[1] / factor), int(picture.shape[0] / factor))
    level = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(picture, subifds=1, tile=(128, 128), photometric="rgb", metadata={"axes": "YXS"})
        tiff.write(level, photometric="rgb", rowsperstrip=size[1], subfiletype=1)
    with open_slide(path) as slide:
        assert [one.downsample for one in slide.info.levels] == pytest.approx([1, factor], rel=0.01)


@pytest.mark.parametrize("kind", ["average", "left out", "bright"])
def test_levels_made_in_any_way_are_levels(tmp_path: Path, slides_dir: Path, kind: str) -> None:
    """Averaged, every second pixel left out, or of other brightness: all of it is the same picture."""
    with openslide.OpenSlide(slides_dir / "CMU-1-Small-Region.svs") as real:
        picture = np.array(real.read_region((0, 0), 0, (2048, 2048)))[..., :3]
    levels = [picture]
    for _ in range(6):
        last = levels[-1]
        levels.append(last[::2, ::2] if kind == "left out" else halved(last))
    if kind == "bright":
        levels[1:] = [np.minimum(level.astype(int) + 15, 255).astype(np.uint8) for level in levels[1:]]
    path = tmp_path / "pyramid.tif"
    with tifffile.TiffWriter(path) as tiff:
        for number, level in enumerate(levels):
            tiff.write(level, tile=(128, 128), photometric="rgb", metadata=None, subfiletype=int(number > 0))
    with open_slide(path) as slide:
        assert [level.downsample for level in slide.info.levels] == [1, 2, 4, 8, 16, 32, 64]


def test_the_slide_of_an_ome_tiff_is_its_largest_image_and_its_scale_is_that_images(tmp_path: Path) -> None:
    """Bio-Formats converts Leica's SCN with the macro as Image:0."""
    macro, picture = np.full((60, 90, 3), (0, 200, 0), np.uint8), stained(300, 320)
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as tiff:
        for pixels, mpp in ((macro, 16.0), (picture, 0.25)):
            metadata = {"axes": "YXS", "PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
            tiff.write(pixels, tile=(64, 64), photometric="rgb", metadata=metadata)
    with open_slide(tmp_path / "a.ome.tif") as slide:
        assert slide.info.mpp == 0.25
        np.testing.assert_array_equal(read_square(slide, 10, 20, 280, 1.0), picture[20:300, 10:290])


@pytest.mark.parametrize("order", [(1, 0), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("compression", ["jpeg", "lzw"])
def test_the_slide_is_its_largest_image_wherever_it_lies_in_the_file(
    tmp_path: Path, compression: str, order: tuple[int, ...]
) -> None:
    """OpenSlide takes the first directory for level 0, and leaves out what is larger."""
    levels = [clouds(600, 800)]
    levels += [halved(levels[0]), halved(halved(levels[0]))]
    path = tmp_path / "shuffled.tiff"
    with tifffile.TiffWriter(path) as tiff:
        for number in order:
            tiff.write(
                levels[number], subfiletype=min(number, 1), tile=(128, 128), photometric="rgb", compression=compression,
                resolution=(40000 / 2**number,) * 2, resolutionunit="CENTIMETER", metadata=None,
            )  # fmt: skip
    with open_slide(path) as slide:
        found = [(level.width, level.downsample) for level in slide.info.levels]
        assert found[0] == (800, 1.0)
        assert set(found) <= {(800 // 2**number, 2.0**number) for number in order}
        assert slide.info.mpp == pytest.approx(0.25)
        assert np.abs(read_square(slide, 300, 200, 128, 1.0) - levels[0][200:328, 300:428].astype(int)).mean() < 2


def test_an_image_called_macro_is_not_the_slide_however_large(tmp_path: Path) -> None:
    macro, picture = np.full((600, 900, 3), (0, 200, 0), np.uint8), stained(300, 320)
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as tiff:
        for pixels, mpp, name in ((macro, 16.0, "macro image"), (picture, 0.25, "case 7")):
            metadata = {"axes": "YXS", "PhysicalSizeX": mpp, "PhysicalSizeY": mpp, "Name": name}
            tiff.write(pixels, tile=(64, 64), photometric="rgb", metadata=metadata)
    with open_slide(tmp_path / "a.ome.tif") as slide:
        assert (slide.info.width, slide.info.height, slide.info.mpp) == (320, 300, 0.25)
