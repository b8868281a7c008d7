"""Public data sets beyond the paper's, each from a miniature of its download."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from converter_support import counts, groups, loaded, plain, sizes, write
from mtdp.catalogue import more_markdown, more_tasks
from mtdp.converters import convert
from mtdp.converters.convert import CONVERTERS, MORE_CONVERTERS
from mtdp.errors import MtdpError, TaskError
from mtdp.multitask import is_head_name
from mtdp.tasks import Task


def splits(task: Task) -> dict[str, set[str]]:
    return {split: {sample.group for sample in samples} for split, samples in task.samples.items()}


def pcam(root: Path) -> Path:
    root.mkdir()
    for theirs, slides in (("train", "ab"), ("valid", "c"), ("test", "d")):
        stem = root / f"camelyonpatch_level_2_split_{theirs}"
        n = 4 * len(slides)
        grey = np.arange(n, dtype=np.uint8) + 10 * len(theirs)
        with h5py.File(f"{stem}_x.h5", "w") as file:
            file["x"] = np.broadcast_to(grey[:, None, None, None], (n, 96, 96, 3))
        with h5py.File(f"{stem}_y.h5", "w") as file:
            file["y"] = (np.arange(n) % 2).reshape(n, 1, 1, 1)
        lines = [f"{i},1,2,False,False,camelyon_{slides[i // 4]}" for i in range(n)]
        write(Path(f"{stem}_meta.csv"), "\n".join([",coord_y,coord_x,tumor_patch,center_tumor_patch,wsi", *lines]))
    return root


def test_pcam(tmp_path: Path) -> None:
    summary = convert("pcam", pcam(tmp_path / "in"), tmp_path / "out")
    task = loaded(tmp_path / "out")
    assert task.classes == ("normal", "tumor")
    assert splits(task) == {"train": {"camelyon-a", "camelyon-b"}, "val": {"camelyon-c"}, "test": {"camelyon-d"}}
    assert sizes(task) == {(96, 96)}
    shown = set()
    for sample in task.samples["train"]:
        with Image.open(sample.path) as image:
            value = np.asarray(image)[0, 0, 0] - 10 * len("train")
            shown.add(int(value))
            assert value % 2 == sample.label, "the label of another patch"
    assert shown == set(range(8))
    assert summary.lines()[0] == "train: 8 images of 2 slides (normal 4, tumor 4); published: 262144"


def test_pcam_that_is_packed_or_short_is_named(tmp_path: Path) -> None:
    root = pcam(tmp_path / "in")
    meta = root / "camelyonpatch_level_2_split_valid_meta.csv"
    write(meta, "\n".join(meta.read_text().splitlines()[:-1]))
    with pytest.raises(TaskError, match=r"valid_x\.h5: 4 labels, but 3 lines"):
        convert("pcam", root, tmp_path / "out")
    write(root / "camelyonpatch_level_2_split_test_y.h5", "packed")
    write(meta, "wsi\na\nb\nc\nd\n")
    with pytest.raises(TaskError, match=r"test_y\.h5 has no table 'y'"):
        convert("pcam", root, tmp_path / "out")


NINE = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")


def test_nct_crc_100k(tmp_path: Path) -> None:
    for label in NINE:
        for number in range(10):
            plain(tmp_path / "in" / "NCT-CRC-HE-100K" / label / f"{label}-AAA{number}.tif", 224, 224)
        plain(tmp_path / "in" / "CRC-VAL-HE-7K" / label / f"{label}-TCGA-1.tif", 224, 224)
    convert("nct_crc_100k", tmp_path / "in", tmp_path / "out")
    task = loaded(tmp_path / "out")
    assert task.classes == NINE
    assert {split: len(samples) for split, samples in task.samples.items()} == {"train": 81, "val": 9, "test": 9}
    assert splits(task)["test"] == {f"{label}-TCGA-1" for label in NINE}
    (tmp_path / "in" / "NCT-CRC-HE-100K-NONORM").mkdir()
    with pytest.raises(TaskError, match="holds 2 of"):
        convert("nct_crc_100k", tmp_path / "in", tmp_path / "other")


def test_mhist(tmp_path: Path) -> None:
    lines = ["Image Name,Majority Vote Label,Number of Annotators who Selected SSA (Out of 7),Partition"]
    for number in range(20):
        name = f"MHIST_a{number:02}.png"
        plain(tmp_path / "in" / "images" / name, 224, 224)
        lines.append(f"{name},{'SSA' if number % 2 else 'HP'},3,{'test' if number >= 14 else 'train'}")
    write(tmp_path / "in" / "annotations.csv", "\n".join(lines))
    convert("mhist", tmp_path / "in", tmp_path / "out")
    task = loaded(tmp_path / "out")
    assert counts(task) == {"HP": 10, "SSA": 10}
    assert splits(task)["test"] == {f"MHIST-a{number}" for number in range(14, 20)}
    assert len(task.samples["val"]) in (2, 3)


def test_bracs_keeps_the_split_of_its_authors(tmp_path: Path) -> None:
    for split, slide in (("train", 100), ("val", 200), ("test", 300)):
        for number, label in enumerate(("N", "PB", "UDH", "FEA", "ADH", "DCIS", "IC")):
            plain(tmp_path / "in" / split / f"{number}_{label}" / f"BRACS_{slide}_{label}_4.png", 300, 200)
    convert("bracs", tmp_path / "in", tmp_path / "out")
    task = loaded(tmp_path / "out")
    assert task.classes == ("ADH", "DCIS", "FEA", "IC", "N", "PB", "UDH")
    assert splits(task) == {"train": {"BRACS-100"}, "val": {"BRACS-200"}, "test": {"BRACS-300"}}
    plain(tmp_path / "in" / "test" / "0_N" / "BRACS_100_N_9.png", 300, 200)
    with pytest.raises(TaskError, match="group 'BRACS_100' is in test and in train"):
        convert("bracs", tmp_path / "in", tmp_path / "other")


@pytest.mark.parametrize("name", ["breakhis", "breakhis_binary"])
def test_breakhis(tmp_path: Path, name: str) -> None:
    kinds = [("B", kind) for kind in ("A", "F", "PT", "TA")] + [("M", kind) for kind in ("DC", "LC", "MC", "PC")]
    for side, kind in kinds:
        for patient in range(3):
            for scale in (40, 400):
                file = f"SOB_{side}_{kind}-14-{patient}{kind}-{scale}-001.png"
                plain(tmp_path / "in" / "histology_slides" / "breast" / side / file, 70, 46)
    convert(name, tmp_path / "in", tmp_path / "out")
    task = loaded(tmp_path / "out")
    assert len(task.classes) == (8 if name == "breakhis" else 2)
    assert len(groups(task)) == 24
    if name == "breakhis_binary":
        assert counts(task) == {"benign": 24, "malignant": 24}
    else:
        assert set(counts(task).values()) == {6}
    for sample in task.of(("train", "val", "test")):
        side, kind = sample.path.name.split("SOB_")[1].split("-")[0].split("_")
        label = task.classes[sample.label]
        assert label == ("benign" if side == "B" else "malignant") or label.startswith(
            {"A": "ad", "F": "fi", "PT": "ph", "TA": "tu", "DC": "du", "LC": "lo", "MC": "mu", "PC": "pa"}[kind]
        )


def test_unitopatho(tmp_path: Path) -> None:
    lists: dict[str, list[str]] = {"train": ["image_id,top_label"], "test": ["image_id,top_label"]}
    for label in ("HP", "NORM", "TA.HG", "TA.LG", "TVA.HG", "TVA.LG"):
        for slide in range(4):
            for region in range(2):
                name = f"{slide}-B3-{label}.ndpi_ROI__mpp0.44_reg00{region}_(1,2,1812,1812).png"
                plain(tmp_path / "in" / "800" / label / name, 60, 60)
                lists["test" if slide == 3 else "train"].append(f'"{name}",0')
    for split, lines in lists.items():
        write(tmp_path / "in" / "800" / f"{split}.csv", "\n".join(lines))
    convert("unitopatho", tmp_path / "in", tmp_path / "out")
    task = loaded(tmp_path / "out")
    assert set(counts(task).values()) == {8}
    assert all(group.startswith("3-B3") for group in splits(task)["test"])
    assert len(groups(task)) == 24
    write(tmp_path / "in" / "800" / "test.csv", 'image_id\n"nowhere.png"\n')
    with pytest.raises(TaskError, match=r"names nowhere\.png, which is not there"):
        convert("unitopatho", tmp_path / "in", tmp_path / "other")


def test_every_one_has_a_licence_and_a_converter() -> None:
    assert {task.name for task in more_tasks()} == set(MORE_CONVERTERS)
    assert not set(MORE_CONVERTERS) & set(CONVERTERS)
    for task in more_tasks():
        assert task.licence
        assert task.train + task.val + task.test == task.images
        assert len(task.class_names) == task.classes
        assert list(task.class_names) == sorted(task.class_names)
        assert is_head_name(task.name)


def test_the_page_equals_the_data() -> None:
    """To renew it: python -c "from mtdp.catalogue import more_markdown as m; print(m(), end='')" between the marks."""
    page = (Path(__file__).parents[3] / "docs" / "catalogue.md").read_text("utf-8")
    begin, end = "<!-- more: begin -->\n", "<!-- more: end -->\n"
    assert page[page.index(begin) + len(begin) : page.index(end)] == more_markdown()


@pytest.mark.parametrize("name", sorted(MORE_CONVERTERS))
def test_an_empty_download_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(MtdpError, match=str(tmp_path / "in")):
        convert(name, tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
