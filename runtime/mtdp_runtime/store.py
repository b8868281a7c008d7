"""The feature file: HDF5 whose layout is complete before the first row is computed.

All datasets are created at their final size, with their space allocated, and the file is closed. Rows are then written
straight to their places in the file, features first and `status` after them, so the file is a valid HDF5 at every
moment: a killed run leaves `.<name>.partial`, in which the rows that are still `NOT_COMPUTED` say where to go on. The
attributes that only the end of a run knows change the file's structure; what they change is saved beside it first
(`.<name>.partial.undo`), and a run that was killed in between is undone by the next. The rename at the end is atomic.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import h5py
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import OutputUnwritable, StoreError

_CHUNK_BYTES: Final = 1 << 20
_SYNC_EVERY_S: Final = 5.0
MASK: Final = "tissue_mask"
# What h5py raises on a file that is damaged, of another kind, or on a disk that is full.
_NOT_OURS: Final = (OSError, KeyError, ValueError, TypeError, RuntimeError)
_HDF5_FAILED: Final = (OSError, RuntimeError)


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


def partial_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def fingerprint(made_of: Mapping[str, Any]) -> str:
    """Return the facts as 64 hex digits."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def differences(path: Path, made_of: Mapping[str, Any]) -> str:
    """Return what keeps a file from being the finished result of these facts; empty where nothing does.

    Opening counts, and the content: that a file is there says nothing.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            there = json.loads(file.attrs["made_of"])
            status = file["status"][:]
            complete = len(status) == len(file["features"]) == len(file["coords"])
    except _NOT_OURS:
        return "it cannot be read as a feature file of ours"
    if not complete or (status == TileStatus.NOT_COMPUTED).any():
        return "it is incomplete"
    now = json.loads(json.dumps(made_of))
    changed = [key for key in sorted({*there, *now}) if there.get(key) != now.get(key)]
    return "; ".join(f"{key} is {_short(there.get(key))} there, {_short(now.get(key))} now" for key in changed)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:16]}..."


class FeatureStore:
    """Rows written in order to a partial file; `finish` gives it its name.

    Leaving without `finish` keeps the partial for the next run.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        """Open a partial file that matches, or start a new one.

        Raises:
            OutputUnwritable: the folder cannot be written, or the disk is full.
        """
        self.path = path
        self.partial = partial_path(path)
        self._layout = layout
        self._undo = self.partial.with_name(f"{self.partial.name}.undo")
        try:
            _restore_structure(self.partial, self._undo)
            rows_done = _rows_done(self.partial, layout)
            if rows_done is None:
                _create(self.partial, layout)
                rows_done = 0
            self._places = _places(self.partial)
            self._file = os.open(self.partial, os.O_RDWR)
        except _HDF5_FAILED as error:
            raise _unwritable(path, error) from error
        self.rows_done = rows_done
        self._unmarked: list[tuple[int, NDArray[np.uint8]]] = []
        self._synced_s = time.monotonic()

    def append(self, outputs: Mapping[str, NDArray[np.float32]], status: NDArray[np.uint8]) -> None:
        """Write the next rows.

        Args:
            outputs: float32[B, columns] for each output; rows whose status is not GOOD are stored as NaN.
            status: uint8[B], TileStatus.

        Raises:
            OutputUnwritable: the disk is full or gone. What was committed is kept.
            StoreError: a feature is too large for float16.
        """
        start = self.rows_done
        status = status.copy()
        finite = np.isfinite(outputs["features"]).all(axis=1)
        status[(status == TileStatus.GOOD) & ~finite] = TileStatus.NOT_FINITE
        try:
            for name in self._layout.outputs:
                values = np.array(outputs[name], np.float32)
                values[status != TileStatus.GOOD] = np.nan
                if name == "features" and self._layout.features_dtype == "float16":
                    self._write(name, start, _half(values, self.path))
                else:
                    self._write(name, start, values)
            self._unmarked.append((start, status))
            self.rows_done += len(status)
            if time.monotonic() - self._synced_s > _SYNC_EVERY_S:
                self._commit()
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def finish(self, root_attrs: Mapping[str, Any], drop_bad: bool = False) -> None:
        """Commit all rows, add what only the end of a run knows, and give the file its name.

        Args:
            root_attrs: attributes of the file.
            drop_bad: leave out the rows whose status is not GOOD.

        Raises:
            OutputUnwritable: the disk is full or gone; the partial file stays.
        """
        assert self.rows_done == len(self._layout.coords), (self.rows_done, len(self._layout.coords))
        try:
            self._commit()
            self._refuse_anothers_file()
            rows = [self._places[name] for name in (*self._layout.outputs, "status") if name in self._places]
            _save_structure(self._file, self._undo, rows)
            with h5py.File(self.partial, "r+", locking=False) as file:
                file.attrs.update({key: _attribute(value) for key, value in root_attrs.items()})
            os.fsync(self._file)
            self._undo.unlink()
            if drop_bad:
                _copy_good_rows(self.partial, self.path)
                self.partial.unlink()
            else:
                self.partial.replace(self.path)
            _sync_folder(self.path.parent)
        except _HDF5_FAILED as error:
            raise _unwritable(self.path, error) from error

    def statuses(self) -> NDArray[np.uint8]:
        """Commit, and return uint8[N], TileStatus of every row: those of earlier runs included."""
        try:
            self._commit()
            with h5py.File(self.partial, "r", locking=False) as file:
                status: NDArray[np.uint8] = file["status"][:]
        except _HDF5_FAILED as error:
            raise _unwritable(self.path, error) from error
        return status

    def discard(self) -> None:
        """Throw away what was written: nothing of it is worth going on with."""
        self._unmarked = []
        remove_leftovers(self.path)

    def close(self) -> None:
        if self._file >= 0:
            try:
                if self.partial.exists():
                    self._commit()
            except OSError as error:
                raise _unwritable(self.path, error) from error
            finally:
                os.close(self._file)
                self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except OutputUnwritable:
            if error is None:
                raise

    def _refuse_anothers_file(self) -> None:
        """A process that slept past its claim may find that another one has begun this file anew."""
        if not os.path.samestat(os.fstat(self._file), self.partial.stat()):
            raise OSError(f"another process has replaced {self.partial.name}")

    def _write(self, name: str, start: int, rows: NDArray[Any]) -> None:
        """Write rows at their place, chunk by chunk."""
        offsets, rows_per_chunk, _ = self._places[name]
        row_bytes = rows.nbytes // max(1, len(rows))
        done = 0
        while done < len(rows):
            chunk, within = divmod(start + done, rows_per_chunk)
            count = min(rows_per_chunk - within, len(rows) - done)
            data = memoryview(np.ascontiguousarray(rows[done : done + count]).tobytes())
            place = offsets[chunk] + within * row_bytes
            while data:
                written = os.pwrite(self._file, data, place)
                data, place = data[written:], place + written
            done += count

    def _commit(self) -> None:
        """Mark what was written, after it reached the disk."""
        if self._unmarked:
            os.fdatasync(self._file)
            for start, status in self._unmarked:
                self._write("status", start, status)
            self._unmarked = []
        self._synced_s = time.monotonic()


