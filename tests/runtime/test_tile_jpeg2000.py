"""JPEG 2000 slides: equal to OpenSlide to the pixel; where OpenSlide makes pixels up out of damage, an error."""

from __future__ import annotations

import struct
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

from mtdp_runtime.errors import TileUnreadable
from mtdp_runtime.slide import Slide, Source
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.slide.openslide import OpenSlideReader
from mtdp_runtime.slide.tile_jpeg2000 import decode_tile, read_header
from mtdp_runtime.slide.tiled_tiff import TiledTiffReader
from support import read_square, stained

APERIO = "Aperio Image Library v11\n{} [0,0 {}] ({}) J2K/KDU Q=70|AppMag = 40|MPP = 0.2500"
YCBCR, RGB = 33003, 33005


def encode(tile: NDArray[np.uint8], **how: object) -> bytes:
    code: bytes = imagecodecs.jpeg2k_encode(tile, codecformat="j2k", **{"level": 40, "mct": False} | how)
    return code


def write_svs(
    path: Path,
    image: NDArray[np.uint8],
    compression: int,
    tile: int = 64,
    levels: int = 1,
    skip: int = 0,
    **how: object,
) -> Path:
    """Write an Aperio slide; of every `skip` tiles one has no bytes."""
    with tifffile.TiffWriter(path) as tiff:
        for level in range(levels):
            pixels = image[:: 2**level, :: 2**level]
            height, width = pixels.shape[:2]
            padded = np.pad(pixels, ((0, -height % tile), (0, -width % tile), (0, 0)), mode="edge")
            places = [(y, x) for y in range(0, height, tile) for x in range(0, width, tile)]
            tiles = [
                b"" if skip and i % skip == 1 else encode(padded[y : y + tile, x : x + tile].copy(), **how)
                for i, (y, x) in enumerate(places)
            ]
            tiff.write(
                iter(tiles),
                shape=pixels.shape,
                dtype="uint8",
                tile=(tile, tile),
                photometric="rgb",
                compression=compression,
                metadata=None,
                description=APERIO.format(f"{width}x{height}", f"{width}x{height}", f"{tile}x{tile}"),
                subfiletype=0,
            )
    return path


KINDS = {
    "RGB": (RGB, {}),
    "RGB, transformed": (RGB, {"mct": True}),
    "YCbCr": (YCBCR, {}),
    "YCbCr, lossless": (YCBCR, {"reversible": True, "level": 0}),
    "with holes": (RGB, {"skip": 3}),
}


@pytest.fixture(scope="module", params=list(KINDS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Slide, Slide]]:
    """The fast reader and OpenSlide on a slide of two levels whose sides are no multiples of the tile."""
    compression, how = KINDS[request.param]
    path = tmp_path_factory.mktemp("slides") / "slide.svs"
    write_svs(path, stained(300, 410), compression, levels=2, **how)
    with open_slide(path) as fast, OpenSlideReader(path, None, "test") as reference:
        assert isinstance(fast, TiledTiffReader), fast.info.reader_reason
        assert "JPEG 2000" in fast.info.reader
        assert not fast.info.reductions
        yield fast, reference


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(x0=st.integers(-40, 430), y0=st.integers(-40, 320), side=st.integers(1, 150), level=st.integers(0, 1))
def test_any_window_at_a_levels_own_scale_equals_openslide(
    pair: tuple[Slide, Slide], x0: int, y0: int, side: int, level: int
) -> None:
    fast, reference = pair
    downsample = fast.info.levels[level].downsample
    x0, y0 = x0 >> level << level, y0 >> level << level
    expected = read_square(reference, x0, y0, side, downsample)
    np.testing.assert_array_equal(read_square(fast, x0, y0, side, downsample), expected)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(x0=st.integers(0, 200), y0=st.integers(0, 100), scale=st.floats(0.9, 6))
def test_any_scale_equals_openslide(pair: tuple[Slide, Slide], x0: int, y0: int, scale: float) -> None:
    fast, reference = pair
    np.testing.assert_array_equal(read_square(fast, x0, y0, 40, scale), read_square(reference, x0, y0, 40, scale))


@pytest.mark.parametrize("luma", [0, 60, 128, 255])
def test_every_colour_of_ycbcr_equals_openslide(tmp_path: Path, luma: int) -> None:
    """All pairs of Cb and Cr, without loss."""
    cb, cr = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    image = np.stack([np.full_like(cb, luma), cb, cr], axis=-1).astype(np.uint8)
    path = write_svs(tmp_path / "colours.svs", image, YCBCR, tile=256, reversible=True, level=0)
    with open_slide(path) as fast, OpenSlideReader(path, None, "test") as reference:
        assert isinstance(fast, TiledTiffReader)
        np.testing.assert_array_equal(read_square(fast, 0, 0, 256, 1.0), read_square(reference, 0, 0, 256, 1.0))


