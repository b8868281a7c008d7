"""What decides which numbers come out: read by all rooms, and knows none of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Literal

OnBadTile = Literal["nan", "drop", "fail"]
Pool = Literal["none", "mean"]
FeaturesDtype = Literal["float32", "float16"]
# What may be asked for by name; `backends` and the bundle say what there is.
BackendName = Literal[
    "auto", "tensorrt", "tensorrt-rtx", "onnxruntime-tensorrt", "onnxruntime-cuda", "openvino", "onnxruntime"
]
MIN_TISSUE: Final = 0.25
HUB: Final = "hf:"  # begins the name of a model that lies on the Hugging Face hub
SchedulerName = Literal["local", "ray"]
PrecisionName = Literal["auto", "fp32", "fp16", "bf16", "int8"]


class FormatName(StrEnum):
    """What may be asked for: what `formats.FORMATS` holds, and the HDF5 file, which is always there."""

    H5 = "h5"
    PT = "pt"
    NPY = "npy"
    CSV = "csv"
    GEOJSON = "geojson"
    ZARR = "zarr"
    H5AD = "h5ad"
    PARQUET = "parquet"


@dataclass(frozen=True, slots=True)
class TissueSettings:
    """How tissue is told from glass. Lengths are physical, so they mean the same on every slide."""

    mpp: float = 8.0  # scale of the mask; coarser where the slide is huge
    max_side_px: int = 8192
    method: str = "density over the slide's own glass, 4"  # another rule gives another name
    blur_um: float = 40.0  # light is averaged over this distance: tissue is a texture, not single pixels
    density_floor: float = 0.02  # optical density (natural logarithm): 2 % of the light is lost to haze and 8 bits
    density_part: float = 0.15  # of the slide's usual tissue: a pale slide has a lower threshold than a dark one
    density_ceiling: float = 0.1  # denser is tissue, however dense the rest of it is
    darkest: int = 30  # of 255: darker is a scan border or a hole in the data, not stained tissue
    close_um: float = 64.0  # gaps this narrow belong to the tissue
    mark_um: float = 100.0  # a pen's line is at least this wide; what is narrower is stain or pigment
    mark_margin_um: float = 60.0  # its ink thins out over this distance
    min_width_um: float = 88.0  # a piece that is nowhere this wide is a hair or the edge of a coverslip
    line_um: float = 1000.0  # what is not even that wide and this long without a bend is such an edge, too
    min_piece_um2: float = 16_000.0  # smaller pieces are dust (about a third of a 224 px tile at 1 µm/px)
    min_hole_um2: float = 16_000.0  # smaller holes are part of the tissue


@dataclass(frozen=True, slots=True)
class ExtractSettings:
    """What decides which numbers come out."""

    mpp: float  # target scale, micrometres per pixel
    stride_px: int
    min_tissue: float = MIN_TISSUE  # part of a tile's area that must be tissue
    on_bad_tile: OnBadTile = "nan"
    heads: bool = False  # also store the probabilities of the model's heads
    tissue: TissueSettings = field(default_factory=TissueSettings)
    pool: Pool = "none"  # a vector of the slide beside its tiles: their mean
    features_dtype: FeaturesDtype = "float32"  # as stored; a number beyond float16 is an error
    tokens: bool = False  # also store the tokens of each tile's patches, as float16