def _half(values: NDArray[np.float32], path: Path) -> NDArray[np.float16]:
    """Return the rows as float16.

    Raises:
        StoreError: a number would become infinite: neither that nor the largest float16 is what the model said.
    """
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    beyond = np.isinf(half)
    if beyond.any():
        raise StoreError(
            f"{path}: a feature of {values[beyond][0]:.6g} is beyond float16 (65504)",
            hint="Store this model's features as float32.",
        )
    return half


def _create(partial: Path, layout: Layout) -> None:
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
            file[MASK].attrs.update({key: _attribute(value) for key, value in layout.mask_attrs.items()})
        file["coords"].attrs.update({key: _attribute(value) for key, value in layout.coords_attrs.items()})
        file["features"].attrs.update(
            {key: _attribute(value) for key, value in layout.coords_attrs.items() if key in ("name", "savetodir")}
        )
        file["features"].attrs["encoder"] = _attribute(layout.root_attrs["model"])
        for name, attrs in layout.outputs_attrs.items():
            file[name].attrs.update({key: _attribute(value) for key, value in attrs.items()})
        file.attrs.update({key: _attribute(value) for key, value in layout.root_attrs.items()})
        file.attrs["made_of"] = json.dumps(layout.made_of)
        file.attrs["fingerprint"] = fingerprint(layout.made_of)
        file.attrs["resume_key"] = layout.resume_key
    scratch.replace(partial)


