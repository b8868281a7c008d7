"""Damage in any image is an error where it lies, and only there; what no reader can see is not claimed."""

from __future__ import annotations

import lzma
import struct
import zlib
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from mtdp_runtime.errors import SlideUnreadable, TileUnreadable
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.slide.tiff_codecs import decode_bytes
from support import read_square

OME: dict[str, Any] = {"photometric": "rgb", "metadata": {"axes": "YXS"}, "ome": True}
LAYOUTS: dict[str, dict[str, Any]] = {"tiles": {"tile": (128, 128)}, "strips": {"rowsperstrip": 64}}
SEGMENT = 3  # the damaged one: a tile at (0, 128), or rows 192 to 255


@pytest.fixture(scope="module")
def image() -> NDArray[np.uint8]:
    ys, xs = np.mgrid[0:256, 0:384]
    smooth = np.stack([128 + 90 * np.sin(xs / 20), 128 + 90 * np.cos(ys / 30), (xs + ys) / 3], axis=-1)
    return np.clip(smooth + np.random.default_rng(0).normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def zeros_at_the_end(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def nothing_but_zeros(data: bytes) -> bytes:
    return bytes(len(data))


def a_hole(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(600) + data[middle + 600 :]


def noise(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + np.random.default_rng(1).bytes(64) + data[middle + 64 :]


EVERY = (cut, zeros_at_the_end, nothing_but_zeros)
DAMAGES = {
    "jpeg": (*EVERY, a_hole, noise),
    "jpeg2000": (*EVERY, a_hole),
    "zlib": (*EVERY, a_hole, noise),
    "lzw": (*EVERY, a_hole, noise),
    "zstd": EVERY,
    "packbits": EVERY,
    "webp": EVERY,
    "jpegxl": (*EVERY, a_hole),
    None: (cut,),  # which bytes are pixels is all that can be known of them
}


def damaged(path: Path, how: Any) -> None:
    """Damage a segment; where it becomes shorter, the list says so."""
    with tifffile.TiffFile(path, mode="r+") as tiff:
        page = tiff.pages[0]
        offset, sizes = page.dataoffsets[SEGMENT], list(page.databytecounts)
        tiff.filehandle.seek(offset)
        data = how(tiff.filehandle.read(sizes[SEGMENT]))
        tiff.filehandle.seek(offset)
        tiff.filehandle.write(data)
        sizes[SEGMENT] = len(data)
        page.tags["TileByteCounts" if page.is_tiled else "StripByteCounts"].overwrite(sizes)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(
    ("compression", "how"),
    [(name, how) for name, many in DAMAGES.items() for how in many],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_a_damaged_segment_is_told(
    tmp_path: Path, image: NDArray[np.uint8], layout: str, compression: str | None, how: Any
) -> None:
    path = tmp_path / "image.ome.tif"
    arguments = {"level": 40} if compression == "jpeg2000" else {"level": 80} if compression == "webp" else None
    tifffile.imwrite(path, image, compression=compression, compressionargs=arguments, **LAYOUTS[layout], **OME)
    expected = tifffile.imread(path)
    damaged(path, how)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(read_square(slide, 0, 0, 60, 1.0), expected[:60, :60])
        with pytest.raises(TileUnreadable, match=f"cannot decode segment {SEGMENT} of level 0"):
            read_square(slide, 10, 200, 50, 1.0)
        np.testing.assert_array_equal(read_square(slide, 256, 100, 60, 1.0), expected[100:160, 256:316])


@pytest.mark.parametrize("codec", ["lzw", "packbits", "zstd", "lzma"])
@pytest.mark.parametrize("more", [1, 7, 128])
def test_a_codec_without_checksums_must_give_exactly_the_bytes_of_the_pixels(codec: str, more: int) -> None:
    compression, encode = {
        "lzw": (5, imagecodecs.lzw_encode),
        "packbits": (32773, imagecodecs.packbits_encode),
        "zstd": (50000, imagecodecs.zstd_encode),
        "lzma": (34925, lzma.compress),
    }[codec]
    row = np.random.default_rng(2).bytes(3 * 16 * 8)
    shape = (8, 16, 3)
    expected = np.frombuffer(row, np.uint8).reshape(shape)
    np.testing.assert_array_equal(decode_bytes(encode(row), compression, 1, shape, 8), expected)
    for other in (row + bytes(more), row[:-more]):
        with pytest.raises(ValueError, match=f"{len(other)} bytes where {len(row)} were expected"):
            decode_bytes(encode(other), compression, 1, shape, 8)
    # The last strip of a level may be written whole.
    np.testing.assert_array_equal(decode_bytes(encode(row + row), compression, 1, shape, 16), expected)


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "zstd", "packbits"])
def test_openslide_tells_it_too_where_it_reads(
    tmp_path: Path, image: NDArray[np.uint8], compression: str | None
) -> None:
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, image, compression=compression, photometric="rgb", metadata=None, **LAYOUTS["tiles"])
    damaged(path, cut)
    with open_slide(path) as slide:
        assert slide.info.reader.startswith("openslide")
        np.testing.assert_array_equal(read_square(slide, 0, 0, 60, 1.0), image[:60, :60])
        with pytest.raises(TileUnreadable):
            read_square(slide, 10, 200, 50, 1.0)


def test_a_slide_whose_first_segments_are_damaged_opens(tmp_path: Path, image: NDArray[np.uint8]) -> None:
    for name, how in (("a.tif", {"metadata": None, "photometric": "rgb"}), ("b.ome.tif", OME)):
        path = tmp_path / name
        tifffile.imwrite(path, image, compression="jpeg", tile=(64, 64), **how)
        with tifffile.TiffFile(path, mode="r+") as tiff:
            for offset, size in list(zip(tiff.pages[0].dataoffsets, tiff.pages[0].databytecounts, strict=True))[:5]:
                tiff.filehandle.seek(offset)
                tiff.filehandle.write(bytes(size))
        with open_slide(path) as slide:
            with pytest.raises(TileUnreadable):
                read_square(slide, 0, 0, 64, 1.0)
            assert np.abs(read_square(slide, 320, 192, 64, 1.0).astype(int) - image[192:, 320:]).mean() < 4


@pytest.mark.parametrize("kind", ["png", "jpg"])
@pytest.mark.parametrize("how", [cut, zeros_at_the_end, a_hole, noise], ids=lambda how: how.__name__)
def test_a_damaged_picture_is_refused(tmp_path: Path, image: NDArray[np.uint8], kind: str, how: Any) -> None:
    path = tmp_path / f"image.{kind}"
    Image.fromarray(image).save(path)
    with open_slide(path):
        pass
    path.write_bytes(how(path.read_bytes()))
    with pytest.raises(SlideUnreadable):
        open_slide(path)


@pytest.mark.parametrize("how", [zeros_at_the_end, a_hole, noise], ids=lambda how: how.__name__)
def test_of_several_jpegs_in_one_file_the_first_is_decoded_as_strictly(
    tmp_path: Path, image: NDArray[np.uint8], how: Any
) -> None:
    """As phones write them (MPO); Pillow decodes those laxly."""
    path, alone = tmp_path / "image.jpg", tmp_path / "alone.jpg"
    Image.fromarray(image).save(alone, quality=90)
    Image.fromarray(image).save(
        path, format="MPO", save_all=True, append_images=[Image.fromarray(255 - image)], quality=90
    )
    with open_slide(path) as slide, open_slide(alone) as other:
        assert slide.info.vendor == "JPEG"
        np.testing.assert_array_equal(read_square(slide, 64, 64, 64, 1.0), read_square(other, 64, 64, 64, 1.0))
    first = path.read_bytes().index(b"\xff\xd9\xff\xd8") if b"\xff\xd9\xff\xd8" in path.read_bytes() else 0
    data = path.read_bytes()
    path.write_bytes(how(data[:first]) + data[first:])
    with pytest.raises(SlideUnreadable):
        open_slide(path)


def write_png(path: Path, row: bytes, depth: int = 8, spoil: int | None = None) -> None:
    """Write 64 equal rows, stored without compression; one byte may be changed behind its checksums."""

    def chunk(name: bytes, content: bytes, changed: bytes | None = None) -> bytes:
        crc = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + (changed or content) + struct.pack(">I", crc)

    data = zlib.compress((b"\0" + row) * 64, level=0)
    changed = None if spoil is None else data[:spoil] + bytes([data[spoil] ^ 4]) + data[spoil + 1 :]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, depth, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data, changed) + chunk(b"IEND", b""))


