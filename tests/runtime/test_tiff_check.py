"""A TIFF whose directories lead in a circle is refused before a library follows them; a whole one passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

from mtdp_runtime.errors import SlideUnreadable
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.slide.tiff_check import check_tiff


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_loop_is_found_and_a_chain_is_not(tmp_path: Path, big: bool, order: str) -> None:
    path = tmp_path / "pages.tif"
    with tifffile.TiffWriter(path, bigtiff=big, byteorder=order) as tiff:
        for _ in range(3):
            tiff.write(np.zeros((16, 16, 3), np.uint8), photometric="rgb", metadata=None)
    check_tiff(path)
    with tifffile.TiffFile(path) as tiff:
        offsets = [page.offset for page in tiff.pages]
        entries = len(tiff.pages[2].tags)
    width, entry = (8, 20) if big else (4, 12)
    link = offsets[2] + (8 if big else 2) + entries * entry
    content = bytearray(path.read_bytes())
    content[link : link + width] = offsets[1].to_bytes(width, "little" if order == "<" else "big")
    path.write_bytes(content)
    with pytest.raises(SlideUnreadable, match="followed by an earlier one, without end"):
        open_slide(path)


def test_real_slides_and_other_files_pass(slides_dir: Path, make_slide: Callable[..., Path]) -> None:
    files = [file for file in slides_dir.rglob("*") if file.is_file()]
    assert len(files) > 10
    for file in (*files, make_slide(levels=3)):
        check_tiff(file)


@pytest.mark.parametrize(
    "content", [b"", b"II*\0", b"II*\0\x08\0\0\0\xff\xff" + bytes(8), bytes(40), b"MM\0+" + bytes(12)]
)
def test_what_is_no_whole_tiff_is_left_to_the_readers(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.tif"
    path.write_bytes(content)
    check_tiff(path)
