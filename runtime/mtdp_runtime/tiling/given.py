"""What a user gives with a slide, in place of what would be found or laid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mtdp_runtime.tiling.given_classes import GivenClasses
from mtdp_runtime.tiling.given_mask import GivenMask
from mtdp_runtime.tiling.given_tiles import GivenTiles


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """Each is None where the user gave none."""

    mask: GivenMask | None = None  # where the tissue is
    tiles: GivenTiles | None = None  # which tiles to compute
    classes: GivenClasses | None = None  # of which class each tile is


NOTHING: Final = Given()
