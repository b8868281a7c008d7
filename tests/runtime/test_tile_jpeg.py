"""A JPEG tile has its place's size and components and the colours that it names itself; a damaged one is an error."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import simplejpeg
import tifffile
from numpy.typing import NDArray
from PIL import Image

from mtdp_runtime.errors import TileUnreadable
from mtdp_runtime.slide.image import ImageReader
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.slide.tile_jpeg import UnknownKind, decode_tile, read_head
from mtdp_runtime.slide.tiled_tiff import TiledTiffReader
from support import read_square, stained

JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
SIDE = 64


def adobe(transform: int) -> bytes:
    return b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform])


def picture() -> NDArray[np.uint8]:
    """Patches of strong colours, 16 px wide, which a JPEG keeps well."""
    return np.random.default_rng(5).integers(20, 236, (4, 4, 3)).astype(np.uint8).repeat(16, 0).repeat(16, 1)


def coded(colours: str, markers: bytes = b"", names: bytes = b"\1\2\3", sampling: str = "444") -> bytes:
    """A JPEG that holds the picture as "RGB" or "YCBCR", with just these markers and names of components."""
    if colours == "RGB":
        code = imagecodecs.jpeg8_encode(picture(), level=98, colorspace="RGB", outcolorspace="RGB")
    else:
        code = simplejpeg.encode_jpeg(picture(), 98, "RGB", sampling)
    stream = bytearray(b"\xff\xd8" + markers + read_head(code).segments)
    for start in (stream.index(b"\xff\xc0") + 10, stream.index(b"\xff\xda") + 5):
        step = 3 if stream[start - 10 : start - 8] == b"\xff\xc0" else 2
        for i, name in enumerate(names):
            stream[start + i * step] = name
    return bytes(stream)


def written(path: Path, tiles: list[bytes], across: int, photometric: str, tile: int = SIDE, **how: Any) -> Path:
    down = -(-len(tiles) // across)
    tifffile.imwrite(
        path, iter(tiles), shape=(down * tile, across * tile, 3), dtype=np.uint8, tile=(tile, tile),
        metadata={"axes": "YXS"} if how else None,
        photometric="ycbcr", subsampling=(1, 1), compression="jpeg", **how,
    )  # fmt: skip
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["PhotometricInterpretation"].overwrite({"rgb": 2, "ycbcr": 6}[photometric])
    return path


# What the JPEG holds, what it says (markers, names of components), and what the TIFF says of it.
TRUE_COLOURS = [
    ("RGB", b"", b"\0\1\2", "rgb"),  # as Aperio writes it
    ("RGB", b"", b"\1\2\3", "rgb"),
    ("RGB", adobe(0), b"\1\2\3", "rgb"),
    ("RGB", adobe(0), b"\1\2\3", "ycbcr"),
    ("RGB", b"", b"RGB", "ycbcr"),
    ("RGB", JFIF, b"RGB", "rgb"),
    ("RGB", JFIF + adobe(0), b"\1\2\3", "rgb"),
    ("YCBCR", b"", b"\1\2\3", "ycbcr"),
    ("YCBCR", JFIF, b"\1\2\3", "ycbcr"),
    ("YCBCR", JFIF, b"\1\2\3", "rgb"),
    ("YCBCR", adobe(1), b"\1\2\3", "rgb"),
    ("YCBCR", JFIF + adobe(1), b"\1\2\3", "rgb"),
]


@pytest.mark.parametrize(("holds", "markers", "names", "said"), TRUE_COLOURS)
@pytest.mark.parametrize("ome", [False, True], ids=["plain", "ome"])
def test_the_colours_are_right_whoever_names_them(
    tmp_path: Path, holds: str, markers: bytes, names: bytes, said: str, ome: bool
) -> None:
    """The JPEG's own word stands above the TIFF's; where they differ, the reader says so."""
    tile = coded(holds, markers, names)
    how = {"ome": True} if ome else {}
    path = written(tmp_path / "a.tif", [tile] * 4, 2, said, **how)
    with open_slide(path) as slide:
        assert isinstance(slide, ImageReader if ome else TiledTiffReader)
        ours = read_square(slide, 0, 0, SIDE, 1.0)
        assert np.abs(ours.astype(int) - picture()).mean() < 2
        if not ome:
            differs = holds.lower() != said
            assert ("OpenSlide errs" in slide.info.reader_reason) == differs
            half = read_square(slide, 0, 0, SIDE // 2, 2.0).astype(int)
            assert np.abs(half - picture()[::2, ::2]).mean() < 3


def test_colour_differences_of_half_the_size_are_no_red_green_and_blue(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tif", [coded("YCBCR", sampling="420")] * 4, 2, "rgb")
    with open_slide(path) as slide:
        assert np.abs(read_square(slide, 0, 0, SIDE, 1.0).astype(int) - picture()).mean() < 5


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("side", [8, 16, 32, 128, 256])
def test_a_jpeg_of_another_size_than_the_tiles_is_an_error_at_every_reduction(side: int, reduction: int) -> None:
    code = simplejpeg.encode_jpeg(np.full((side, side, 3), 99, np.uint8), 90)
    out = np.zeros((SIDE // reduction, SIDE // reduction, 3), np.uint8)
    with pytest.raises(ValueError, match=f"a JPEG of {side} x {side} px, 64 x 64 px were expected"):
        decode_tile(code, None, "YCBCR", reduction, out)


@pytest.mark.parametrize("scale", [1.0, 2.0, 4.0, 2.5])
@pytest.mark.parametrize("ome", [False, True], ids=["plain", "ome"])
def test_one_tile_of_another_size_or_of_grey_is_told_and_harms_no_other(
    tmp_path: Path, scale: float, ome: bool
) -> None:
    whole = coded("YCBCR")
    for number, odd in enumerate((
        simplejpeg.encode_jpeg(picture()[:32, :32].copy(), 90),
        simplejpeg.encode_jpeg(picture().repeat(2, 0).repeat(2, 1), 90),
        simplejpeg.encode_jpeg(picture()[..., :1].copy(), 90, "GRAY"),
    )):  # fmt: skip
        tiles = [whole] * 16
        tiles[10] = odd
        path = written(tmp_path / f"{number}.tif", tiles, 4, "ycbcr", **({"ome": True} if ome else {}))
        with open_slide(path) as slide:
            side = int(SIDE / scale)
            read_square(slide, 0, 0, side, scale)
            with pytest.raises(TileUnreadable, match="expected"):
                read_square(slide, 2 * SIDE, 2 * SIDE, side, scale)


def test_kinds_that_are_no_damage_are_named() -> None:
    out = np.zeros((SIDE, SIDE, 3), np.uint8)
    grey = simplejpeg.encode_jpeg(np.zeros((SIDE, SIDE, 1), np.uint8), 90, "GRAY")
    deep = imagecodecs.jpeg8_encode(np.zeros((SIDE, SIDE, 3), np.uint16), level=90, bitspersample=12)
    lossless = imagecodecs.ljpeg_encode(np.zeros((SIDE, SIDE), np.uint8))
    odd = bytearray(simplejpeg.encode_jpeg(np.zeros((SIDE, SIDE, 3), np.uint8), 90, "RGB", "420"))
    odd[odd.index(b"\xff\xc0") + 11] = 0x42  # luminance has 4 x 2 samples for each of a colour difference
    many = ((grey, "1 components where 3"), (deep, "12 bits per sample"), (bytes(odd), "factors 4 x 2, 1 x 1, 1 x 1"))
    for code, kind in many:
        with pytest.raises(UnknownKind, match=kind):
            decode_tile(code, None, "YCBCR", 1, out)
    with pytest.raises(UnknownKind, match=r"lossless JPEG \(SOF3\)"):
        decode_tile(lossless, None, "GRAY", 1, out[..., :1].copy())


@pytest.mark.parametrize("how", [{"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 4}], ids=str)
def test_every_huffman_coded_kind_is_read(how: dict[str, Any]) -> None:
    stream = io.BytesIO()
    Image.fromarray(picture()).save(stream, "JPEG", quality=95, subsampling=0, **how)
    out = np.zeros((SIDE, SIDE, 3), np.uint8)
    decode_tile(stream.getvalue(), None, "YCBCR", 1, out)
    assert np.abs(out.astype(int) - picture()).mean() < 2


def mutants(code: bytes, seed: int) -> bytes:
    """A tile with one fault behind its header, of the kinds that disks and copies make."""
    rng = np.random.default_rng(seed)
    data, start = bytearray(code), code.index(b"\xff\xda") + 14
    at = int(rng.integers(start, len(data) - 2))
    match seed % 5:
        case 0:
            data[at] ^= 1 << int(rng.integers(8))
        case 1:
            data[at : at + 512] = bytes(len(data[at : at + 512]))
        case 2:
            data[at:] = bytes(len(data) - at)
        case 3:
            data[at : at + 16] = rng.bytes(len(data[at : at + 16]))
        case _:
            del data[at : at + int(rng.integers(1, 31))]
            data += bytes(len(code) - len(data))
    return bytes(data)


@pytest.mark.parametrize("ome", [False, True], ids=["fast reader", "ome"])
def test_no_tile_is_good_where_the_strict_decoder_warned(tmp_path: Path, ome: bool) -> None:
    """However a slide is read: 150 mutants of a tile, whole and reduced. OpenSlide, laxer, is not asked."""
    image = stained(128, 128)[:, ::-1].copy()
    code = simplejpeg.encode_jpeg(image, 85, "RGB", "420")
    path = written(tmp_path / "a.tif", [code] * 4, 2, "ycbcr", tile=128, **({"ome": True} if ome else {}))
    with tifffile.TiffFile(path) as tiff:
        offset, content = tiff.pages[0].dataoffsets[3], path.read_bytes()
    warned, verdicts = 0, []
    for seed, scale in itertools.product(range(150), (1.0,) if ome else (1.0, 2.0)):
        bad = mutants(code, seed)
        try:
            simplejpeg.decode_jpeg(bad, "RGB", strict=True)
        except ValueError:
            warned += 1
        else:
            continue
        path.write_bytes(content[:offset] + bad + content[offset + len(code) :])
        with open_slide(path) as slide:
            try:
                read_square(slide, 128, 128, int(128 / scale), scale)
            except TileUnreadable:
                verdicts.append("told")
            else:
                verdicts.append("GOOD")
    assert warned > 75
    assert set(verdicts) == {"told"}
