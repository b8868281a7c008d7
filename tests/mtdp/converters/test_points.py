"""Detection tasks: MITOS-ATYPIA 14, Janowczyk 5, TUPAC16, Warwick CRC, from miniatures of their downloads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from converter_support import BLUE, RED, counts, groups, has, loaded, plain, sizes, write
from mtdp.converters import convert
from mtdp.errors import TaskError

FRAME = (700, 650)  # three columns and three rows of windows of 323 pixels
MITOSES, OTHERS = [(350, 300)], [(40, 600)]


@pytest.fixture(scope="module")
def mitos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three slides, one of them from two scanners, and a test slide without annotations."""
    root = tmp_path_factory.mktemp("mitos")
    for slide in ("A03", "A04", "A05", "H03"):
        name = f"{slide}_00Aa"
        plain(root / "train" / slide / "frames" / "x40" / f"{name}.tiff", *FRAME, red=MITOSES, blue=OTHERS)
        folder = root / "train" / slide / "mitosis"
        write(folder / f"{name}_mitosis.csv", "".join(f"{x},{y},0.9\n" for x, y in MITOSES))
        write(folder / f"{name}_not_mitosis.csv", "".join(f"{x},{y},0.3\n" for x, y in OTHERS))
    plain(root / "test" / "A06" / "frames" / "x40" / "A06_00Aa.tiff", *FRAME)
    return root


def test_mitos2014(mitos: Path, tmp_path: Path) -> None:
    summary = convert("mitos2014", mitos, tmp_path / "out")
    task = loaded(tmp_path / "out")
    assert task.classes == ("mitosis", "non_mitosis", "none")
    assert groups(task) == {"03", "04", "05"}  # both scanners of a slide are one group
    assert counts(task) == {"mitosis": 40, "non_mitosis": 40, "none": 4 * (9 - 2 - 1)}
    assert sizes(task) == {(323, 323)}
    for sample in task.of(["train", "val", "test"]):
        label = task.classes[sample.label]
        assert has(sample.path, RED) == (label == "mitosis")  # a window with a mitosis is of no other class
        assert has(sample.path, BLUE) or label != "non_mitosis"
        assert not has(sample.path, BLUE) or label != "none"
    assert "frames of slides without annotations, left out: 1" in summary.notes


def test_mitos2014_wants_both_lists_of_a_frame(mitos: Path, tmp_path: Path) -> None:
    root = tmp_path / "in"
    frame = plain(root / "A03" / "frames" / "x40" / "A03_00Aa.tiff", *FRAME)
    missing = write(root / "A03" / "mitosis" / "A03_00Aa_mitosis.csv", "1,1,1\n").with_name("A03_00Aa_not_mitosis.csv")
    with pytest.raises(TaskError) as caught:
        convert("mitos2014", root, tmp_path / "out")
    assert caught.value.message == f"{missing} is missing, which belongs to {frame}"


@pytest.mark.parametrize(
    ("text", "words"),
    [("10,abc,1\n", "line 1: two numbers were expected, got '10,abc,1'"), ("900,10,1\n", "x 900, y 10 lies outside")],
)
def test_a_faulty_list_of_points_is_named(tmp_path: Path, text: str, words: str) -> None:
    root = tmp_path / "in"
    plain(root / "A03" / "frames" / "x40" / "A03_00Aa.tiff", *FRAME)
    path = write(root / "A03" / "mitosis" / "A03_00Aa_mitosis.csv", text)
    with pytest.raises(TaskError) as caught:
        convert("mitos2014", root, tmp_path / "out")
    assert str(path) in caught.value.message
    assert words in caught.value.message


def janowczyk5(root: Path) -> Path:
    """Three patients, the mitosis in a mask for two of them and in a list for the third, and an image without any."""
    for patient in ("01", "02", "03"):
        image = plain(root / f"{patient}_01.tif", 600, 600, red=[(300, 200)])
        if patient == "03":
            write(image.with_suffix(".csv"), "200,300\n")  # row, column
        else:
            mask = np.zeros((600, 600), np.uint8)
            mask[195:206, 295:306] = 255
            Image.fromarray(mask).save(image.with_name(f"{patient}_01_pc.png"))
    plain(root / "03_02.tif", 600, 600)
    return root


