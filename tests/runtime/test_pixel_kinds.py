"""What a TIFF's pixels are: 8-bit RGB, or what surely means it, in its true colours; all else is refused as what it is.

Each case is written tiled and in strips, under names of many kinds, and the answer may not depend on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mtdp_runtime.errors import SlideUnreadable
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.slide.ycbcr import YCbCr
from support import read_square, stained

RESOLUTION: dict[str, Any] = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER", "metadata": None}
SUFFIXES = (".tif", ".svs", ".btf", ".tf8", ".qptiff", ".ome.btf")


@pytest.fixture(scope="module")
def image() -> NDArray[np.uint8]:
    return stained(200, 300)


@pytest.fixture(params=["tiles", "strips"])
def layout(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"tile": (64, 64)} if request.param == "tiles" else {"rowsperstrip": 48}


def seen(path: Path) -> NDArray[np.uint8]:
    with open_slide(path) as slide:
        out = np.zeros((slide.info.height, slide.info.width, 3), np.uint8)
        slide.read_into(out, 0, 0, 1.0)
        assert slide.info.mpp == pytest.approx(0.5)
    return out


def to_ycbcr(rgb: NDArray[Any], luma: tuple[float, float, float] = (0.299, 0.587, 0.114)) -> NDArray[np.float64]:
    """ITU-R BT.601's definition, for full-range codes."""
    red, green, blue = np.moveaxis(rgb.astype(float), -1, 0)
    y = luma[0] * red + luma[1] * green + luma[2] * blue
    return np.stack([y, (blue - y) / (2 - 2 * luma[2]), (red - y) / (2 - 2 * luma[0])], axis=-1)


def full_range(rgb: NDArray[Any], luma: tuple[float, float, float] = (0.299, 0.587, 0.114)) -> NDArray[np.uint8]:
    return np.clip(np.rint(to_ycbcr(rgb, luma) * (1, 127 / 127.5, 127 / 127.5) + (0, 128, 128)), 0, 255).astype(
        np.uint8
    )


TAKEN = {
    "rgb": (lambda rgb: rgb, {"photometric": "rgb"}),
    "planes": (lambda rgb: np.moveaxis(rgb, -1, 0).copy(), {"photometric": "rgb", "planarconfig": "separate"}),
    "alpha": (
        lambda rgb: np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)]),
        {"photometric": "rgb", "extrasamples": ["unassalpha"]},
    ),
    "ycbcr": (full_range, {"photometric": "ycbcr", "subsampling": (1, 1)}),
}


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "zstd", "packbits"])
@pytest.mark.parametrize("kind", list(TAKEN))
def test_colours_are_what_was_written(
    tmp_path: Path, image: NDArray[np.uint8], layout: dict[str, Any], kind: str, compression: str | None
) -> None:
    make, how = TAKEN[kind]
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, make(image), compression=compression, **how, **layout, **RESOLUTION)
    off = np.abs(seen(path).astype(int) - image).max()
    assert off <= (3 if kind == "ycbcr" else 0)  # YCbCr of 8 bits has fewer colours


def test_one_channel_of_grey_is_grey(tmp_path: Path, image: NDArray[np.uint8], layout: dict[str, Any]) -> None:
    grey = image[..., 1]
    palette = np.random.default_rng(0).integers(0, 256, (3, 256)).astype(np.uint16) * 257
    for name, pixels, how, expected in (
        ("black", grey, {"photometric": "minisblack"}, grey[..., None].repeat(3, 2)),
        ("white", 255 - grey, {"photometric": "miniswhite"}, grey[..., None].repeat(3, 2)),
        ("palette", grey, {"photometric": "palette", "colormap": palette}, (palette >> 8).astype(np.uint8).T[grey]),
    ):
        tifffile.imwrite(tmp_path / f"{name}.tif", pixels, **how, **layout, **RESOLUTION)
        np.testing.assert_array_equal(seen(tmp_path / f"{name}.tif"), expected)


def test_one_dark_channel_is_fluorescence(tmp_path: Path, image: NDArray[np.uint8], layout: dict[str, Any]) -> None:
    dark = (255 - image[..., 1]) // 2
    tifffile.imwrite(tmp_path / "a.tif", dark, photometric="minisblack", **layout, **RESOLUTION)
    with pytest.raises(SlideUnreadable, match="one channel of grey, dark as of fluorescence"):
        open_slide(tmp_path / "a.tif")


LUMA_709 = (0.2126, 0.7152, 0.0722)


