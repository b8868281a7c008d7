"""A thousand damaged slides: none hangs the run, none ends it, none yields a row that is silently wrong."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile

from mtdp_runtime.errors import SlideUnreadable, TileUnreadable
from mtdp_runtime.settings import TissueSettings
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.slide.openslide import OpenSlideReader
from mtdp_runtime.slide.tiff_check import check_tiff
from mtdp_runtime.slide.tile_jpeg import decode_tile
from mtdp_runtime.slide.tiled_tiff import TiledTiffReader
from mtdp_runtime.tiling.tissue import find_tissue
from support import stained


def test_a_thousand_damaged_slides(slides_dir: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("damage.py"), "--count", "1000", "--out", tmp_path / "out.json"],
        env={**os.environ, "MTDP_DATA": str(slides_dir.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    facts = json.loads((tmp_path / "out.json").read_text())
    verdicts = facts["verdicts"]
    assert "WRONG" not in verdicts, facts["notable"]
    assert "hung" not in verdicts, facts["notable"]
    judged = [n for name, n in verdicts.items() if "of them" not in name]
    assert sum(judged) == 1000
    # The harness can fail: it does damage, and it meets slides that are still read.
    assert verdicts["refused"] > 100
    assert verdicts["flagged"] > 10
    assert verdicts["equal"] > 100
    assert verdicts["undetected"] > 10


def field(path: Path, page: int, name: str) -> int:
    """Return where a tag's entry begins in the file."""
    with tifffile.TiffFile(path) as tiff:
        return int(tiff.pages[page].aspage().tags[name].offset)


def put(path: Path, at: int, form: str, *values: int) -> None:
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, at, *values)
    path.write_bytes(content)


@pytest.mark.parametrize("big", [False, True], ids=["TIFF", "BigTIFF"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ImageWidth", 2**32 - 1, "which takes 100663296 tiles, and lists 12"),
        ("ImageLength", 385, "says 512 x 385 px, which takes 16 tiles, and lists 12"),
        ("TileWidth", 2**31, "directory 0 says that a tile has 2147483648 x 128 px"),
        ("TileWidth", 34464, "a tile has 34464 x 128 px, in an image of 512 x 384 px"),
        ("TileLength", 0, "directory 0 says that a tile has 128 x 0 px"),
    ],
)
def test_sizes_beyond_what_the_file_holds_are_refused_before_anything_is_allocated(
    tmp_path: Path, name: str, value: int, message: str, big: bool
) -> None:
    path = tmp_path / "a.tiff"
    tile = {"tile": (128, 128), "photometric": "rgb", "compression": "zlib", "metadata": None}
    tifffile.imwrite(path, stained(384, 512), bigtiff=big, **tile)
    check_tiff(path)
    put(path, field(path, 0, name) + 2, "<HQI" if big else "<HII", 4, 1, value)
    with pytest.raises(SlideUnreadable, match=message):
        open_slide(path)


