"""Warwick CRC (CRCHistoPhenotypes): 100 images of 500 x 500 pixels, nuclei given as points of four classes.

The paper cuts tiles of 100 pixels, 25 per image, and calls a tile positive where an inflammatory nucleus lies in it.

Layout, as seen in several public readers: `Classification/img1/img1.bmp` with `img1_epithelial.mat`,
`img1_fibroblast.mat`, `img1_inflammatory.mat` and `img1_others.mat`; each holds `detection`, float64[N, 2], x and y.
`Detection/` holds the same images again, and is not used. There is no official test set.
"""

from __future__ import annotations

from pathlib import Path

from mtdp.converters.plan import Patch, Plan
from mtdp.converters.source import check_points, expect_file, find, image_size
from mtdp.converters.windows import Point, grid, holds
from mtdp.errors import TaskError, UsageError

SIDE_PX = 100


def warwick_crc(root: Path, seed: int) -> Plan:
    """All tiles of all images, by image; nothing is random but the split."""
    images = [path for path in find(root, ["img*/img*.bmp"], "Classification/img1/img1.bmp") if _classified(path)]
    if not images:
        raise TaskError(f"{root} has images in Detection/ only", "the classes are in the folder Classification/")
    patches = []
    for image in images:
        points = _points(expect_file(image.with_name(f"{image.stem}_inflammatory.mat"), image), image)
        width, height = image_size(image)
        for corner in grid(width, height, SIDE_PX, SIDE_PX):
            label = "inflammatory" if any(holds(corner, SIDE_PX, point) for point in points) else "other"
            patches.append(Patch(image, image.stem, label, corner, SIDE_PX))
    return Plan(patches)


def _classified(path: Path) -> bool:
    return path.parents[1].name.lower() != "detection"


def _points(path: Path, image: Path) -> list[Point]:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UsageError(f"{path} needs scipy, which is not installed", "pip install scipy") from None
    try:
        table = loadmat(path)["detection"]
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise TaskError(f"{path} is not a MATLAB file: {error}", "download it again") from error
    except KeyError:
        raise TaskError(f"{path} has no table `detection`", "is it a file of CRCHistoPhenotypes?") from None
    if table.size and (table.ndim != 2 or table.shape[1] != 2):
        raise TaskError(f"{path}: `detection` is {table.shape}, x and y were expected", "download it again")
    width, height = image_size(image)
    points = [(float(x), float(y)) for x, y in table.reshape(-1, 2)]
    check_points(path, points, width, height)
    return [(min(x, width - 0.5), min(y, height - 0.5)) for x, y in points]  # on the far edge: in the last tile