def test_a_png_whose_checksum_is_wrong_is_refused(tmp_path: Path) -> None:
    """Every byte of it decodes: only the checksums can tell."""
    write_png(tmp_path / "a.png", bytes(range(192)))
    with open_slide(tmp_path / "a.png"):
        pass
    write_png(tmp_path / "b.png", bytes(range(192)), spoil=1000)
    with pytest.raises(SlideUnreadable):
        open_slide(tmp_path / "b.png")


def test_a_png_of_16_bits_is_refused_although_pillow_opens_it(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", bytes(64 * 6), depth=16)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "RGB"
    with pytest.raises(SlideUnreadable, match="RGB of 16 bits, not 8-bit RGB"):
        open_slide(tmp_path / "a.png")


def test_a_palette_and_a_colour_that_is_transparent(tmp_path: Path, image: NDArray[np.uint8]) -> None:
    few = Image.fromarray(image).quantize(64)
    few.save(tmp_path / "palette.png")
    with open_slide(tmp_path / "palette.png") as slide:
        np.testing.assert_array_equal(read_square(slide, 0, 0, 200, 1.0), np.asarray(few.convert("RGB"))[:200, :200])
    black = image.copy()
    black[:100] = 0
    Image.fromarray(black).save(tmp_path / "key.png", transparency=(0, 0, 0))
    with open_slide(tmp_path / "key.png") as slide:
        seen = read_square(slide, 0, 0, 200, 1.0)
    assert (seen[:100] == 255).all()
    np.testing.assert_array_equal(seen[100:], image[100:200, :200])


def test_a_picture_too_large_for_one_piece_is_said_to_be_so(
    tmp_path: Path, image: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(image).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(SlideUnreadable, match="too large a picture to be decoded in one piece"):
        open_slide(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_a_picture_is_known_by_its_content(tmp_path: Path, image: NDArray[np.uint8], kind: str) -> None:
    Image.fromarray(image).save(tmp_path / f"a.{kind}", quality=95)
    path = (tmp_path / f"a.{kind}").rename(tmp_path / "scan.svs")
    with open_slide(path) as slide:
        assert slide.info.vendor == {"jpg": "JPEG", "png": "PNG"}[kind]
        np.testing.assert_array_equal(read_square(slide, 0, 0, 200, 1.0), np.asarray(Image.open(path))[:200, :200])


def test_pictures_of_other_kinds_are_refused_as_what_they_are(tmp_path: Path, image: NDArray[np.uint8]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, picture, how, message in (
        ("turned.jpg", Image.fromarray(image), {"exif": exif}, r"turned or mirrored .*Orientation 6"),
        ("inks.jpg", Image.fromarray(image).convert("CMYK"), {}, "CMYK, not 8-bit RGB"),
        ("deep.png", Image.fromarray(image[..., 0].astype(np.uint16) * 257), {}, "I;16, not 8-bit RGB"),
        ("other.png", Image.fromarray(image), {"format": "BMP"}, "not a slide that OpenSlide can read"),
    ):
        picture.save(tmp_path / name, **how)
        with pytest.raises(SlideUnreadable, match=message):
            open_slide(tmp_path / name)


def test_a_place_that_no_file_has_is_refused(tmp_path: Path, image: NDArray[np.uint8]) -> None:
    """BigTIFF has 64 bits for an offset, and no system call has the last of them."""
    far = (1 << 63) + 5
    for suffix, compression, how in (
        (".tif", "jpeg", {"metadata": None, "photometric": "rgb"}),
        (".ome.tif", "zlib", OME),
        (".svs", "zlib", {"metadata": None, "photometric": "rgb"}),
    ):
        path = tmp_path / f"image{suffix}"
        tifffile.imwrite(path, image, compression=compression, bigtiff=True, tile=(128, 128), **how)
        whole = path.read_bytes()
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages[0]
            value, first = page.tags["TileOffsets"].valueoffset, page.offset
            entry, count = page.tags["TileOffsets"].offset, len(page.tags)
        for place, message in (
            (value + 8, "tile or strip 1 lies at byte 9223372036854775813, which no file has"),
            (entry + 12, "keeps the values of its tag 324 at a place which no file has"),
            (8, "directory 0 lies at byte 9223372036854775813"),
            (first + 8 + 20 * count, "directory 1 lies at byte 9223372036854775813"),
        ):
            path.write_bytes(whole[:place] + far.to_bytes(8, "little") + whole[place + 8 :])
            with pytest.raises(SlideUnreadable, match=message):
                open_slide(path)