def test_janowczyk5(tmp_path: Path) -> None:
    summary = convert("janowczyk5", janowczyk5(tmp_path / "in"), tmp_path / "out")
    task = loaded(tmp_path / "out")
    assert counts(task)["mitosis"] == 30
    assert groups(task) == {"01", "02", "03"}
    assert sizes(task) == {(250, 250)}
    for sample in task.of(["train", "val", "test"]):
        assert has(sample.path, RED) == (task.classes[sample.label] == "mitosis")
    assert summary.notes == [
        "images without a ground truth file, taken to be without mitoses: 1, the first is 03_02.tif"
    ]


def tupac(root: Path) -> Path:
    for patient in ("01", "02", "03", "04"):
        plain(root / f"mitoses_image_data_part_{1 + int(patient) % 2}" / patient / "01.tif", 600, 600, red=[(20, 580)])
        write(root / "mitoses_ground_truth" / patient / "01.csv", "580,20\n")  # row, column
    plain(root / "mitoses-test-image-data" / "01" / "01.tif", 600, 600)
    return root


def test_tupac_mitosis(tmp_path: Path) -> None:
    convert("tupac_mitosis", tupac(tmp_path / "in"), tmp_path / "out")
    task = loaded(tmp_path / "out")
    assert counts(task) == {"mitosis": 4 * 10, "none": 4 * 8}  # ten, although the object is near a corner
    assert groups(task) == {"01", "02", "03", "04"}
    for sample in task.of(["train", "val", "test"]):
        assert has(sample.path, RED) == (task.classes[sample.label] == "mitosis")


def test_tupac_with_a_part_missing_is_refused(tmp_path: Path) -> None:
    root = tupac(tmp_path / "in")
    (root / "mitoses_image_data_part_1" / "02" / "01.tif").unlink()
    with pytest.raises(TaskError, match=r"02/01\.csv has no image 02/01\.tif"):
        convert("tupac_mitosis", root, tmp_path / "out")


def test_tupac_without_ground_truth_is_refused(tmp_path: Path) -> None:
    plain(tmp_path / "in" / "mitoses_image_data" / "01" / "01.tif", 300, 300)
    with pytest.raises(TaskError, match=r"in has no folder `mitoses_ground_truth`"):
        convert("tupac_mitosis", tmp_path / "in", tmp_path / "out")


def warwick(root: Path) -> Path:
    """Three images; nuclei on a border between tiles, at the far corner, and one of another class."""
    for number in (1, 2, 3):
        folder = root / "CRCHistoPhenotypes_2016_04_28" / "Classification" / f"img{number}"
        plain(folder / f"img{number}.bmp", 500, 500, red=[(100, 99), (499, 499)], blue=[(250, 250)])
        savemat(folder / f"img{number}_inflammatory.mat", {"detection": np.array([[100.0, 99.5], [500.0, 500.0]])})
        savemat(folder / f"img{number}_others.mat", {"detection": np.array([[250.0, 250.0]])})
        plain(root / "CRCHistoPhenotypes_2016_04_28" / "Detection" / f"img{number}" / f"img{number}.bmp", 500, 500)
    return root


def test_warwick_crc(tmp_path: Path) -> None:
    convert("warwick_crc", warwick(tmp_path / "in"), tmp_path / "out")
    task = loaded(tmp_path / "out")
    assert counts(task) == {"inflammatory": 6, "other": 69}
    assert groups(task) == {"img1", "img2", "img3"}
    assert sizes(task) == {(100, 100)}
    for sample in task.of(["train", "val", "test"]):
        assert has(sample.path, RED) == (task.classes[sample.label] == "inflammatory")


def test_warwick_names_the_missing_and_the_broken_file(tmp_path: Path) -> None:
    root = warwick(tmp_path / "in")
    path = next(root.rglob("img2_inflammatory.mat"))
    path.write_bytes(b"no MATLAB file, though long enough to have a header" * 9)
    with pytest.raises(TaskError) as caught:
        convert("warwick_crc", root, tmp_path / "out")
    assert caught.value.message.startswith(f"{path} is not a MATLAB file")
    path.unlink()
    with pytest.raises(TaskError) as caught:
        convert("warwick_crc", root, tmp_path / "out")
    assert caught.value.message.startswith(f"{path} is missing")
