"""Rare objects given as points: MITOS-ATYPIA 14, Janowczyk 5, TUPAC16 mitosis.

Ten windows are cut around each object with a random shift; the windows that cover the image and hold no object are the
negatives, all of them (the paper's supplement: "exhaustively, with overlap"; how much overlap it does not say). Here
the negatives' windows touch and overlap only at the last column and row. The paper's own counts speak for it: 311
images of 2000 x 2000 pixels, if Janowczyk 5 has so many, are 19,904 such windows, and its 24,870 images leave 4,966
more; with half a side of overlap there would be 69,975.

Layouts, as seen in public code that reads these data sets:

- MITOS-ATYPIA 14: `A03/frames/x40/A03_00Aa.tiff` with `A03/mitosis/A03_00Aa_mitosis.csv` and `..._not_mitosis.csv`,
  lines of x, y, confidence. `A` and `H` are two scanners and the number is the slide, so A03 and H03 are one group. The
  official test set has no `mitosis` folders, and is not used.
- Janowczyk 5: `01_01.tif`, patient first; the ground truth is `01_01_pc.png`, a mask of mitoses, as the author's
  tutorial reads it (github.com/choosehappy/public, "5-mitosis"), or `01_01.csv`, lines of row, column. Which of the two
  the archive holds was not seen; both are read.
- TUPAC16: `mitoses_image_data*/01/01.tif`, patient and image, in several parts, and `mitoses_ground_truth/01/01.csv`,
  lines of row, column. The official test images have no ground truth; folders with `test` in their names are not used.

An image of the last two without a ground truth file is taken to be without mitoses, and counted in a note: the public
lists of ground truth files are shorter than those of the images.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mtdp.converters.plan import Patch, Plan, rng_of
from mtdp.converters.source import (
    check_points,
    contents,
    expect_file,
    find,
    image_size,
    match,
    read_mask,
    read_points,
)
from mtdp.converters.windows import Point, around, cover, without
from mtdp.errors import TaskError

MITOS_SIDE_PX = 323
SIDE_PX = 250

_FRAME = re.compile(r"^[AH](\d+)_\w+\.tiff?$")
_JANOWCZYK = re.compile(r"^(\d+)_(\d+)\.tif$")


def _patches(
    image: Path, root: Path, seed: int, group: str, side: int, objects: Mapping[str, Sequence[Point]]
) -> list[Patch]:
    """Return windows around the objects of each class, and those without any.

    A window of a class holds none of the classes named before it: what holds a mitosis is never an example of something
    else.
    """
    width, height = image_size(image)
    if min(width, height) < side:
        raise TaskError(f"{image} is {width} x {height} pixels, less than a window of {side}", "is it the full image?")
    rng = rng_of(seed, image, root)
    patches: list[Patch] = []
    before: list[Point] = []
    for label, points in objects.items():
        corners = {corner for point in points for corner in around(point, width, height, side, rng, before)}
        patches += [Patch(image, group, label, corner, side) for corner in sorted(corners)]
        before += points
    negatives = without(cover(width, height, side), side, before)
    return patches + [Patch(image, group, "none", corner, side) for corner in negatives]


def mitos2014(root: Path, seed: int) -> Plan:
    """The frames at x40 of the training slides of both scanners."""
    frames = find(root, ["frames/x40/*.tif", "frames/x40/*.tiff"], "SLIDE/frames/x40/*.tiff (as A03/frames/x40)")
    annotated = [frame for frame in frames if (frame.parents[2] / "mitosis").is_dir()]
    if not annotated:
        raise TaskError(
            f"{frames[0].parents[2]} has no folder `mitosis`", "give the training set: only it has annotations"
        )
    patches: list[Patch] = []
    for frame in annotated:
        slide = match(_FRAME, frame, "A03_00Aa.tiff").group(1)
        objects = {}
        for label, suffix in (("mitosis", "mitosis"), ("non_mitosis", "not_mitosis")):
            path = expect_file(frame.parents[2] / "mitosis" / f"{frame.stem}_{suffix}.csv", frame)
            objects[label] = read_points(path, (0, 1))
            check_points(path, objects[label], *image_size(frame))
        patches += _patches(frame, root, seed, slide, MITOS_SIDE_PX, objects)
    skipped = len(frames) - len(annotated)
    notes = ["the same slide from both scanners is one group"]
    return Plan(patches, notes + [f"frames of slides without annotations, left out: {skipped}"] * bool(skipped))


def janowczyk5(root: Path, seed: int) -> Plan:
    """All images; a patient is the number before the underscore."""
    images = find(root, ["*.tif"], "images such as 01_01.tif")
    patches: list[Patch] = []
    bare: list[Path] = []
    for image in images:
        mask, points_file = image.with_name(f"{image.stem}_pc.png"), image.with_suffix(".csv")
        points: list[Point] = []
        if mask.is_file():
            points = _centres(mask, image)
        elif points_file.is_file():
            points = _rows_and_columns(points_file, image)
        else:
            bare.append(image)
        patient = match(_JANOWCZYK, image, "01_01.tif").group(1)
        patches += _patches(image, root, seed, patient, SIDE_PX, {"mitosis": points})
    _check_any(root, images, bare, "01_01_pc.png or 01_01.csv beside 01_01.tif")
    return Plan(patches, _note_of_bare(bare))


def tupac_mitosis(root: Path, seed: int) -> Plan:
    """The images of the auxiliary data set's training part; a patient is a folder."""
    truths = [path for path in sorted(root.rglob("mitoses_ground_truth")) if path.is_dir()]
    if not truths:
        raise TaskError(f"{root} has no folder `mitoses_ground_truth`", f"it holds {contents(root)}")
    found = find(root, ["[0-9][0-9]/*.tif", "[0-9][0-9]/*.tiff"], "images such as mitoses_image_data_part_1/01/01.tif")
    images = [path for path in found if not any("test" in part.lower() for part in path.relative_to(root).parts)]
    patches: list[Patch] = []
    bare: list[Path] = []
    used: set[Path] = set()
    for image in images:
        places = [truth / image.parent.name / f"{image.stem}.csv" for truth in truths]
        files = [path for path in places if path.is_file()]
        used.update(files)
        points = _rows_and_columns(files[0], image) if files else []
        if not files:
            bare.append(image)
        patches += _patches(image, root, seed, image.parent.name, SIDE_PX, {"mitosis": points})
    for path in sorted(path for truth in truths for path in truth.rglob("[0-9]*.csv")):
        if path not in used:
            raise TaskError(
                f"{path} has no image {path.parent.name}/{path.stem}.tif in {root}", "are all parts of it unpacked?"
            )
    _check_any(root, images, bare, "mitoses_ground_truth/01/01.csv for mitoses_image_data/01/01.tif")
    return Plan(patches, _note_of_bare(bare))


def _rows_and_columns(path: Path, image: Path) -> list[Point]:
    points = read_points(path, (1, 0))
    check_points(path, points, *image_size(image))
    return points


def _centres(mask: Path, image: Path) -> list[Point]:
    import cv2

    pixels = read_mask(mask, image).astype(np.uint8)
    _, _, _, centres = cv2.connectedComponentsWithStats(pixels, connectivity=8)
    return [(float(x), float(y)) for x, y in centres[1:]]  # the first is the background


def _check_any(root: Path, images: Sequence[Path], bare: Sequence[Path], expected: str) -> None:
    if len(bare) == len(images):
        raise TaskError(f"{root} has no ground truth: {expected} was expected", f"it holds {contents(root)}")


def _note_of_bare(bare: Sequence[Path]) -> list[str]:
    if not bare:
        return []
    return [
        f"images without a ground truth file, taken to be without mitoses: {len(bare)}, the first is {bare[0].name}"
    ]