def _copy_good_rows(partial: Path, path: Path) -> None:
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


def _places(partial: Path) -> dict[str, tuple[list[int], int, int]]:
    """Return for each dataset of rows where its chunks lie in the file, in order, the rows and the bytes of each."""
    places = {}
    with h5py.File(partial, "r", locking=False) as file:
        for name, dataset in file.items():
            if dataset.chunks is not None and name != MASK:
                infos = [dataset.id.get_chunk_info(i) for i in range(dataset.id.get_num_chunks())]
                by_row = sorted((info.chunk_offset[0], info.byte_offset) for info in infos)
                places[name] = ([offset for _, offset in by_row], dataset.chunks[0], infos[0].size)
    return places


def _save_structure(file: int, undo: Path, rows: list[tuple[list[int], int, int]]) -> None:
    """Write all of a file but its rows to `undo`: a line of JSON (size, ranges), then the bytes of the ranges."""
    size = os.fstat(file).st_size
    ranges, end = [], 0
    for start, length in sorted((offset, length) for offsets, _, length in rows for offset in offsets):
        ranges.append((end, start - end))
        end = start + length
    ranges.append((end, size - end))
    scratch = undo.with_name(f"{undo.name}.new")
    with scratch.open("wb") as stream:
        stream.write(json.dumps([size, ranges]).encode() + b"\n")
        for start, length in ranges:
            stream.write(os.pread(file, length, start))
        stream.flush()
        os.fsync(stream.fileno())
    scratch.replace(undo)
    _sync_folder(undo.parent)


def _restore_structure(partial: Path, undo: Path) -> None:
    """Undo the end of a run that was killed there. The rows are complete then, and stay."""
    if not undo.exists():
        return
    if partial.exists():
        with undo.open("rb") as stream, partial.open("r+b") as file:
            size, ranges = json.loads(stream.readline())
            for start, length in ranges:
                file.seek(start)
                file.write(stream.read(length))
            file.truncate(size)
            file.flush()
            os.fsync(file.fileno())
    undo.unlink()


def remove_leftovers(path: Path) -> None:
    """Remove what a run that was killed left beside a file that is now done, or given up."""
    for suffix in ("", ".new", ".undo", ".undo.new"):
        partial = partial_path(path)
        partial.with_name(f"{partial.name}{suffix}").unlink(missing_ok=True)


def _rows_done(partial: Path, layout: Layout) -> int | None:
    """Return how many rows of a partial file can be kept, or None where it is not this run's."""
    try:
        with h5py.File(partial, "r", locking=False) as file:
            if (
                file.attrs["fingerprint"] != fingerprint(layout.made_of)
                or file.attrs["resume_key"] != layout.resume_key
            ):
                return None
            if not np.array_equal(file["coords"][:], layout.coords):
                return None
            if any(file[name].shape != (len(layout.coords), columns) for name, columns in layout.outputs.items()):
                return None
            missing = np.flatnonzero(file["status"][:] == TileStatus.NOT_COMPUTED)
    except _NOT_OURS:
        return None
    return int(missing[0]) if len(missing) else len(layout.coords)


def _attribute(value: Any) -> Any:
    """Return what HDF5 can hold: TRIDENT's readers expect None as 'None' and a mapping as JSON."""
    if value is None:
        return "None"
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value)
    if isinstance(value, str):  # a file name may be no UTF-8
        return value.encode("utf-8", "backslashreplace").decode()
    return value


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path: Path, error: OSError | RuntimeError) -> OutputUnwritable:
    detail = " ".join((getattr(error, "strerror", None) or str(error)).split())
    return OutputUnwritable(
        f"{path}: cannot be written: {detail}",
        hint="Free space or choose another --out; a rerun goes on where this one stopped.",
    )
