"""A feature file before its first row: HDF5 whose datasets have their final size, and their space in the file.

So the place of every row is known, and rows are written there while the file is closed to HDF5.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
from numpy.typing import NDArray

MASK: Final = "tissue_mask"
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


def fingerprint(made_of: Mapping[str, Any]) -> str:
    """Return the facts as 64 hex digits."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def create_file(partial: Path, layout: Layout) -> None:
    """Write a file in which no row is computed yet, under its name at once."""
    rows = len(layout.coords)
    scratch = partial.with_name(f"{partial.name}.new")
    with h5py.File(scratch, "w", libver=("earliest", "v110"), locking=False) as file:
        for name, columns in layout.outputs.items():
            half = name == "features" and layout.features_dtype == "float16"
            _dataset(file, name, (rows, columns), np.dtype("<f2" if half else "<f4"))
        _dataset(file, "status", (rows,), np.dtype("u1"))
        file["status"][...] = TileStatus.NOT_COMPUTED
        file.create_dataset("coords", data=layout.coords)
        file.create_dataset("tissue_fraction", data=layout.tissue_fraction)
        if layout.mask is not None and layout.mask.size:
            mask = layout.mask.view(np.uint8)
            file.create_dataset(MASK, data=mask, chunks=mask.shape, compression="gzip", compression_opts=1)
            file[MASK].attrs.update({key: attribute(value) for key, value in layout.mask_attrs.items()})
        file["coords"].attrs.update({key: attribute(value) for key, value in layout.coords_attrs.items()})
        file["features"].attrs.update(
            {key: attribute(value) for key, value in layout.coords_attrs.items() if key in ("name", "savetodir")}
        )
        file["features"].attrs["encoder"] = attribute(layout.root_attrs["model"])
        for name, attrs in layout.outputs_attrs.items():
            file[name].attrs.update({key: attribute(value) for key, value in attrs.items()})
        file.attrs.update({key: attribute(value) for key, value in layout.root_attrs.items()})
        file.attrs["made_of"] = json.dumps(layout.made_of)
        file.attrs["fingerprint"] = fingerprint(layout.made_of)
        file.attrs["resume_key"] = layout.resume_key
    scratch.replace(partial)


def copy_good_rows(partial: Path, path: Path) -> None:
    """Write a file of the GOOD rows only, under its final name at once."""
    scratch = partial.with_name(f"{partial.name}.new")
    with h5py.File(partial, "r", locking=False) as source, h5py.File(scratch, "w", locking=False) as target:
        good = source["status"][:] == TileStatus.GOOD
        for name, dataset in source.items():
            if name == MASK:
                source.copy(dataset, target)
                continue
            shape = (int(good.sum()), *dataset.shape[1:])
            _dataset(target, name, shape, dataset.dtype)
            step = max(1, _CHUNK_BYTES // max(1, dataset.dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))))
            row = 0
            for start in range(0, len(good), step):
                rows = dataset[start : start + step][good[start : start + step]]
                target[name][row : row + len(rows)] = rows
                row += len(rows)
            target[name].attrs.update(dataset.attrs)
        target.attrs.update(source.attrs)
        target.flush()
    with scratch.open("rb") as stream:
        os.fsync(stream.fileno())
    scratch.replace(path)


def _dataset(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Create a dataset with its space allocated: chunks of about 1 MiB, contiguous where it has no rows."""
    row_bytes = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    if shape[0]:
        plist.set_chunk((max(1, min(shape[0], _CHUNK_BYTES // row_bytes)), *shape[1:]))
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_ALLOC)
    space = h5py.h5s.create_simple(shape)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(dtype), space, plist)


def places_of(partial: Path) -> dict[str, tuple[list[int], int, int]]:
    """Return for each dataset of rows where its chunks lie in the file, in order, the rows and the bytes of each."""
    places = {}
    with h5py.File(partial, "r", locking=False) as file:
        for name, dataset in file.items():
            if dataset.chunks is not None and name != MASK:
                infos = [dataset.id.get_chunk_info(i) for i in range(dataset.id.get_num_chunks())]
                by_row = sorted((info.chunk_offset[0], info.byte_offset) for info in infos)
                places[name] = ([offset for _, offset in by_row], dataset.chunks[0], infos[0].size)
    return places


def attribute(value: Any) -> Any:
    """Return what HDF5 can hold: TRIDENT's readers expect None as 'None' and a mapping as JSON."""
    if value is None:
        return "None"
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value)
    if isinstance(value, str):  # a file name may be no UTF-8
        return value.encode("utf-8", "backslashreplace").decode()
    return value
