"""Whole images or plain tiles in a folder for each class: Janowczyk 6 and 7, Stroma LBP, BACH18, UMCM, BoneMarrow.

Layouts, and where each was seen:

- Janowczyk 6: `PATIENT/{0,1}/PATIENT_idx5_x1001_y1001_class0.png` (public readers of `IDC_regular_ps50_idx5`). The
  author's own lists of training, validation and test patients are not used: the paper drew its split at random.
- Janowczyk 7: `CLL/sj-03-476_007.tif`, `.../sj-05-3362-R2_001.tif` (public readers), or all images in one folder with
  the class first in their names (the author's tutorial). A case is `sj-YEAR-NUMBER`. 374 images x 6 tiles = 2,244.
- Stroma LBP: not seen. A copy in public code has the class as first character of the file name (0 epithelium, 1
  stroma). Read here: any folder whose name says epithel... or strom..., or such names. Its official training,
  validation and test sets are not used: the paper drew its split at random, by image.
- BACH18: `Photos/{Normal,Benign,InSitu,Invasive}/n032.tif` and `Photos/microscopy_ground_truth.csv` (lines of file
  name, class). Which patient an image is of stands in a list that the challenge keeps apart from the archive; it is
  wanted here as `patients.csv` (`image,patient`) in the source folder. The official test images have no labels.
- UMCM colorectal: `Kather_texture_2016_image_tiles_5000/01_TUMOR/10009_CRC-Prim-HE-03_009.tif_Row_301_Col_151.tif`
  (public readers). The group is `CRC-Prim-HE-03`, ten in all. No official test set.
- BoneMarrow: no download of the crops was found. Wanted here: `CLASS/IMAGE_anything.png`, a folder for each of the
  eight classes, the source image first in the name.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from mtdp.converters.plan import Patch, Plan
from mtdp.converters.source import contents, find, group_name, image_size, match
from mtdp.converters.windows import grid
from mtdp.errors import TaskError, UsageError

LYMPHOMA_SIDE_PX = 384
BACH_SIDE_PX = 512
LYMPHOMAS = ("CLL", "FL", "MCL")
BACH_CLASSES = ("Benign", "InSitu", "Invasive", "Normal")

_IDC = re.compile(r"^(\d+)_idx\d+_x\d+_y\d+_class([01])\.png$")
_CASE = re.compile(r"(sj-\d+-\d+)")
_KATHER = re.compile(r"(CRC-Prim-HE-\d+)")
_KATHER_FOLDER = re.compile(r"^0[1-8]_([A-Z]+)$")
_IMAGES = ("*.png", "*.tif", "*.tiff", "*.jpg", "*.jpeg", "*.bmp")


def _tiles(image: Path, group: str, label: str, side: int) -> list[Patch]:
    corners = grid(*image_size(image), side, side)
    if not corners:
        raise TaskError(f"{image} is smaller than a tile of {side} pixels", "is it the full image?")
    return [Patch(image, group, label, corner, side) for corner in corners]


def janowczyk6(root: Path, seed: int) -> Plan:
    """Invasive ductal carcinoma or not: patches as they are."""
    inner = root / "IDC_regular_ps50_idx5"  # one public copy holds the patients twice, the second time in here
    root = inner if inner.is_dir() else root
    patches = []
    for path in find(root, ["[01]/*.png"], "PATIENT/{0,1}/PATIENT_idx5_x1_y1_class0.png"):
        patient, label = match(_IDC, path, "10253_idx5_x1001_y1001_class0.png").groups()
        if label != path.parent.name:
            raise TaskError(f"{path} is named class {label} and lies in folder {path.parent.name}", "which is it?")
        patches.append(Patch(path, patient, "idc" if label == "1" else "non_idc"))
    return Plan(patches)


def janowczyk7(root: Path, seed: int) -> Plan:
    """Tiles of 384 pixels of lymphomas."""
    patches = []
    for path in find(root, ["*.tif"], "CLL/, FL/ and MCL/ with images such as sj-03-476_007.tif"):
        names = [path.parent.name] + [name for name in LYMPHOMAS if path.name.startswith(name)]
        label = next((name for name in names if name in LYMPHOMAS), None)
        if label is None:
            raise TaskError(f"{path} lies in none of the folders {', '.join(LYMPHOMAS)}", "which class is it of?")
        case = match(_CASE, path, "sj-03-476_007.tif").group(1)
        patches += _tiles(path, case, label, LYMPHOMA_SIDE_PX)
    return Plan(patches)


def lbpstroma(root: Path, seed: int) -> Plan:
    """Epithelium or stroma, whole images, each a group of its own."""
    patches = []
    for path in find(root, _IMAGES, "images in folders epithelium/ and stroma/"):
        inside = path.relative_to(root)
        label = _epithelium_or_stroma(inside)
        if label is None:
            raise TaskError(
                f"{path}: neither its folders nor its name say epithelium or stroma",
                "sort the images into epithelium/ and stroma/",
            )
        patches.append(Patch(path, inside.with_suffix("").as_posix(), label))
    return Plan(patches, ["each image is a group: the patient is not known"])


def _epithelium_or_stroma(inside: Path) -> str | None:
    for part in reversed(inside.parent.parts):  # the innermost folder that says it
        name = part.lower().replace("epistroma", "")  # the data set's own name says neither
        told = [label for label in ("epithelium", "stroma") if label[:5] in name]
        if len(told) == 1:
            return told[0]
    return {"0": "epithelium", "1": "stroma"}.get(inside.name[0]) if inside.parent == Path() else None


def iciar18_micro(root: Path, seed: int) -> Plan:
    """Tiles of 512 pixels of microscopy images, by patient."""
    images = [
        path
        for path in find(root, ["*.tif"], "Photos/Benign/b001.tif, Photos/InSitu/..., and so on")
        if path.parent.name in BACH_CLASSES and path.parents[1].name != "WSI"
    ]
    if not images:
        raise TaskError(f"{root} has none of the folders {', '.join(BACH_CLASSES)}", f"it holds {contents(root)}")
    patients = _patients(root / "patients.csv")
    truth = _ground_truth(root)
    patches = []
    for path in images:
        if truth.get(path.name, path.parent.name).lower() != path.parent.name.lower():
            raise TaskError(
                f"{path}: microscopy_ground_truth.csv says {truth[path.name]}", "the folder and the list must agree"
            )
        patient = patients.get(path.name)
        if patient is None:
            raise TaskError(f"{root / 'patients.csv'} does not tell the patient of {path.name}", "add a line for it")
        patches += _tiles(path, patient, path.parent.name, BACH_SIDE_PX)
    return Plan(patches)


def _patients(path: Path) -> dict[str, str]:
    hint = (
        "write image,patient lines from the challenge's list; an image of unknown patient may be a patient of its own"
    )
    if not path.is_file():
        raise UsageError(f"{path} is missing: without it, patients would be torn between splits", hint)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not {"image", "patient"} <= set(reader.fieldnames or ()):
                raise TaskError(f"{path} lacks one of the columns image, patient", hint)
            return {row["image"]: row["patient"] for row in reader if row["image"] and row["patient"]}
    except (UnicodeDecodeError, csv.Error) as error:
        raise TaskError(f"{path} is not a CSV file: {error}", hint) from error


def _ground_truth(root: Path) -> dict[str, str]:
    told: dict[str, str] = {}
    for path in sorted(root.rglob("microscopy_ground_truth.csv")):
        for line in path.read_text("utf-8-sig").splitlines():
            name, _, label = line.partition(",")
            if label.strip():
                told[name.strip()] = label.strip().replace(" ", "")
    return told


def umcm_colorectal(root: Path, seed: int) -> Plan:
    """Eight textures, patches as they are."""
    patches = []
    for path in find(root, ["0[1-8]_*/*.tif"], "folders 01_TUMOR to 08_EMPTY with .tif images"):
        folder = _KATHER_FOLDER.match(path.parent.name)
        if folder is None:
            raise TaskError(f"{path.parent} is not a class", "the folders are 01_TUMOR to 08_EMPTY")
        group = match(_KATHER, path, "10009_CRC-Prim-HE-03_009.tif_Row_301_Col_151.tif").group(1)
        patches.append(Patch(path, group, folder.group(1).lower()))
    return Plan(patches, ["ten groups by file name; the paper has no validation split of it, and so has this task"])


def ulg_bonemarrow(root: Path, seed: int) -> Plan:
    """Crops of cells, whole."""
    patches = []
    for path in find(root, _IMAGES, "a folder for each of eight classes, with images IMAGE_anything.png"):
        if path.parent.parent != root:
            raise TaskError(f"{path} is not in CLASS/IMAGE_anything.png below {root}", "one folder for each class")
        if "_" not in path.stem:
            raise TaskError(f"{path}: a name like IMAGE_anything.png was expected", "put the source image first")
        patches.append(Patch(path, path.stem.split("_", 1)[0], group_name(path.parent.name)))
    return Plan(patches)
