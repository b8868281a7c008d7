"""Segmentation tasks with masks: Janowczyk 1 and 2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from converter_support import counts, groups, loaded, plain, sizes
from mtdp.converters import convert
from mtdp.errors import ImageUnreadable, TaskError


def mask(path: Path, size: int, x: int, y: int, width: int, height: int) -> Path:
    """A rectangle on black."""
    pixels = np.zeros((size, size), np.uint8)
    pixels[y : y + height, x : x + width] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def nuclei(root: Path) -> Path:
    """Three patients, four images of 3 x 3 windows; an image without a mask."""
    for name in ("8863_500_f00001", "8863_500_f00002", "9023_500_f00001", "9254_500_f00001"):
        plain(root / f"{name}_original.tif", 500, 500)
        # 126 x 25 pixels at the left: more than 5% of 250 x 250 pixels where a window holds 125 columns of it,
        # 125 x 25 being 5% exactly, which is not more
        mask(root / f"{name}_mask.png", 500, 0, 0, 126, 25)
    plain(root / "9999_500_f00001_original.tif", 500, 500)
    return root


def test_janowczyk1_is_positive_above_five_percent(tmp_path: Path) -> None:
    convert("janowczyk1", nuclei(tmp_path / "in"), tmp_path / "out")
    task = loaded(tmp_path / "out")
    assert counts(task) == {"nuclei": 4, "background": 32}
    assert groups(task) == {"8863", "9023", "9254"}
    assert sizes(task) == {(250, 250)}
    positives = {sample.path.name for sample in task.of(["train", "val", "test"]) if sample.label == 1}
    assert all(name.endswith("-x0-y0.png") for name in positives)


def test_exactly_the_share_is_not_more_than_the_share(tmp_path: Path) -> None:
    root = nuclei(tmp_path / "in")
    for path in root.glob("*_mask.png"):
        mask(path, 500, 0, 0, 125, 25)
    with pytest.raises(TaskError, match="no image of class 'nuclei'"):
        convert("janowczyk1", root, tmp_path / "out")


def test_janowczyk2_finds_masks_in_a_folder_of_their_own(tmp_path: Path) -> None:
    for number in range(3):
        plain(tmp_path / "in" / f"{number}10_00000.tif", 400, 400)
        mask(tmp_path / "in" / "masks" / f"{number}10_00000_mask.png", 400, 0, 0, 200, 400)
    convert("janowczyk2", tmp_path / "in", tmp_path / "out")
    task = loaded(tmp_path / "out")
    assert counts(task) == {"epithelium": 3 * 6, "stroma": 3 * 3}
    assert sizes(task) == {(200, 200)}
    assert groups(task) == {"010", "110", "210"}


def test_a_mask_without_its_image_names_both(tmp_path: Path) -> None:
    root = nuclei(tmp_path / "in")
    (root / "9254_500_f00001_original.tif").unlink()
    with pytest.raises(TaskError) as caught:
        convert("janowczyk1", root, tmp_path / "out")
    names = (root / "9254_500_f00001_original.tif", root / "9254_500_f00001_mask.png")
    assert caught.value.message == f"{names[0]} is missing, which belongs to {names[1]}"


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    root = nuclei(tmp_path / "in")
    path = mask(root / "9254_500_f00001_mask.png", 400, 0, 0, 9, 9)
    with pytest.raises(TaskError, match="is 400 x 400, and its image") as caught:
        convert("janowczyk1", root, tmp_path / "out")
    assert str(path) in caught.value.message


def test_a_truncated_image_ends_the_conversion_and_leaves_no_task(tmp_path: Path) -> None:
    root = nuclei(tmp_path / "in")
    bad = root / "9023_500_f00001_original.tif"
    bad.write_bytes(bad.read_bytes()[:-2000])
    with pytest.raises(ImageUnreadable) as caught:
        convert("janowczyk1", root, tmp_path / "out")
    assert str(bad) in caught.value.message
    assert not (tmp_path / "out").exists()
