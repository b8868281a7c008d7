"""Camelyon16: whole slides of lymph nodes, metastases outlined.

Windows of 768 pixels at level 0, without overlap, halved to 384; tumour where the outlines cover more than 10%; without
background; at most 1000 of a class from one slide (the paper's supplement). Background, which the paper leaves open:
windows that tissue covers to less than a quarter, tissue being what Otsu's threshold on the saturation leaves.

Layout, as seen in public readers (kaiko-ai/eva, StAndrewsMedTech/wsipipe): `training/normal/normal_001.tif`,
`training/tumor/tumor_001.tif`, `training/lesion_annotations/tumor_001.xml` (the unpacked lesion_annotations.zip): ASAP
polygons in level-0 pixels. The groups `_0`, `_1` and `Tumor` are tumour, `_2`, `Exclusion` and `None` are cut out of
it. The masks in TIFF form say the same and are not read. The official test set (`testing/`) is not used: the paper's
292,226 images, at most 1000 per class and slide, fit the 270 training slides.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mtdp.converters.plan import Patch, Plan, rng_of
from mtdp.converters.source import expect_file, find
from mtdp.converters.windows import grid, shares
from mtdp.errors import ImageUnreadable, TaskError

if TYPE_CHECKING:
    from openslide import OpenSlide

SIDE_PX = 768
OUT_PX = 384
TUMOUR_SHARE = 0.10
TISSUE_SHARE = 0.25
MOST_A_CLASS = 1000
CELL_PX = 32  # masks have one pixel for so many: 24 x 24 a window

_TUMOUR = frozenset({"_0", "_1", "Tumor"})
_CUT_OUT = frozenset({"_2", "Exclusion", "None"})


def camelyon16(root: Path, seed: int) -> Plan:
    """The training slides.

    Raises:
        ImageUnreadable: a slide cannot be opened, or its overview cannot be decoded.
        TaskError: a slide of a tumour without sound outlines.
    """
    from openslide import OpenSlideError

    slides = find(
        root, ["normal/normal_*.tif", "tumor/tumor_*.tif"], "training/normal/normal_001.tif and training/tumor/..."
    )
    slides = [path for path in slides if not path.stem.endswith("_mask")]
    patches: list[Patch] = []
    for path in slides:
        with _open(path) as slide:
            tumour = _tumour_mask(path, root, slide.dimensions)
            try:
                tissue = _tissue_mask(slide)
            except OpenSlideError as error:
                raise ImageUnreadable(f"{path} cannot be decoded: {error}", "download it again") from error
        patches += _pick(path, root, seed, tumour, tissue)
    return Plan(patches, ["the official test slides are not used"], slide_crops)


def _open(path: Path) -> OpenSlide:
    from openslide import OpenSlide, OpenSlideError

    try:
        return OpenSlide(path)
    except (OpenSlideError, OSError) as error:
        raise ImageUnreadable(f"{path} cannot be opened as a slide: {error}", "download it again") from error


def slide_crops(source: Path, patches: Sequence[Patch]) -> Iterator[Image.Image]:
    """Windows at level 0; what the slide does not hold is white.

    Raises:
        ImageUnreadable: a window cannot be decoded.
    """
    from openslide import OpenSlideError

    with _open(source) as slide:
        for patch in patches:
            assert patch.corner is not None
            try:
                window = slide.read_region(patch.corner, 0, (patch.side_px, patch.side_px))
            except OpenSlideError as error:
                raise ImageUnreadable(
                    f"{source} cannot be decoded at {patch.corner}: {error}", "download it again"
                ) from error
            yield _on_white(window)


def _on_white(window: Image.Image) -> Image.Image:
    white = Image.new("RGB", window.size, (255, 255, 255))
    white.paste(window, mask=window.getchannel("A"))
    return white


def _tumour_mask(path: Path, root: Path, size: tuple[int, int]) -> NDArray[np.bool_]:
    """bool[H / CELL_PX, W / CELL_PX], from the outlines; all false for a normal slide."""
    import cv2

    mask = np.zeros((-(-size[1] // CELL_PX), -(-size[0] // CELL_PX)), np.uint8)
    if path.stem.startswith("tumor_"):
        outlines = read_outlines(_annotation(path, root))
        for value, groups in ((1, _TUMOUR), (0, _CUT_OUT)):
            for group, points in outlines:
                if group in groups:
                    cv2.fillPoly(mask, [np.floor(points / CELL_PX).astype(np.int32)], value)
    return mask > 0


def _annotation(path: Path, root: Path) -> Path:
    found = [file for file in sorted(root.rglob(f"{path.stem}.xml")) if not file.name.startswith("._")]
    return found[0] if found else expect_file(path.parents[1] / "lesion_annotations" / f"{path.stem}.xml", path)


def read_outlines(path: Path) -> list[tuple[str, NDArray[np.float64]]]:
    """(group, float64[N, 2] of x and y in level-0 pixels) of each polygon of an ASAP file.

    Raises:
        TaskError: not such a file, or a group that the data set does not have.
    """
    try:
        tree = ET.parse(path)  # noqa: S314  # expat itself bounds entity expansion
        outlines = []
        for annotation in tree.iter("Annotation"):
            group = annotation.get("PartOfGroup", "")
            if group not in _TUMOUR | _CUT_OUT:
                raise TaskError(f"{path} has a polygon of group {group!r}", "is it an annotation of Camelyon16?")
            points = sorted(annotation.iter("Coordinate"), key=lambda point: float(point.attrib["Order"]))
            corners = [(float(point.attrib["X"]), float(point.attrib["Y"])) for point in points]
            if len(corners) > 2:
                outlines.append((group, np.array(corners)))
    except (ET.ParseError, KeyError, ValueError, OSError) as error:
        raise TaskError(f"{path} is not an ASAP annotation: {error}", "download it again") from error
    if not outlines:
        raise TaskError(f"{path} outlines nothing", "download it again")
    return outlines


def _tissue_mask(slide: OpenSlide) -> NDArray[np.bool_]:
    """bool[H / CELL_PX, W / CELL_PX]: saturation over Otsu's threshold, and not black."""
    import cv2

    width, height = slide.dimensions
    cells = (-(-width // CELL_PX), -(-height // CELL_PX))
    level = slide.get_best_level_for_downsample(CELL_PX)
    rgb = np.asarray(_on_white(slide.read_region((0, 0), level, slide.level_dimensions[level])))
    rgb = cv2.resize(rgb, cells, interpolation=cv2.INTER_AREA)
    hsv = cv2.cvtColor(cv2.medianBlur(rgb, 3), cv2.COLOR_RGB2HSV)
    _, stained = cv2.threshold(np.ascontiguousarray(hsv[..., 1]), 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    mask: NDArray[np.bool_] = (stained > 0) & (hsv[..., 2] > 20)
    return mask


def _pick(path: Path, root: Path, seed: int, tumour: NDArray[np.bool_], tissue: NDArray[np.bool_]) -> Iterator[Patch]:
    """At most MOST_A_CLASS windows of each class, drawn at random from those on tissue, in the slide's order."""
    side = SIDE_PX // CELL_PX
    cells = grid(tissue.shape[1], tissue.shape[0], side, side)
    found: dict[str, list[tuple[int, int]]] = {"normal": [], "tumor": []}
    covered = zip(cells, shares(tissue, cells, side), shares(tumour, cells, side), strict=True)
    for cell, tissue_share, tumour_share in covered:
        if tissue_share >= TISSUE_SHARE:
            found["tumor" if tumour_share > TUMOUR_SHARE else "normal"].append(cell)
    rng = rng_of(seed, path, root)
    for label, corners in found.items():
        kept = sorted(rng.sample(range(len(corners)), min(MOST_A_CLASS, len(corners))))
        for index in kept:
            x, y = corners[index]
            yield Patch(path, path.stem, label, (x * CELL_PX, y * CELL_PX), SIDE_PX, OUT_PX)
