"""Classification tasks: whole images and plain tiles in a folder a class."""

from __future__ import annotations

from pathlib import Path

import pytest

from converter_support import counts, groups, loaded, plain, sizes, write
from mtdp.converters import convert
from mtdp.errors import MtdpError, TaskError, UsageError

KATHER = ("TUMOR", "STROMA", "COMPLEX", "LYMPHO", "DEBRIS", "MUCOSA", "ADIPOSE", "EMPTY")


def idc(root: Path) -> Path:
    for patient in ("10253", "8863", "9001", "12345"):
        for label in (0, 1):
            for x in (51, 101):
                plain(root / patient / str(label) / f"{patient}_idx5_x{x}_y1251_class{label}.png", 50, 50)
    return root


def test_janowczyk6(tmp_path: Path) -> None:
    convert("janowczyk6", idc(tmp_path / "in"), tmp_path / "out")
    task = loaded(tmp_path / "out")
    assert counts(task) == {"idc": 8, "non_idc": 8}
    assert groups(task) == {"10253", "8863", "9001", "12345"}
    assert sizes(task) == {(50, 50)}


def test_janowczyk6_of_the_copy_that_holds_the_data_twice(tmp_path: Path) -> None:
    root = idc(tmp_path / "in")
    idc(root / "IDC_regular_ps50_idx5")
    convert("janowczyk6", root, tmp_path / "out")
    assert counts(loaded(tmp_path / "out")) == {"idc": 8, "non_idc": 8}


def test_an_image_in_the_folder_of_another_class_is_refused(tmp_path: Path) -> None:
    root = idc(tmp_path / "in")
    bad = plain(root / "8863" / "0" / "8863_idx5_x151_y1_class1.png", 50, 50)
    with pytest.raises(TaskError) as caught:
        convert("janowczyk6", root, tmp_path / "out")
    assert caught.value.message == f"{bad} is named class 1 and lies in folder 0"


def test_janowczyk7_is_grouped_by_case(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for number, label in enumerate(("CLL", "FL", "MCL")):
        for case in range(3):
            for image in ("_001", "-R2_001"):
                plain(root / label / f"sj-0{number}-{100 + case}{image}.tif", 800, 400)
    convert("janowczyk7", root, tmp_path / "out")
    task = loaded(tmp_path / "out")
    assert counts(task) == {"CLL": 12, "FL": 12, "MCL": 12}
    assert groups(task) == {f"sj-0{number}-{case}" for number in range(3) for case in (100, 101, 102)}
    assert sizes(task) == {(384, 384)}


def test_janowczyk7_reads_the_class_in_the_name(tmp_path: Path) -> None:
    for label in ("CLL", "FL", "MCL"):
        for case in range(3):
            plain(tmp_path / "in" / f"{label}-sj-01-{label.index('L')}{case}_001.tif", 384, 384)
    convert("janowczyk7", tmp_path / "in", tmp_path / "out")
    assert counts(loaded(tmp_path / "out")) == {"CLL": 3, "FL": 3, "MCL": 3}


@pytest.mark.parametrize("flat", [False, True])
def test_lbpstroma(tmp_path: Path, flat: bool) -> None:
    for number in range(4):
        for digit, folder in (("0", "Epithelium"), ("1", "stroma_images")):
            name = f"{digit}_{number}.tif" if flat else f"train/{folder}/im_{number}.tif"
            plain(tmp_path / "in" / name, 60 + number, 60)
    convert("lbpstroma", tmp_path / "in", tmp_path / "out")
    task = loaded(tmp_path / "out")
    assert counts(task) == {"epithelium": 4, "stroma": 4}
    assert len(groups(task)) == 8
    assert sizes(task) == {(60 + number, 60) for number in range(4)}  # as they are


def test_the_name_of_the_data_set_is_not_taken_for_a_class(tmp_path: Path) -> None:
    bad = plain(tmp_path / "in" / "Epistroma" / "im_1.tif", 60, 60)
    with pytest.raises(TaskError) as caught:
        convert("lbpstroma", tmp_path / "in", tmp_path / "out")
    assert caught.value.message == f"{bad}: neither its folders nor its name say epithelium or stroma"


def bach(root: Path) -> Path:
    lines = ["image,patient"]
    for label in ("Benign", "InSitu", "Invasive", "Normal"):
        for number in range(3):
            name = f"{label.lower()}{number:03}.tif"
            plain(root / "ICIAR2018_BACH_Challenge" / "Photos" / label / name, 1030, 520)
            lines.append(f"{name},p{number}")
    write(root / "patients.csv", "\n".join(lines))
    write(root / "ICIAR2018_BACH_Challenge" / "Photos" / "microscopy_ground_truth.csv", "benign000.tif,Benign\n")
    return root


def test_iciar18_micro(tmp_path: Path) -> None:
    convert("iciar18_micro", bach(tmp_path / "in"), tmp_path / "out")
    task = loaded(tmp_path / "out")
    assert counts(task) == dict.fromkeys(("Benign", "InSitu", "Invasive", "Normal"), 6)
    assert groups(task) == {"p0", "p1", "p2"}
    assert sizes(task) == {(512, 512)}


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (("patients.csv", None), UsageError, "patients.csv is missing: without it, patients would be torn"),
        (("patients.csv", "image,case\n"), TaskError, "lacks one of the columns image, patient"),
        (("patients.csv", "image,patient\nx.tif,p\n"), TaskError, "does not tell the patient of benign000.tif"),
        (
            ("ICIAR2018_BACH_Challenge/Photos/microscopy_ground_truth.csv", "benign000.tif,Normal\n"),
            TaskError,
            "benign000.tif: microscopy_ground_truth.csv says Normal",
        ),
    ],
)
def test_bach_refuses_what_would_tear_or_mislabel(
    tmp_path: Path, damage: tuple[str, str | None], kind: type[MtdpError], words: str
) -> None:
    root = bach(tmp_path / "in")
    path = root / damage[0]
    if damage[1] is None:
        path.unlink()
    else:
        write(path, damage[1])
    with pytest.raises(kind) as caught:
        convert("iciar18_micro", root, tmp_path / "out")
    assert words in caught.value.message
    assert str(tmp_path) in caught.value.message