def test_a_scanners_slide_that_says_it_is_wider_than_its_tiles_is_refused(slides_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    path.write_bytes((slides_dir / "CMU-1-Small-Region.svs").read_bytes())
    put(path, field(path, 0, "ImageWidth") + 8, "<H", 34464)
    with pytest.raises(SlideUnreadable, match="says 34464 x 2967 px, which takes 1872 tiles, and lists 130"):
        open_slide(path)


def test_a_list_of_tiles_that_ends_beyond_the_file_is_refused(make_slide: Callable[..., Path]) -> None:
    path = make_slide()
    put(path, field(path, 0, "TileOffsets") + 4, "<I", 2**30)
    with pytest.raises(SlideUnreadable, match="lists 1073741824 tiles, and the list ends beyond the end of the file"):
        open_slide(path)


def test_directories_without_end_are_refused(make_slide: Callable[..., Path]) -> None:
    path = make_slide()
    with tifffile.TiffFile(path) as tiff:
        first, second = (page.aspage() for page in tiff.pages)
        link = second.offset + 2 + 12 * len(second.tags)
    put(path, link, "<I", first.offset)
    with pytest.raises(SlideUnreadable, match="directory 2 is followed by an earlier one"):
        open_slide(path)


def test_what_is_no_damage_passes(slides_dir: Path, tmp_path: Path) -> None:
    """All whole slides at hand; planes that lie apart; a list longer than needed; and what only looks like a TIFF."""
    whole = [*slides_dir.glob("*.svs"), *slides_dir.glob("odd/*.tif*"), *slides_dir.glob("odd/*.svs")]
    assert len(whole) > 7
    for path in whole:
        check_tiff(path)
    planes = tmp_path / "planes.tiff"
    tifffile.imwrite(
        planes, np.zeros((3, 256, 256), np.uint8), tile=(128, 128), photometric="rgb", planarconfig="separate"
    )
    check_tiff(planes)
    put(planes, field(planes, 0, "ImageWidth") + 8, "<H", 100)
    check_tiff(planes)
    for content in (b"", b"II", b"II*\0", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff", b"MM\0*" + bytes(40)):
        (tmp_path / "odd").write_bytes(content)
        check_tiff(tmp_path / "odd")


def test_a_slide_that_is_damaged_all_over_is_not_searched_for_ever(
    make_slide: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a large slide each block costs two attempts to open it."""
    path = make_slide(height=2048, width=2048)
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        for page in tiff.pages:
            one = page.aspage()
            for offset, size in zip(one.dataoffsets, one.databytecounts, strict=True):
                content[offset : offset + size] = bytes(size)
    path.write_bytes(content)
    reads: list[object] = []
    read_into = TiledTiffReader.read_into

    def counted(self: TiledTiffReader, *arguments: Any) -> None:
        reads.append(arguments)
        read_into(self, *arguments)

    monkeypatch.setattr(TiledTiffReader, "read_into", counted)
    with open_slide(path) as slide, pytest.raises(TileUnreadable):
        find_tissue(slide, TissueSettings(mpp=0.5))
    assert 16 < len(reads) <= 16 + 4 * 128


def test_an_output_pixel_of_gigabytes_is_refused(make_slide: Callable[..., Path]) -> None:
    """Windows are read in pieces, however large; a single pixel is the smallest piece."""
    with OpenSlideReader(make_slide(), None, "") as slide, pytest.raises(TileUnreadable, match="at once: too many"):
        slide.read_into(np.zeros((1, 1, 3), np.uint8), 0, 0, 20_000.0)


def test_damage_that_libjpeg_only_warns_of_is_an_error(slides_dir: Path) -> None:
    """A lenient decoder gives a picture for nearly every flipped bit; OpenSlide, and this one, refuse most."""
    source = slides_dir / "CMU-1-Small-Region.svs"
    with tifffile.TiffFile(source) as tiff:
        page = tiff.pages[0].aspage()
        tables, start, size = page.jpegtables, page.dataoffsets[20], page.databytecounts[20]
    data = source.read_bytes()[start : start + size]
    lenient = imagecodecs.jpeg8_decode(data, tables=tables, colorspace="RGB", outcolorspace="RGB")
    out = np.empty_like(lenient)
    decode_tile(data, tables, "RGB", 1, out)
    np.testing.assert_array_equal(out, lenient)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(50):
        damaged = bytearray(data)
        damaged[int(rng.integers(size // 4, size - 2))] ^= 1 << int(rng.integers(8))
        try:
            decode_tile(bytes(damaged), tables, "RGB", 1, out)
        except ValueError:
            refused += 1
    assert refused > 40


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\xff\xd8\xff\xe0\x00\x04JF\xff\xda", b"\xff\xd8\xff\xfe\xff\xff", b"noise"]
)
def test_what_is_no_jpeg_is_an_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        decode_tile(data, None, "RGB", 1, np.empty((8, 8, 3), np.uint8))