@pytest.mark.parametrize("compression", [None, "lzw"])
def test_what_a_tiff_says_of_its_ycbcr_counts(
    tmp_path: Path, image: NDArray[np.uint8], layout: dict[str, Any], compression: str | None
) -> None:
    """Video range (16 to 235 and 240), and the coefficients of high definition."""
    video = np.rint(to_ycbcr(image) * (219 / 255, 224 / 255, 224 / 255) + (16, 128, 128)).astype(np.uint8)
    # Cb and Cr are 127 steps to the white of their reference, as TIFF 6.0 counts: 112 of video are its 127.5.
    reference = (16, 1, 235, 1, 128, 1, 240, 1, 128, 1, 240, 1)
    coefficients = tuple(number for weight in LUMA_709 for number in (round(weight * 10000), 10000))
    for name, pixels, tag in (
        ("video", video, (532, 5, 6, reference, True)),
        ("709", full_range(image, LUMA_709), (529, 5, 3, coefficients, True)),
    ):
        path = tmp_path / f"{name}.tif"
        how = {"photometric": "ycbcr", "subsampling": (1, 1), "compression": compression, "extratags": [tag]}
        tifffile.imwrite(path, pixels, **how, **layout, **RESOLUTION)
        assert np.abs(seen(path).astype(int) - image).max() <= 4


