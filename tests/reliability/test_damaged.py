"""A thousand damaged slides: none hangs the run, none ends it, none yields a row that is silently wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile

from mtdp_runtime.slide.tile_jpeg import decode_tile


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
    judged = [n for name, n in verdicts.items() if "of them" not in name]
    assert sum(judged) == 1000
    # The harness can fail: it does damage, and it meets slides that are still read.
    assert verdicts["refused"] > 100
    assert verdicts["flagged"] > 10
    assert verdicts["equal"] > 100
    assert verdicts["undetected"] > 10


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