def test_umcm_colorectal_has_no_val_as_in_the_paper(tmp_path: Path) -> None:
    for number, label in enumerate(KATHER, 1):
        for slide in ("01", "02", "10"):
            name = f"A{number}_CRC-Prim-HE-{slide}_0{number}b.tif_Row_301_Col_151.tif"
            plain(tmp_path / "in" / "Kather_texture_2016_image_tiles_5000" / f"0{number}_{label}" / name, 150, 150)
    convert("umcm_colorectal", tmp_path / "in", tmp_path / "out")
    task = loaded(tmp_path / "out")
    assert task.classes == tuple(sorted(label.lower() for label in KATHER))
    assert groups(task) == {"CRC-Prim-HE-01", "CRC-Prim-HE-02", "CRC-Prim-HE-10"}
    assert {split: len(samples) for split, samples in task.samples.items()} == {"train": 16, "val": 0, "test": 8}


def test_ulg_bonemarrow(tmp_path: Path) -> None:
    for label in range(8):
        for image in ("im1", "im2", "im3"):
            plain(tmp_path / "in" / f"class {label}" / f"{image}_{label}.png", 40, 30)
    convert("ulg_bonemarrow", tmp_path / "in", tmp_path / "out")
    task = loaded(tmp_path / "out")
    assert task.classes == tuple(f"class-{label}" for label in range(8))
    assert groups(task) == {"im1", "im2", "im3"}


def test_seven_of_eight_classes_are_refused(tmp_path: Path) -> None:
    for label in range(7):
        plain(tmp_path / "in" / f"c{label}" / "im1_1.png", 40, 30)
    with pytest.raises(TaskError, match="has 7 classes"):
        convert("ulg_bonemarrow", tmp_path / "in", tmp_path / "out")


def test_real_patches_of_invasive_ductal_carcinoma(data_dir: Path, tmp_path: Path) -> None:
    """Real patches under the names of the original archive, by patient; they come out byte for byte."""
    images = sorted((data_dir / "tasks" / "breast_idc2").rglob("*.png"))
    assert len(images) == 1594
    for image in images:
        name = image.name.split("_", 1)[1].replace("-", "_")  # 10259_idx5_x1551_y551_class0.png
        patient, label = name.split("_", 1)[0], name[-5]
        folder = tmp_path / "in" / patient / label
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(image)
    convert("janowczyk6", tmp_path / "in", tmp_path / "out")
    task = loaded(tmp_path / "out")
    assert sum(counts(task).values()) == 1594
    train = len(task.samples["train"]) / 1594
    assert train == pytest.approx(0.810, abs=0.01)  # the paper's share
    for split, samples in task.samples.items():
        assert samples, split
    sample = task.samples["test"][0].path
    original = tmp_path / "in" / sample.name.split("_")[0] / sample.stem[-1] / sample.name.split("_", 1)[1]
    assert sample.read_bytes() == original.read_bytes()
