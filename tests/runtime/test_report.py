"""The report of a slide is made from its finished file and a thumbnail, in the run or at any time after it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from mtdp_runtime import extract, open_slide
from mtdp_runtime.errors import OutputUnwritable, StoreError
from mtdp_runtime.report.slide import Thumbnail, write_report
from mtdp_runtime.store.reader import open_features
from support import damage_tile, pyramid


def thumbnail_of(slide_path: Path, features: Path) -> Thumbnail:
    """Read the slide anew, at the scale of the mask that the file holds."""
    with open_features(features) as file, open_slide(slide_path) as slide:
        assert file.tissue is not None
        scale, (x0, y0, width, height) = file.tissue.scale, slide.info.bounds
        image = np.zeros((math.ceil(height / scale), math.ceil(width / scale), 3), np.uint8)
        slide.read_into(image, x0, y0, scale)
    return Thumbnail(image, scale, x0, y0)


def text_of(report: Path) -> str:
    """The words of a report, without tags and pictures."""
    return re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", report.read_text(), flags=re.DOTALL))


def run(slide: Path, out: Path, model: Path, **options: object) -> Path:
    (outcome,) = extract(slide, out, model=model, backend="onnxruntime", report=True, threads=2, **options)  # type: ignore[arg-type]
    assert outcome.status in ("done", "no-tissue"), outcome.message
    return out / f"{slide.stem}.h5"


def test_a_report_made_later_is_that_of_the_run(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slide = make_slide(levels=2)
    features = run(slide, tmp_path / "o", tiny_bundle)
    write_report(tmp_path / "later.html", features, thumbnail_of(slide, features))
    assert (tmp_path / "later.html").read_bytes() == (tmp_path / "o/report/slide.html").read_bytes()
    text = text_of(tmp_path / "later.html")
    with h5py.File(features) as file:
        assert f"{len(file['coords'])} tiles of 64 px at a scale of 1.0000 from level 0" in text
        assert f"{file.attrs['tiles_per_s']:.1f} tiles/s, bottleneck: {file.attrs['bottleneck']}." in text
    assert re.search(r"read\s+2\s+\d+\.\d\d", text), "the stage and its threads"


def test_a_file_of_an_earlier_version_does_not_say_how_many_threads_read(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slide = make_slide()
    features = run(slide, tmp_path / "o", tiny_bundle)
    with h5py.File(features, "r+") as file:
        timing = json.loads(file.attrs["timing"])
        del timing["read_threads"]
        file.attrs["timing"] = json.dumps(timing | {"readers": 7})
    write_report(tmp_path / "r.html", features, thumbnail_of(slide, features))
    assert re.search(r"read\s+7\s+\d+\.\d\d", text_of(tmp_path / "r.html"))


@pytest.mark.parametrize(
    ("on_bad_tile", "said"),
    [("nan", "Their features are NaN and their status is not 0."), ("drop", "They are left out of the file.")],
)
def test_it_says_what_became_of_tiles_that_could_not_be_read(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path, on_bad_tile: str, said: str
) -> None:
    slide = make_slide()
    damage_tile(slide, 20)
    features = run(slide, tmp_path / "o", tiny_bundle, on_bad_tile=on_bad_tile)
    with h5py.File(features) as file:
        bad = int(file.attrs["bad_tiles"])
    text = text_of(tmp_path / "o/report/slide.html")
    assert bad > 0
    assert f"{bad} tiles could not be read" in text
    assert said in text


def test_a_slide_of_glass_has_a_report_too(tiny_bundle: Path, tmp_path: Path) -> None:
    slide = pyramid(np.full((600, 800, 3), 243, np.uint8), tmp_path / "glass.tiff", 0.5)
    run(slide, tmp_path / "o", tiny_bundle)
    text = text_of(tmp_path / "o/report/glass.html")
    assert "0 tiles of 64 px" in text
    assert "No tile has enough tissue." in text


def test_what_cannot_be_read_or_written_is_said(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slide = make_slide()
    features = run(slide, tmp_path / "o", tiny_bundle)
    thumbnail = thumbnail_of(slide, features)
    with pytest.raises(OutputUnwritable, match=r"r\.html: cannot be written"):
        write_report(features / "r.html", features, thumbnail)
    features.write_bytes(b"no HDF5")
    with pytest.raises(StoreError, match="cannot be read as a feature file"):
        write_report(tmp_path / "r.html", features, thumbnail)
    assert not (tmp_path / "r.html").exists()
