"""A feature file before its first row: HDF5 whose datasets have their final size, and their space in the file.

It is laid out in memory (`image`). The place of every row is known then, and rows are written there without HDF5.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

import h5py
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.store import checksums
from mtdp_runtime.store.disk import Place
from mtdp_runtime.store.image import SparseImage

# What things are called in the file; `reader` says what each is.
FEATURES: Final = "features"
COORDS: Final = "coords"
STATUS: Final = "status"
TISSUE_FRACTION: Final = "tissue_fraction"
PROBABILITIES: Final = "probabilities_"  # then the task
MASK: Final = "tissue_mask"
CLASS: Final = "class"
SLIDE_FEATURES: Final = "slide_features"
TOKENS: Final = "tokens"
_CHUNK_BYTES: Final = 1 << 20


class TileStatus(IntEnum):
    """The values of `status`."""

    GOOD = 0
    UNREADABLE = 1
    NOT_FINITE = 2
    NOT_COMPUTED = 255


@dataclass(frozen=True, slots=True)
class Layout:
    """What a file will hold: known before the first tile is read."""

    coords: NDArray[np.int64]  # [N, 2], level-0 x, y of each tile's top left
    tissue_fraction: NDArray[np.float32]  # [N]
    outputs: Mapping[str, int]  # name -> columns; `features` and any `probabilities_<task>`
    coords_attrs: Mapping[str, Any]  # as TRIDENT writes them
    root_attrs: Mapping[str, Any]
    made_of: Mapping[str, Any]  # slide, model, grid, precision: what makes the file this file
    resume_key: str  # of everything else that may change the last bits of a row: backend version, batch size
    outputs_attrs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of some outputs
    mask: NDArray[np.bool_] | None = None  # [H, W], stored as it is: no rows of it are ever written
    mask_attrs: Mapping[str, Any] = field(default_factory=dict)
    features_dtype: str = "float32"  # or float16: of `features` alone
    classes: NDArray[np.int16] | None = None  # [N], numbers of `class_names`, -1 for none: stored as they are
    class_names: tuple[str, ...] = ()
    pooled: bool = False  # also the mean of the rows that are good
    slide_hint: str = ""  # size and times of the slide's files: where they differ it may be another one
    tokens: tuple[int, int] | None = None  # T and D of a tile's patch tokens, where they are stored, too

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of a row of each output, by name."""
        shapes: dict[str, tuple[int, ...]] = {name: (columns,) for name, columns in self.outputs.items()}
        return shapes if self.tokens is None else {**shapes, TOKENS: self.tokens}

    def dtype_of(self, output: str) -> np.dtype[Any]:
        """Return how the rows of an output are stored."""
        half = output == TOKENS or (output == FEATURES and self.features_dtype == "float16")
        return np.dtype("<f2" if half else "<f4")