@given(
    across=st.sampled_from([1, 2, 4]),
    down=st.sampled_from([1, 2, 4]),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
)
def test_a_data_unit_is_a_block_of_luminance_and_one_pair_of_differences(
    across: int, down: int, rows: int, columns: int
) -> None:
    """Packed pixel by pixel as TIFF 6.0, section 21, draws it."""
    how, rng = YCbCr(across, down, (0.299, 0.587, 0.114), (0, 255, 128, 255, 128, 255)), np.random.default_rng(rows)
    high, wide = -(-rows // down), -(-columns // across)
    luma = rng.integers(0, 256, (high * down, wide * across))
    chroma = rng.integers(0, 256, (high, wide, 2))
    packed = []
    for y in range(high):
        for x in range(wide):
            packed += [luma[y * down + i, x * across + j] for i in range(down) for j in range(across)]
            packed += list(chroma[y, x])
    assert how.packed_bytes(rows, columns) == len(packed)
    out = how.unpack(np.array(packed, np.uint8), rows, columns)
    for y in range(rows):
        for x in range(columns):
            assert tuple(out[y, x]) == (luma[y, x], *chroma[y // down, x // across])


def test_a_subsampled_tiff_reads_as_its_colours(tmp_path: Path) -> None:
    """Of colour patches, which lose nothing: 2 x 2 pixels share their differences."""
    patches = np.random.default_rng(1).integers(40, 216, (25, 37, 3)).astype(np.uint8).repeat(4, 0).repeat(4, 1)
    codes = full_range(patches)
    units = [
        [codes[y + i, x + j, 0] for i in range(2) for j in range(2)] + [codes[y, x, 1], codes[y, x, 2]]
        for y in range(0, 100, 2)
        for x in range(0, 148, 2)
    ]
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, codes, photometric="ycbcr", subsampling=(1, 1), rowsperstrip=100, **RESOLUTION)
    data = np.array(units, np.uint8).tobytes()
    with tifffile.TiffFile(path, mode="r+") as tiff:
        page = tiff.pages[0]
        tiff.filehandle.seek(page.dataoffsets[0])
        tiff.filehandle.write(data)
        page.tags["YCbCrSubSampling"].overwrite((2, 2))
        page.tags["StripByteCounts"].overwrite(len(data))
    assert np.abs(seen(path).astype(int) - patches).max() <= 3


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "two more samples": (
        lambda rgb: np.dstack([rgb, rgb[..., :2]]),
        {"photometric": "rgb", "extrasamples": ["unspecified"] * 2},
        "5 x uint8, not 8-bit RGB",
    ),
    "three more samples": (
        lambda rgb: np.dstack([rgb, rgb]),
        {"photometric": "rgb", "extrasamples": ["unspecified"] * 3},
        "6 x uint8, not 8-bit RGB",
    ),
    "a fourth sample": (
        lambda rgb: np.dstack([rgb, rgb[..., :1]]),
        {"photometric": "rgb", "extrasamples": ["unspecified"]},
        "does not say what its fourth channel is",
    ),
    "signed": (lambda rgb: rgb.astype(np.int8), {"photometric": "rgb"}, "signed integers"),
    "16 bits": (lambda rgb: rgb.astype(np.uint16) * 257, {"photometric": "rgb"}, "3 x uint16, not 8-bit RGB"),
    "12 in 16 bits": (lambda rgb: rgb.astype(np.uint16) * 16, {"photometric": "rgb"}, "3 x uint16, not 8-bit RGB"),
    "grey of 16 bits": (lambda rgb: rgb[..., 0] * np.uint16(257), {"photometric": "minisblack"}, "1 x uint16, not 8"),
    "float": (lambda rgb: rgb.astype(np.float32) / 255, {"photometric": "rgb"}, "floating-point"),
    "one bit": (lambda rgb: rgb[..., 0] > 128, {"photometric": "minisblack"}, "1 x 1 bits, not 8-bit RGB"),
    "four channels in planes": (
        lambda rgb: np.moveaxis(np.dstack([rgb, rgb[..., 0]]), -1, 0).copy(),
        {"photometric": "minisblack", "planarconfig": "separate"},
        r"4 x uint8 \(several channels",
    ),
    "two channels": (
        lambda rgb: rgb[..., :2].copy(),
        {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": ["unspecified"]},
        r"2 x uint8 \(several channels",
    ),
    "inks": (
        lambda rgb: np.dstack([255 - rgb, rgb[..., 0] * 0]),
        {"photometric": "separated"},
        "its colours are SEPARATED, not RGB",
    ),
    "Lab": (lambda rgb: rgb, {"photometric": "cielab"}, "its colours are CIELAB, not RGB"),
    **{
        f"turned {way}": (
            lambda rgb: rgb,
            {"photometric": "rgb", "extratags": [(274, 3, 1, way, True)]},
            rf"turned or mirrored before it is seen \(Orientation {way}\)",
        )
        for way in range(2, 9)
    },
}


@pytest.mark.parametrize("kind", list(REFUSED))
def test_other_kinds_are_refused_as_what_they_are_under_every_name(
    tmp_path: Path, image: NDArray[np.uint8], layout: dict[str, Any], kind: str
) -> None:
    make, how, message = REFUSED[kind]
    for suffix in SUFFIXES:
        path = tmp_path / f"image{suffix}"
        tifffile.imwrite(path, make(image), **how, **layout, **RESOLUTION)
        with pytest.raises(SlideUnreadable, match=message) as caught:
            open_slide(path)
        assert caught.value.hint == "Export it as 8-bit RGB."


@pytest.mark.parametrize("compression", ["jpeg", "zlib"])
def test_a_kind_that_only_a_coarser_level_has_is_never_read_as_rgb(
    tmp_path: Path, image: NDArray[np.uint8], compression: str
) -> None:
    path = tmp_path / "image.tif"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(image, tile=(64, 64), photometric="rgb", compression=compression, **RESOLUTION)
        coarse = np.dstack([image[::2, ::2], image[::2, ::2]])
        tiff.write(coarse, tile=(64, 64), photometric="rgb", extrasamples=[0] * 3, subfiletype=1, **RESOLUTION)
    with open_slide(path) as slide:  # what OpenSlide makes of it does not look like level 0
        assert len(slide.info.levels) == 1
        assert "shows something else" in slide.info.reader_reason


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_stack_of_channels_is_refused_and_not_its_first_taken(
    tmp_path: Path, image: NDArray[np.uint8], layout: dict[str, Any], suffix: str
) -> None:
    path = tmp_path / f"image{suffix}"
    stack = np.moveaxis(np.dstack([image, image[..., :1]]), -1, 0).copy()
    tifffile.imwrite(path, stack, photometric="minisblack", **layout, **RESOLUTION)
    with pytest.raises(SlideUnreadable, match="an image of 4 planes"):
        open_slide(path)


def test_of_several_depths_the_first_is_not_taken_for_the_slide(
    tmp_path: Path, image: NDArray[np.uint8], layout: dict[str, Any]
) -> None:
    path = tmp_path / "image.tif"
    with tifffile.TiffWriter(path) as tiff:
        for depth in range(3):
            tiff.write(np.roll(image, depth, axis=0), photometric="rgb", **layout, **RESOLUTION)
    with pytest.raises(SlideUnreadable, match="an image of 3 planes"):
        open_slide(path)


def test_a_stack_that_imagej_describes_in_one_directory_is_refused(tmp_path: Path, image: NDArray[np.uint8]) -> None:
    path = tmp_path / "stack.tif"
    stack = np.moveaxis(np.dstack([image, image]), -1, 0).copy()
    tifffile.imwrite(path, stack, imagej=True)
    content, whole = path.read_bytes(), image.shape[0] * image.shape[1]
    with tifffile.TiffFile(path) as tiff:
        assert len(tiff.pages) == 6
        link = tiff.pages[0].offset + 2 + 12 * len(tiff.pages[0].tags)
        order = "little" if tiff.byteorder == "<" else "big"
        assert tiff.pages[1].dataoffsets[0] - tiff.pages[0].dataoffsets[0] == whole
    path.write_bytes(content[:link] + (0).to_bytes(4, order) + content[link + 4 :])
    with tifffile.TiffFile(path) as tiff:
        assert (len(tiff.pages), tiff.series[0].shape[0]) == (1, 6)
    with pytest.raises(SlideUnreadable, match="an image of 6 planes"):
        open_slide(path)


def test_a_predictor_is_undone_before_ycbcr_is_converted(
    tmp_path: Path, image: NDArray[np.uint8], layout: dict[str, Any]
) -> None:
    path, how = tmp_path / "image.tif", {"photometric": "ycbcr", "subsampling": (1, 1)}
    tifffile.imwrite(path, full_range(image), compression="zlib", predictor=True, **how, **layout, **RESOLUTION)
    assert np.abs(seen(path).astype(int) - image).max() <= 3


def test_a_level_in_a_subifd_is_a_level_without_ome_xml_too(tmp_path: Path) -> None:
    image, path = stained(512, 640), tmp_path / "image.tif"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(image, tile=(128, 128), subifds=2, photometric="rgb", compression="zlib", **RESOLUTION)
        for level in (2, 4):
            part = np.ascontiguousarray(image[::level, ::level])
            tiff.write(part, tile=(128, 128), subfiletype=1, photometric="rgb", compression="zlib", metadata=None)
    with open_slide(path) as slide:
        assert [(level.width, level.height) for level in slide.info.levels] == [(640, 512), (320, 256), (160, 128)]
        assert "SubIFDs" in slide.info.reader_reason
        np.testing.assert_array_equal(read_square(slide, 200, 100, 100, 2.0), image[100:300:2, 200:400:2])
        np.testing.assert_array_equal(read_square(slide, 200, 100, 100, 1.0), image[100:200, 200:300])


@pytest.mark.parametrize("compression", ["zlib", "jpeg", "webp"])
def test_tiles_that_are_listed_as_strips_are_read(tmp_path: Path, image: NDArray[np.uint8], compression: str) -> None:
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, image, tile=(64, 64), photometric="rgb", compression=compression, **RESOLUTION)
    expected = tifffile.imread(path)
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        tags = tiff.pages[0].tags
        places = {273: tags["TileOffsets"].offset, 279: tags["TileByteCounts"].offset}
    for code, place in places.items():
        content[place : place + 2] = code.to_bytes(2, "little")
    path.write_bytes(content)
    np.testing.assert_array_equal(seen(path), expected)


def test_old_jpeg_and_jpeg_of_12_bits_are_refused_when_the_slide_is_opened(
    tmp_path: Path, image: NDArray[np.uint8], layout: dict[str, Any]
) -> None:
    old = tmp_path / "old.tif"
    tifffile.imwrite(old, image, photometric="rgb", compression="jpeg", **layout, **RESOLUTION)
    with tifffile.TiffFile(old, mode="r+") as tiff:
        tiff.pages[0].tags["Compression"].overwrite(6)
    with pytest.raises(SlideUnreadable, match="old-style JPEG"):
        open_slide(old)
    deep = tmp_path / "deep.tif"
    side = 64
    code = imagecodecs.jpeg8_encode(image[:side, :side].astype(np.uint16) * 16, level=90, bitspersample=12)
    tifffile.imwrite(
        deep, iter([code]), shape=(side, side, 3), dtype=np.uint8, photometric="ycbcr", subsampling=(2, 2),
        compression="jpeg", **({"tile": (side, side)} if "tile" in layout else {"rowsperstrip": side}), **RESOLUTION,
    )  # fmt: skip
    with pytest.raises(SlideUnreadable, match="JPEG of 12 bits per sample"):
        open_slide(deep)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_is_of_16_bits_or_where_all_fits_of_8(
    tmp_path: Path, image: NDArray[np.uint8], layout: dict[str, Any], bits: int
) -> None:
    """A palette of 8 bits is against TIFF 6.0, and all programs read it as libtiff does, not as a black picture."""
    palette = np.stack([np.arange(256), np.arange(256)[::-1], np.full(256, 40)]).astype(np.uint16)
    path = tmp_path / "image.tif"
    indices = image[..., 1].copy()
    colormap = palette * 257 if bits == 16 else palette
    tifffile.imwrite(path, indices, photometric="palette", colormap=colormap, **layout, **RESOLUTION)
    np.testing.assert_array_equal(seen(path), palette.T[indices])


@pytest.mark.parametrize("tile", [(16, 16), (48, 80), (240, 240)])
def test_uncompressed_tiles_may_have_any_size(tmp_path: Path, image: NDArray[np.uint8], tile: tuple[int, int]) -> None:
    """OpenSlide's libtiff takes them for damaged unless their bytes are whole kilobytes."""
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, image, photometric="rgb", tile=tile, **RESOLUTION)
    np.testing.assert_array_equal(seen(path), image)