def test_a_real_jpeg_2000_slide_equals_openslide_at_both_levels(slides_dir: Path) -> None:
    path = slides_dir / "tcga-cr-7395-01a-01-ts1.svs"
    with open_slide(path, 0.25) as fast, OpenSlideReader(path, 0.25, "test") as reference:
        assert isinstance(fast, TiledTiffReader), fast.info.reader_reason
        level = fast.info.levels[1]
        whole = np.zeros((level.height, level.width, 3), np.uint8)
        fast.read_into(whole, 0, 0, level.downsample, Source(1))
        with openslide.OpenSlide(path) as plain:  # from the corner it blends nothing, though the level is no exact half
            region = np.asarray(plain.read_region((0, 0), 1, (level.width, level.height)))
        np.testing.assert_array_equal(whole, region[..., :3])
        width, height = fast.info.width, fast.info.height
        for source, scale in ((Source(0), 1.0), (Source(0), 1.979), (Source(1), level.downsample), (Source(1), 5.3)):
            places = ((0, 0), (1501, 1300), (2049, 1503), (width - 448, height - 448), (width - 10, -50))
            for x0, y0 in (*places, (width - 100, height - 3)):
                ours, theirs = np.zeros((224, 224, 3), np.uint8), np.zeros((224, 224, 3), np.uint8)
                fast.read_into(ours, x0, y0, scale, source)
                reference.read_into(theirs, x0, y0, scale, source)
                np.testing.assert_array_equal(ours, theirs)


WHOLE = encode(stained(256, 256))


