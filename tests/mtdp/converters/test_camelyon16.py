"""Camelyon16 from small pyramidal slides with tissue, glass and an outlined tumour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mtdp.converters.camelyon16 as module
from converter_support import RED, content, counts, groups, loaded, sizes, write
from mtdp.converters import convert
from mtdp.errors import ImageUnreadable, TaskError
from support import pyramid

# Four columns and two rows of windows; the last column is glass. Tumour: 0.25 of window (0, 0), without its hole 0.21;
# of window (768, 0) a strip of 0.06, which is not more than a tenth.
SIZE = (3072, 1536)
TUMOUR = [(0, 0), (384, 0), (384, 384), (0, 384)]
STRIP = [(768, 0), (800, 0), (800, 768), (768, 768)]
HOLE = [(0, 0), (160, 0), (160, 160), (0, 160)]


def polygon(group: str, points: list[tuple[int, int]]) -> str:
    corners = "".join(f'<Coordinate Order="{order}" X="{x}" Y="{y}" />' for order, (x, y) in enumerate(points))
    return (
        f'<Annotation Name="a" Type="Polygon" PartOfGroup="{group}"><Coordinates>{corners}</Coordinates></Annotation>'
    )


def asap(*polygons: str) -> str:
    return f'<?xml version="1.0"?><ASAP_Annotations><Annotations>{"".join(polygons)}</Annotations></ASAP_Annotations>'


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three slides with a tumour and one without; in each window's centre, a red square of 4 x 4 pixels."""
    root = tmp_path_factory.mktemp("camelyon")
    image = np.full((SIZE[1], SIZE[0], 3), (200, 120, 170), np.uint8)
    image[:, 2304:] = 243
    for y in range(384, SIZE[1], 768):
        for x in range(384, SIZE[0], 768):
            image[y - 2 : y + 2, x - 2 : x + 2] = RED
    (root / "training" / "tumor").mkdir(parents=True)
    (root / "training" / "normal").mkdir()
    slide = pyramid(image, root / "training" / "normal" / "normal_001.tif", 0.25, levels=3)
    for number in (1, 2, 3):
        (root / "training" / "tumor" / f"tumor_00{number}.tif").hardlink_to(slide)
    for number in (1, 2, 3):
        text = asap(polygon("_0", TUMOUR), polygon("Tumor", STRIP), polygon("_2", HOLE))
        write(root / "training" / "lesion_annotations" / f"tumor_00{number}.xml", text)
    return root


def test_camelyon16(slides: Path, tmp_path: Path) -> None:
    summary = convert("camelyon16", slides, tmp_path / "out")
    task = loaded(tmp_path / "out")
    assert counts(task) == {"tumor": 3, "normal": 3 * 5 + 6}  # the two windows of glass are left out
    assert groups(task) == {"normal-001", "tumor-001", "tumor-002", "tumor-003"}
    assert sizes(task) == {(384, 384)}
    tumours = [sample.path for sample in task.of(["train", "val", "test"]) if task.classes[sample.label] == "tumor"]
    assert all(path.name.endswith("-x0-y0.png") for path in tumours)
    assert summary.notes == ["the official test slides are not used"]
    with Image.open(tumours[0]) as image:  # halved by area: the square of 4 pixels is one of 2, unmixed
        pixels = np.asarray(image)
    assert np.argwhere((pixels == RED).all(axis=2)).tolist() == [[191, 191], [191, 192], [192, 191], [192, 192]]


def test_no_more_than_the_limit_of_a_class_and_slide(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_A_CLASS", 2)
    convert("camelyon16", slides, tmp_path / "a", seed=1)
    convert("camelyon16", slides, tmp_path / "b", seed=2)
    assert counts(loaded(tmp_path / "a")) == counts(loaded(tmp_path / "b")) == {"tumor": 3, "normal": 8}
    assert set(content(tmp_path / "a")) != set(content(tmp_path / "b"))  # drawn at random


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "is missing, which belongs to"),
        ("<ASAP", "is not an ASAP annotation"),
        (asap(polygon("Lymph", TUMOUR)), "has a polygon of group 'Lymph'"),
        (asap(), "outlines nothing"),
        (asap('<Annotation PartOfGroup="_0"><Coordinate X="1" Y="2"/></Annotation>'), "is not an ASAP annotation"),
    ],
)
def test_a_tumour_slide_without_sound_outlines_is_refused(
    slides: Path, tmp_path: Path, text: str | None, words: str
) -> None:
    root = tmp_path / "in"
    folder = root / "training" / "tumor"
    folder.mkdir(parents=True)
    (folder / "tumor_001.tif").hardlink_to(slides / "training" / "tumor" / "tumor_001.tif")
    path = root / "training" / "lesion_annotations" / "tumor_001.xml"
    if text is not None:
        write(path, text)
    with pytest.raises(TaskError) as caught:
        convert("camelyon16", root, tmp_path / "out")
    assert caught.value.message.startswith(f"{path} {words}")


def test_a_slide_that_is_none_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "in" / "training" / "normal" / "normal_001.tif", "no slide")
    with pytest.raises(ImageUnreadable) as caught:
        convert("camelyon16", tmp_path / "in", tmp_path / "out")
    assert caught.value.message.startswith(f"{path} cannot be opened as a slide")


def test_a_slide_that_opens_but_cannot_be_decoded_is_named(slides_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "in" / "training" / "normal" / "normal_001.tif"
    path.parent.mkdir(parents=True)
    path.symlink_to(slides_dir / "odd" / "unreadable.svs")
    with pytest.raises(ImageUnreadable) as caught:
        convert("camelyon16", tmp_path / "in", tmp_path / "out")
    assert caught.value.message.startswith(f"{path} cannot be decoded")
