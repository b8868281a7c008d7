"""The feature file: HDF5 whose layout is complete before the first row is computed.

The file is laid out whole (`layout`) and closed. Rows are then written straight to their places in it, features first
and `status` after them, so it is a valid HDF5 at every moment: a killed run leaves `.<name>.partial`, in which the rows
that are still `NOT_COMPUTED` say where to go on. What the end of a run changes is saved first (`journal`); the rename
after it is atomic.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import h5py
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import OutputUnwritable, StoreError
from mtdp_runtime.store.journal import restore_structure, save_structure, sync_folder
from mtdp_runtime.store.layout import Layout, TileStatus, attribute, copy_good_rows, create_file, fingerprint, places_of

_SYNC_EVERY_S: Final = 5.0
# What h5py raises on a file that is damaged, of another kind, or on a disk that is full.
_NOT_OURS: Final = (OSError, KeyError, ValueError, TypeError, RuntimeError)
_HDF5_FAILED: Final = (OSError, RuntimeError)


def partial_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


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
            restore_structure(self.partial, self._undo)
            rows_done = _rows_done(self.partial, layout)
            if rows_done is None:
                create_file(self.partial, layout)
                rows_done = 0
            self._places = places_of(self.partial)
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
            save_structure(self._file, self._undo, rows)
            with h5py.File(self.partial, "r+", locking=False) as file:
                file.attrs.update({key: attribute(value) for key, value in root_attrs.items()})
            os.fsync(self._file)
            self._undo.unlink()
            if drop_bad:
                copy_good_rows(self.partial, self.path)
                self.partial.unlink()
            else:
                self.partial.replace(self.path)
            sync_folder(self.path.parent)
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


def _unwritable(path: Path, error: OSError | RuntimeError) -> OutputUnwritable:
    detail = " ".join((getattr(error, "strerror", None) or str(error)).split())
    return OutputUnwritable(
        f"{path}: cannot be written: {detail}",
        hint="Free space or choose another --out; a rerun goes on where this one stopped.",
    )
