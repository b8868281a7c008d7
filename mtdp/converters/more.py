"""Public data sets that the paper did not train on: PatchCamelyon, NCT-CRC-100K, MHIST, BRACS, BreakHis, UniToPatho.

Their authors' splits are kept; where there is no val, it is drawn from train by group. Layouts, as in the documentation
of public readers (kaiko-ai/eva); the full archives were not tried:

- PatchCamelyon: `camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5` (unpacked) and `..._meta.csv` with the column
  `wsi`, the slide of each patch.
- NCT-CRC-100K: `NCT-CRC-HE-100K/ADI/ADI-AAAFLCLY.tif`, and `CRC-VAL-HE-7K/ADI/...`, which becomes test. The variant
  without colour normalisation, `NCT-CRC-HE-100K-NONORM`, is read where it lies there alone.
- MHIST: `images/MHIST_aaa.png` and `annotations.csv` (`Image Name`, `Majority Vote Label`, `Partition`).
- BRACS: `{train,val,test}/0_N/BRACS_1003718_N_4.png`; the slide is `BRACS_1003718`.
- BreakHis: `histology_slides/breast/benign/SOB/adenosis/.../SOB_B_A-14-22549AB-40-001.png`.
- UniToPatho: `800/HP/149-B3-HP.ndpi_ROI__....png` with `800/train.csv` and `800/test.csv` (`image_id`); the slide is
  the name up to `.ndpi`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from mtdp.breakhis import name_facts
from mtdp.converters.plan import Patch, Plan
from mtdp.converters.source import expect_file, find, match
from mtdp.errors import ImageUnreadable, TaskError

_PCAM_SPLITS: Final = {"train": "train", "valid": "val", "test": "test"}
_BRACS: Final = re.compile(r"^(BRACS_\d+)_[A-Z]+_\d+\.png$")
_BRACS_FOLDER: Final = re.compile(r"^[0-6]_([A-Z]+)$")
_TUMOURS: Final = {
    "A": "adenosis",
    "F": "fibroadenoma",
    "PT": "phyllodes_tumor",
    "TA": "tubular_adenoma",
    "DC": "ductal_carcinoma",
    "LC": "lobular_carcinoma",
    "MC": "mucinous_carcinoma",
    "PC": "papillary_carcinoma",
}
_TUMOUR: Final = re.compile(r"^SOB_[BM]_([A-Z]+)-")


def pcam(root: Path, seed: int) -> Plan:
    """Patches of 96 pixels of lymph nodes; tumour if their centre holds any."""
    patches = []
    for theirs, split in _PCAM_SPLITS.items():
        stem = f"camelyonpatch_level_2_split_{theirs}"
        images = find(root, [f"{stem}_x.h5"], f"{stem}_x.h5, unpacked")[0]
        labels = _numbers(expect_file(images.with_name(f"{stem}_y.h5"), images), "y")
        slides = [row["wsi"] for row in _table(expect_file(images.with_name(f"{stem}_meta.csv"), images), ("wsi",))]
        if len(labels) != len(slides):
            raise TaskError(f"{images}: {len(labels)} labels, but {len(slides)} lines of {stem}_meta.csv")
        patches += [
            Patch(images, slide, "tumor" if label else "normal", split=split, index=index)
            for index, (label, slide) in enumerate(zip(labels, slides, strict=True))
        ]
    return Plan(patches, ["made from Camelyon16: the two share slides"], hdf5_crops)


def _numbers(path: Path, name: str) -> list[int]:
    import h5py

    try:
        with h5py.File(path) as file:
            return [int(value) for value in np.asarray(file[name]).reshape(-1)]
    except (OSError, KeyError) as error:
        raise TaskError(f"{path} has no table {name!r}: {error}", "is it unpacked (gunzip)?") from error


def hdf5_crops(source: Path, patches: Sequence[Patch]) -> Iterator[Image.Image]:
    """Images by number, of a table `x` uint8[N, H, W, 3].

    Raises:
        ImageUnreadable: there is no such image in the file.
    """
    import h5py

    try:
        with h5py.File(source) as file:
            table = file["x"]
            for patch in patches:
                yield Image.fromarray(np.asarray(table[patch.index], np.uint8))
    except (OSError, KeyError, IndexError, ValueError) as error:
        raise ImageUnreadable(f"{source} cannot be decoded: {error}", "download it again") from error


def nct_crc_100k(root: Path, seed: int) -> Plan:
    """Nine tissues of the colon and rectum."""
    folders = [root / name for name in ("NCT-CRC-HE-100K", "NCT-CRC-HE-100K-NONORM") if (root / name).is_dir()]
    if len(folders) != 1:
        raise TaskError(
            f"{root} holds {len(folders)} of NCT-CRC-HE-100K and NCT-CRC-HE-100K-NONORM", "one of them is needed"
        )
    test = root / "CRC-VAL-HE-7K"
    if not test.is_dir():
        raise TaskError(f"{test} is missing, which becomes the test split", "download and unpack it, too")
    patches = []
    for folder, split in ((folders[0], None), (test, "test")):
        for path in find(folder, ["*/*.tif"], "ADI/ADI-AAAFLCLY.tif and so on"):
            patches.append(Patch(path, path.stem, path.parent.name, split=split))
    return Plan(patches, ["the patients of train and val are not known: val is no unseen patient; test is"])


def mhist(root: Path, seed: int) -> Plan:
    """Hyperplastic polyps, or sessile serrated adenomas."""
    table = expect_file(root / "annotations.csv", root)
    patches = []
    for row in _table(table, ("Image Name", "Majority Vote Label", "Partition")):
        image = expect_file(root / "images" / row["Image Name"], table)
        if row["Partition"] not in ("train", "test"):
            raise TaskError(f"{table}: {row['Image Name']} is in partition {row['Partition']!r}", "train or test")
        split = "test" if row["Partition"] == "test" else None
        patches.append(Patch(image, image.stem, row["Majority Vote Label"], split=split))
    return Plan(patches, ["each image is a group: the patient is not known"])


def bracs(root: Path, seed: int) -> Plan:
    """Seven lesions of the breast, regions as they are."""
    patches = []
    for path in find(root, ["*/[0-6]_*/BRACS_*.png"], "train/0_N/BRACS_1003718_N_4.png and so on"):
        split, folder = path.parents[1].name, _BRACS_FOLDER.match(path.parent.name)
        if split not in ("train", "val", "test") or folder is None:
            raise TaskError(f"{path} is not in train/, val/ or test/ and a class such as 0_N", "unpack BRACS_RoI")
        slide = match(_BRACS, path, "BRACS_1003718_N_4.png").group(1)
        patches.append(Patch(path, slide, folder.group(1), split=split))
    return Plan(patches)


def breakhis(root: Path, seed: int) -> Plan:
    """Eight tumours of the breast, by patient."""
    return Plan(
        [
            Patch(path, patient, _TUMOURS[match(_TUMOUR, path, "SOB_B_A-14-22549AB-40-001.png").group(1)])
            for path, _, patient in _breakhis(root)
        ]
    )


def breakhis_binary(root: Path, seed: int) -> Plan:
    """Benign or malignant, by patient."""
    return Plan([Patch(path, patient, label) for path, label, patient in _breakhis(root)])


def _breakhis(root: Path) -> Iterator[tuple[Path, str, str]]:
    expected = "histology_slides/breast/benign/SOB/adenosis/.../SOB_B_A-14-22549AB-40-001.png"
    for path in find(root, ["SOB_*.png"], expected):
        label, patient, _ = name_facts(path)
        yield path, label, patient


def unitopatho(root: Path, seed: int) -> Plan:
    """Six kinds of polyps and normal mucosa, patches of 800 micrometres."""
    folder = root / "800" if (root / "800").is_dir() else root
    images = {path.name: path for path in find(folder, ["*/*.png"], "800/HP/149-B3-HP.ndpi_ROI__....png and so on")}
    patches = []
    for name, split in (("train", None), ("test", "test")):
        table = expect_file(folder / f"{name}.csv", folder)
        for row in _table(table, ("image_id",)):
            path = images.pop(Path(row["image_id"]).name, None)
            if path is None:
                raise TaskError(f"{table} names {row['image_id']}, which is not there, or is in both lists")
            slide, ndpi, _ = path.name.partition(".ndpi")
            if not ndpi:
                raise TaskError(f"{path}: a name like 149-B3-HP.ndpi_ROI__....png was expected")
            patches.append(Patch(path, slide, path.parent.name, split=split))
    notes = [f"{len(images)} images are in neither list, and are not used"] if images else []
    return Plan(patches, notes)


def _table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [column for column in columns if column not in (reader.fieldnames or ())]
            if missing:
                raise TaskError(f"{path} lacks the column {missing[0]!r}", "is it the table of this data set?")
            return [{column: (row[column] or "").strip() for column in columns} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise TaskError(f"{path} is not a CSV file: {error}") from error