def fingerprint(made_of: Mapping[str, Any]) -> str:
    """Return the facts as 64 hex digits."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def lay_out(layout: Layout) -> tuple[SparseImage, dict[str, Place]]:
    """Return a file in which no row is computed yet, without the space of its rows, and where these lie."""
    rows = len(layout.coords)
    image = SparseImage()
    with h5py.File(image, "w", libver=("earliest", "v110")) as file:
        for name, shape in layout.shapes.items():
            _dataset(file, name, (rows, *shape), layout.dtype_of(name))
        _dataset(file, STATUS, (rows,), np.dtype("u1"))
        file[STATUS][...] = TileStatus.NOT_COMPUTED
        file.create_dataset(COORDS, data=layout.coords)
        file.create_dataset(TISSUE_FRACTION, data=layout.tissue_fraction)
        if layout.pooled:
            file.create_dataset(SLIDE_FEATURES, data=np.zeros(layout.outputs[FEATURES], np.float32))
            file[SLIDE_FEATURES].attrs["pool"] = "mean"
        if layout.classes is not None:
            file.create_dataset(CLASS, data=layout.classes)
            file[CLASS].attrs["class_names"] = attribute(layout.class_names)
        if layout.mask is not None and layout.mask.size:
            mask = layout.mask.view(np.uint8)
            file.create_dataset(MASK, data=mask, chunks=mask.shape, compression="gzip", compression_opts=1)
            file[MASK].attrs.update({key: attribute(value) for key, value in layout.mask_attrs.items()})
        file[COORDS].attrs.update({key: attribute(value) for key, value in layout.coords_attrs.items()})
        file[FEATURES].attrs.update(
            {key: attribute(value) for key, value in layout.coords_attrs.items() if key in ("name", "savetodir")}
        )
        file[FEATURES].attrs["encoder"] = attribute(layout.root_attrs["model"])
        for name, attrs in layout.outputs_attrs.items():
            file[name].attrs.update({key: attribute(value) for key, value in attrs.items()})
        file.attrs.update({key: attribute(value) for key, value in layout.root_attrs.items()})
        file.attrs["made_of"] = json.dumps(layout.made_of)
        file.attrs["fingerprint"] = fingerprint(layout.made_of)
        file.attrs["resume_key"] = layout.resume_key
        places = {name: _place(file[name]) for name in (*layout.shapes, STATUS) if rows}
    return image, places


def complete(
    image: SparseImage,
    layout: Layout,
    status: NDArray[np.uint8],
    root_attrs: Mapping[str, Any],
    rows: dict[str, str],
    pooled: NDArray[np.float32] | None = None,
) -> None:
    """Add to a file in memory what the end of a run knows.

    Args:
        image: as `lay_out` gave it.
        layout: what it was made of.
        status: uint8[N], TileStatus of every row.
        root_attrs: attributes of the file.
        rows: checksums of the datasets of rows.
        pooled: float32[D], the slide's own vector, where the layout has one.
    """
    with h5py.File(image, "r+") as file:
        file[STATUS][...] = status
        file.attrs.update({key: attribute(value) for key, value in root_attrs.items()})
        sums = rows | {
            COORDS: checksums.digest_of(layout.coords),
            TISSUE_FRACTION: checksums.digest_of(layout.tissue_fraction),
            STATUS: checksums.digest_of(status),
        }
        if pooled is not None:
            file[SLIDE_FEATURES][...] = pooled
            sums[SLIDE_FEATURES] = checksums.digest_of(pooled)
        if layout.classes is not None:
            sums[CLASS] = checksums.digest_of(layout.classes)
        if MASK in file:
            assert layout.mask is not None
            sums[MASK] = checksums.digest_of(layout.mask.view(np.uint8))
        sums[checksums.ATTRIBUTES] = checksums.digest_of_attributes(file)
        file.attrs[checksums.ATTRIBUTE] = checksums.encoded(sums)


def _dataset(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Create a dataset with its space reserved: chunks of about 1 MiB, contiguous where it has no rows."""
    row_bytes = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    if shape[0]:
        plist.set_chunk((_chunk_rows(shape[0], row_bytes), *shape[1:]))
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    # The rows are a hole of the image, and zeros on the disk. What stands behind the last status must not be chance.
    plist.set_fill_time(h5py.h5d.FILL_TIME_ALLOC if name == STATUS else h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple(shape)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(dtype), space, plist)


def _chunk_rows(rows: int, row_bytes: int) -> int:
    return max(1, min(rows, _CHUNK_BYTES // row_bytes))


def reserved_bytes(rows: int, row_bytes: int) -> int:
    """Return what a dataset of rows takes in the file: whole chunks."""
    chunk_rows = _chunk_rows(rows, row_bytes)
    return -(-rows // chunk_rows) * chunk_rows * row_bytes


def _place(dataset: h5py.Dataset) -> Place:
    by_row: list[tuple[int, int]] = []
    # One walk: to ask for each chunk by its number takes the square of their count, and tokens have many.
    dataset.id.chunk_iter(lambda info: by_row.append((info.chunk_offset[0], info.byte_offset)))
    by_row.sort()
    row_bytes = dataset.dtype.itemsize * int(np.prod(dataset.shape[1:], dtype=np.int64))
    return Place(tuple(offset for _, offset in by_row), dataset.chunks[0], row_bytes)


def attribute(value: Any) -> Any:
    """Return what HDF5 can hold: TRIDENT's readers expect None as 'None' and a mapping as JSON."""
    if value is None:
        return "None"
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value)
    if isinstance(value, str):  # a file name may be no UTF-8
        return value.encode("utf-8", "backslashreplace").decode()
    return value
