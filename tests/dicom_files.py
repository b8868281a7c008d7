"""DICOM slides for the tests, written with pydicom: what a writer says, and how it lays the frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom.encaps
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels.encoders import RLELosslessEncoder
from pydicom.uid import generate_uid

EXPLICIT, IMPLICIT, RLE = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.5"
JPEG, J2K_LOSSLESS, J2K = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"
_MICROSCOPY = "1.2.840.10008.5.1.4.1.1.77.1.6"


@dataclass(frozen=True)
class Written:
    """What stands in a file."""

    size: tuple[int, int]  # width, height
    tile: tuple[int, int] = (64, 64)  # width, height
    syntax: str = EXPLICIT
    label: str = "RGB"
    series: str = "1.2.3.4"
    mpp: tuple[float, float] | None = (0.25, 0.25)  # width, height of a pixel
    kind: str = "VOLUME"
    organization: str | None = "TILED_FULL"
    places: Sequence[tuple[int, int]] | None = None  # x, y of each frame, from 0
    samples: int = 3
    bits: int = 8
    planar: int = 0
    paths: int = 1
    planes: int = 1
    table: str = "basic"  # basic, empty, extended: what says where a frame begins
    fragments: int = 1  # pieces of a frame
    uid: str | None = None
    part_of: str | None = None
    part_from: int = 0
    frames: int | None = None  # what it says, where that is not how many there are


def tiles_of(image: NDArray[np.uint8], tile: tuple[int, int]) -> Iterator[NDArray[np.uint8]]:
    """Yield whole tiles, row by row; those at the edges are filled with white."""
    width, height = tile
    down, right = -image.shape[0] % height, -image.shape[1] % width
    padded = np.pad(image, ((0, down), (0, right), (0, 0)), constant_values=255)
    for y in range(0, padded.shape[0], height):
        for x in range(0, padded.shape[1], width):
            yield np.ascontiguousarray(padded[y : y + height, x : x + width])


def rle(tile: NDArray[np.uint8]) -> bytes:
    kind = {
        "samples_per_pixel": 3,
        "bits_allocated": 8,
        "bits_stored": 8,
        "pixel_representation": 0,
        "planar_configuration": 0,
    }
    return RLELosslessEncoder.encode(
        tile, rows=tile.shape[0], columns=tile.shape[1], number_of_frames=1, photometric_interpretation="RGB", **kind
    )


def write_dicom(path: Path, frames: Sequence[bytes], says: Written) -> Path:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = _MICROSCOPY, says.syntax
    meta.MediaStorageSOPInstanceUID = says.uid or generate_uid()
    data = Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = _MICROSCOPY, meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID, data.Modality = says.series, "SM"
    data.ImageType = ["ORIGINAL", "PRIMARY", says.kind, "NONE"]
    data.Columns, data.Rows = says.tile
    data.TotalPixelMatrixColumns, data.TotalPixelMatrixRows = says.size
    data.NumberOfFrames = len(frames) if says.frames is None else says.frames
    data.SamplesPerPixel, data.PhotometricInterpretation = says.samples, says.label
    if says.samples == 3:
        data.PlanarConfiguration = says.planar
    data.BitsAllocated = data.BitsStored = says.bits
    data.HighBit, data.PixelRepresentation = says.bits - 1, 0
    data.NumberOfOpticalPaths, data.TotalPixelMatrixFocalPlanes = says.paths, says.planes
    if says.organization is not None:
        data.DimensionOrganizationType = says.organization
    if says.part_of is not None:
        data.SOPInstanceUIDOfConcatenationSource = says.part_of
        data.ConcatenationFrameOffsetNumber = says.part_from
    shared = Dataset()
    if says.mpp is not None:
        measures = Dataset()
        measures.PixelSpacing = [f"{says.mpp[1] / 1000:.9f}", f"{says.mpp[0] / 1000:.9f}"]
        shared.PixelMeasuresSequence = [measures]
    data.SharedFunctionalGroupsSequence = [shared]
    if says.places is not None:
        data.PerFrameFunctionalGroupsSequence = [_place(x, y) for x, y in says.places]
    _put_pixels(data, frames, says)
    implicit = says.syntax == IMPLICIT
    data.save_as(path, enforce_file_format=True, implicit_vr=implicit, little_endian=True)
    return path


def _place(x: int, y: int) -> Dataset:
    place, frame = Dataset(), Dataset()
    place.ColumnPositionInTotalImagePixelMatrix, place.RowPositionInTotalImagePixelMatrix = x + 1, y + 1
    frame.PlanePositionSlideSequence = [place]
    return frame


def _put_pixels(data: Dataset, frames: Sequence[bytes], says: Written) -> None:
    if says.syntax in (EXPLICIT, IMPLICIT):
        joined = b"".join(frames)
        data.PixelData = joined + bytes(len(joined) % 2)
    elif says.table == "extended":
        data.PixelData, data.ExtendedOffsetTable, data.ExtendedOffsetTableLengths = pydicom.encaps.encapsulate_extended(
            list(frames)
        )
    else:
        data.PixelData = pydicom.encaps.encapsulate(
            list(frames), fragments_per_frame=says.fragments, has_bot=says.table == "basic"
        )
    data["PixelData"].VR = "OB"
    data["PixelData"].is_undefined_length = says.syntax not in (EXPLICIT, IMPLICIT)
