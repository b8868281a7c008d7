"""Dense masks: Janowczyk 1 (nuclei) and 2 (epithelium and stroma).

Every window of a grid with half a side of overlap becomes a patch; it is positive where the mask covers more than a
share of it. The paper's counts are whole grids: 31,725 = 141 images x 15 x 15, 3,402 = 42 images x 9 x 9.

Layouts, as the author's tutorial reads them (github.com/choosehappy/public, "1-nuclei", "2-epi"; the name before the
first underscore is the patient there, too):

- Janowczyk 1: `12750_500_f00003_original.tif` with `12750_500_f00003_mask.png`;
- Janowczyk 2: `NAME.tif` with `NAME_mask.png`, in one folder or with the masks in a folder of their own.

Images without a mask are not used. There is no official test set.
"""

from __future__ import annotations

from pathlib import Path

from mtdp.converters.plan import Patch, Plan
from mtdp.converters.source import find, read_mask
from mtdp.converters.windows import grid, shares
from mtdp.errors import TaskError

NUCLEI_SIDE_PX, NUCLEI_SHARE = 250, 0.05
EPITHELIUM_SIDE_PX, EPITHELIUM_SHARE = 200, 0.10


def janowczyk1(root: Path, seed: int) -> Plan:
    """Nuclei or background; nothing is random but the split."""
    return _plan(root, "_original.tif", NUCLEI_SIDE_PX, NUCLEI_SHARE, "nuclei", "background")


def janowczyk2(root: Path, seed: int) -> Plan:
    """Epithelium or stroma; nothing is random but the split."""
    return _plan(root, ".tif", EPITHELIUM_SIDE_PX, EPITHELIUM_SHARE, "epithelium", "stroma")


def _plan(root: Path, suffix: str, side: int, share: float, positive: str, negative: str) -> Plan:
    masks = find(root, ["*_mask.png"], f"masks such as NAME_mask.png beside NAME{suffix}")
    images = {path.name: path for path in sorted(root.rglob("*.tif")) if not path.name.startswith("._")}
    patches = []
    for mask_path in masks:
        name = mask_path.name.removesuffix("_mask.png")
        image = images.get(f"{name}{suffix}")
        if image is None:
            raise TaskError(
                f"{mask_path.parent / (name + suffix)} is missing, which belongs to {mask_path}",
                "is the download complete?",
            )
        mask = read_mask(mask_path, image)
        corners = grid(mask.shape[1], mask.shape[0], side, side // 2)
        for corner, covered in zip(corners, shares(mask, corners, side), strict=True):
            label = positive if covered > share else negative
            patches.append(Patch(image, name.split("_", 1)[0], label, corner, side))
    return Plan(patches)