def holed(code: bytes) -> bytes:
    middle = len(code) // 2
    return code[:middle] + bytes(600) + code[middle + 600 :]


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        (b"", "no JPEG 2000 codestream"),
        (bytes(len(WHOLE)), "no JPEG 2000 codestream"),
        (WHOLE[:60], "main header"),
        (WHOLE[: len(WHOLE) // 2], "breaks off"),
        (WHOLE[:-2], "no end marker"),
        (WHOLE[: len(WHOLE) // 2] + bytes(len(WHOLE) - len(WHOLE) // 2), "zero bytes in a row"),
        (holed(WHOLE), "zero bytes in a row"),
        (WHOLE[:5000] + b"\xff\xd9" + WHOLE[5002:], "a marker among its packets"),
        (WHOLE + WHOLE, "no end marker"),
    ],
)
def test_damage_is_an_error(damaged: bytes, reason: str) -> None:
    out = np.zeros((256, 256, 3), np.uint8)
    decode_tile(WHOLE, False, out)
    with pytest.raises(ValueError, match=reason):
        decode_tile(damaged, False, out)


@given(cut=st.integers(0, len(WHOLE) - 1))
def test_a_tile_that_breaks_off_anywhere_is_an_error(cut: int) -> None:
    with pytest.raises(ValueError):
        decode_tile(WHOLE[:cut], False, np.zeros((256, 256, 3), np.uint8))


@given(data=st.binary(max_size=200), at=st.integers(0, 120))
def test_a_header_of_any_bytes_is_read_or_refused(data: bytes, at: int) -> None:
    for code in (data, WHOLE[:at] + data):
        try:
            header = read_header(code)
        except ValueError:
            continue
        assert header.tile_parts_at < len(code)


def test_a_damaged_tile_of_a_slide_is_an_error_though_openslide_gives_pixels(tmp_path: Path) -> None:
    path = write_svs(tmp_path / "slide.svs", stained(256, 512), RGB, tile=256)
    with tifffile.TiffFile(path) as tiff:
        offset, size = tiff.pages[0].dataoffsets[1], tiff.pages[0].databytecounts[1]
    content = bytearray(path.read_bytes())
    content[offset + size // 2 : offset + size] = bytes(size - size // 2)
    path.write_bytes(content)
    with open_slide(path) as fast, OpenSlideReader(path, None, "test") as reference:
        read_square(reference, 300, 10, 64, 1.0)  # no error: this is why it is not asked
        np.testing.assert_array_equal(read_square(fast, 0, 0, 64, 1.0), read_square(reference, 0, 0, 64, 1.0))
        for _ in range(2):
            with pytest.raises(TileUnreadable, match="column 1, row 0 of level 0: JPEG 2000"):
                read_square(fast, 300, 10, 64, 1.0)


def test_subsampled_colours_go_to_openslide_with_the_reason(tmp_path: Path) -> None:
    """OpenSlide repeats their samples; imagecodecs does not decode them. The header is made to say so."""
    path = write_svs(tmp_path / "slide.svs", stained(64, 64), YCBCR)
    content = path.read_bytes()
    at = content.index(b"\xff\x51")
    # SIZ: marker, length, 34 bytes of sizes, then bits - 1 and subsampling of each component.
    path.write_bytes(content[: at + 43] + b"\x07\x02\x01\x07\x02\x01" + content[at + 49 :])
    with open_slide(path) as slide:
        assert isinstance(slide, OpenSlideReader)
        assert "subsampling) ((7, 1, 1), (7, 2, 1), (7, 2, 1))" in slide.info.reader_reason


@pytest.mark.parametrize("padding", [0, 1, 2, 3, 4, 16, 64])
def test_zeros_that_fill_up_a_tile_are_no_damage(padding: int) -> None:
    """Also where the only tile-part says that it goes on to the end marker (Psot 0)."""
    expected, out = np.zeros((256, 256, 3), np.uint8), np.zeros((256, 256, 3), np.uint8)
    decode_tile(WHOLE, False, expected)
    at = WHOLE.index(b"\xff\x90\x00\x0a")
    open_ended = WHOLE[: at + 6] + bytes(4) + WHOLE[at + 10 :]
    for code in (WHOLE, open_ended):
        decode_tile(code + bytes(padding), False, out)
        np.testing.assert_array_equal(out, expected)
    with pytest.raises(ValueError, match="no end marker"):
        decode_tile(WHOLE + bytes(padding) + b"\x01\x02", False, out)


@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.parametrize("container", ["j2k", "jp2"])
def test_a_codestream_that_transforms_its_colours_gives_rgb_whatever_the_tiff_says(
    transformed: bool, container: str
) -> None:
    image, out = stained(64, 64), np.zeros((64, 64, 3), np.uint8)
    code = imagecodecs.jpeg2k_encode(image, codecformat=container, level=0, mct=transformed)
    decode_tile(code, False, out)
    np.testing.assert_array_equal(out, image)
    decode_tile(code, True, out)
    assert np.array_equal(out, image) == (transformed or container == "jp2")  # JP2 says that its colours are sRGB


def test_a_jp2_file_that_breaks_off_is_an_error() -> None:
    code = imagecodecs.jpeg2k_encode(stained(64, 64), codecformat="jp2", level=0)
    for cut in (13, 40, 90, len(code) // 2, len(code) - 3):
        with pytest.raises(ValueError):
            decode_tile(code[:cut], False, np.zeros((64, 64, 3), np.uint8))


@pytest.mark.parametrize("layers", [1, 28, 29, 60])
def test_a_tile_of_empty_packets_is_grey_and_no_hole(layers: int) -> None:
    """A packet without data is one zero byte: of each component, resolution and layer."""
    siz = struct.pack(">HHHIIIIIIIIH", 0xFF51, 47, 0, 256, 256, 0, 0, 256, 256, 0, 0, 3) + b"\x07\x01\x01" * 3
    cod = struct.pack(">HHBBHBBBBBB", 0xFF52, 12, 0, 0, layers, 1, 5, 4, 4, 0, 1)
    qcd = struct.pack(">HHB", 0xFF5C, 19, 0x40) + bytes([8 << 3] + [9 << 3, 9 << 3, 10 << 3] * 5)
    body = bytes(layers * 18)
    sot = struct.pack(">HHHIBB", 0xFF90, 10, 0, 14 + len(body), 0, 1)
    code, out = (
        b"\xff\x4f" + siz + cod + qcd + sot + b"\xff\x93" + body + b"\xff\xd9",
        np.zeros((256, 256, 3), np.uint8),
    )
    decode_tile(code, False, out)
    assert (out == 128).all()
    with pytest.raises(ValueError, match="zero bytes in a row"):
        decode_tile(holed(WHOLE), False, out)


def test_an_aperio_slide_whose_tiles_transform_their_colours_says_so(tmp_path: Path) -> None:
    """Bio-Formats writes 33003 for any JPEG 2000; OpenSlide converts twice."""
    image = stained(256, 256)
    path = write_svs(tmp_path / "slide.svs", image, YCBCR, reversible=True, level=0, mct=True)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(read_square(slide, 0, 0, 256, 1.0), image)
        assert "its JPEG 2000 tiles say RGB where the TIFF says YCBCR" in slide.info.reader_reason
