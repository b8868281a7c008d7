"""What decides which numbers come out: read by all rooms, and knows none of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

OnBadTile = Literal["nan", "drop", "fail"]
FeaturesDtype = Literal["float32", "float16"]


@dataclass(frozen=True, slots=True)
class TissueSettings:
    """How tissue is told from glass. Lengths are physical, so they mean the same on every slide."""

    mpp: float = 8.0  # scale of the mask; coarser where the slide is huge
    max_side_px: int = 8192
    blur_um: float = 40.0  # saturation is averaged over this distance: tissue is a texture, not single pixels
    saturation_floor: int = 12  # of 255: below it nothing is tissue, whatever Otsu finds in a blank slide
    saturation_ceiling: int = 50  # above it everything is tissue, though Otsu may split a slide without glass in two
    darkest: int = 30  # of 255: darker is a scan border or a hole in the data, not stained tissue
    close_um: float = 64.0  # gaps this narrow belong to the tissue
    mark_um: float = 100.0  # a pen's line is at least this wide; what is narrower is stain or pigment
    mark_margin_um: float = 60.0  # its ink thins out over this distance
    min_piece_um2: float = 16_000.0  # smaller pieces are dust (about a third of a 224 px tile at 1 µm/px)
    min_hole_um2: float = 16_000.0  # smaller holes are part of the tissue


@dataclass(frozen=True, slots=True)
class ExtractSettings:
    """What decides which numbers come out."""

    mpp: float  # target scale, micrometres a pixel
    stride_px: int
    min_tissue: float = 0.25  # part of a tile's area that must be tissue
    on_bad_tile: OnBadTile = "nan"
    heads: bool = False  # also store the probabilities of the model's heads
    tissue: TissueSettings = field(default_factory=TissueSettings)
    features_dtype: FeaturesDtype = "float32"  # as stored; a number beyond float16 is an error
