"""The feature file: HDF5 whose layout is complete before the first row is computed.

The file is laid out whole in memory (`layout`), written, synced and closed to HDF5 for good. Rows then go straight to
their places in it, features first and `status` after they reached the disk; with each commit a checksum of all rows so
far (`progress`). A killed run leaves `.<name>.partial`. Who goes on begins a file of its own and copies the rows whose
checksum is right: so what a sleeper still writes goes to a file that nobody reads, and no damaged row is kept.

What the end of a run adds is changed in memory, too, and written, synced and read back before the rename.

After any write or sync that failed nothing more is written: a second sync may succeed though the first one's rows are
lost (the kernel reports an error once). What was committed before stays.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import h5py
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import ClaimLost, OutputUnwritable, StoreError
from mtdp_runtime.faults import capitalised, remedy
from mtdp_runtime.files import sync_folder
from mtdp_runtime.store import disk, resume
from mtdp_runtime.store.checksums import RowDigests
from mtdp_runtime.store.image import SparseImage
from mtdp_runtime.store.layout import COORDS, FEATURES, STATUS, TOKENS, Layout, TileStatus, complete, lay_out
from mtdp_runtime.store.progress import BYTES, Progress

_SYNC_EVERY_S: Final = 5.0
_RERUN: Final = "or choose another --out; a rerun continues where this one stopped."
_COPY_BYTES: Final = 1 << 20
_POOL_ROWS: Final = 1024
# What h5py raises on a file that is damaged or of another kind.
_NOT_OURS: Final = (OSError, KeyError, ValueError, TypeError, RuntimeError)


def partial_path(path: Path) -> Path:
    """Return where a feature file lies until it is finished."""
    return path.with_name(f".{path.name}.partial")


def differences(path: Path, made_of: Mapping[str, Any]) -> str:
    """Return what keeps a file from being the finished result of these facts; empty where nothing does.

    Opening counts, and the content: that a file is there says nothing.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            there = json.loads(file.attrs["made_of"])
            status = file[STATUS][:]
            complete = len(status) == len(file[FEATURES]) == len(file[COORDS])
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

    def __init__(self, path: Path, layout: Layout, fence: Callable[[], None] | None = None) -> None:
        """Begin a file, with the rows of a partial file that matches.

        Args:
            path: the finished file.
            layout: what it will hold.
            fence: called before each commit and before the file gets its name; raises ClaimLost where the slide is
                another process's by now.

        Raises:
            OutputUnwritable: the folder cannot be written, or the disk is full.
        """
        self.path = path
        self.partial = partial_path(path)
        self.rows_done = 0
        self._layout = layout
        self._fence = fence or (lambda: None)
        self._scratch = self.partial.with_name(f"{self.partial.name}.new")
        self._status = np.full(len(layout.coords), TileStatus.NOT_COMPUTED, np.uint8)
        self.tokens_lost = 0  # tiles of this run that are not GOOD for their patch tokens alone
        self._digests = RowDigests((*layout.shapes, STATUS))
        self._committed = 0
        self._spoilt = False  # nothing more is written, since something was not written or is no longer ours
        self._synced_s = time.monotonic()
        self._file = -1
        try:
            self._begin()
        except OSError as error:
            self._give_up_scratch()
            raise _unwritable(path, error) from error
        except BaseException:
            self._give_up_scratch()
            raise

    def _begin(self) -> None:
        image, self._places = lay_out(self._layout)
        key = resume.key_of(self._layout, self._places)
        hint = hashlib.sha256(self._layout.slide_hint.encode()).digest()[:8]
        done = _done_path(self.partial)
        if done.exists() and not self.partial.exists():
            done.replace(self.partial)  # a run was killed right before its end
        self._file = disk.own_file(self._scratch)
        disk.reserve(self._file, image.size_bytes + BYTES)
        for offset, data in image.extents():
            disk.write_at(self._file, data, offset)
        self._progress = Progress(self._file, image.size_bytes, key, hint)
        self._progress.begin()
        with suppress(FileNotFoundError):
            old = os.open(self.partial, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                taken = resume.take_rows(old, self._file, self._places, key, hint)
            finally:
                os.close(old)
            if taken is not None:
                self._digests, self.rows_done = taken.digests, len(taken.status)
                self._status[: self.rows_done] = taken.status
        os.fsync(self._file)
        if self.rows_done:
            self._mark()
            os.fsync(self._file)
        self._fence()
        disk.rename_own(self._file, self._scratch, self.partial)
        sync_folder(self.path.parent)

    def append(self, outputs: Mapping[str, NDArray[np.float32]], status: NDArray[np.uint8]) -> None:
        """Write the next rows.

        Args:
            outputs: float32[B, ...] for each output; rows whose status is not GOOD are stored as NaN.
            status: uint8[B], TileStatus; GOOD becomes NOT_FINITE where an output is not finite, or a patch token is
                beyond float16.

        Raises:
            OutputUnwritable: the disk is full or gone. What was committed is kept.
            ClaimLost: another process took the slide over.
            StoreError: a feature is too large for float16.
        """
        start = self.rows_done
        status = status.copy()
        given: dict[str, NDArray[Any]] = {}
        for name, shape in self._layout.shapes.items():  # tokens last
            with np.errstate(over="ignore"):  # a token that float16 does not hold is infinite here, and seen below
                values = np.array(outputs[name], np.float16 if name == TOKENS else np.float32)
            if values.shape != (len(status), *shape):  # it would be written over its neighbours
                raise StoreError(f"{self.path}: {name} has the shape {values.shape}, not {(len(status), *shape)}")
            finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
            lost = (status == TileStatus.GOOD) & ~finite
            status[lost] = TileStatus.NOT_FINITE
            self.tokens_lost += int(lost.sum()) if name == TOKENS else 0
            given[name] = values
        rows = {STATUS: status.tobytes()}
        for name, values in given.items():
            values[status != TileStatus.GOOD] = np.nan
            half = values.dtype == np.float32 and self._layout.dtype_of(name) == np.float16
            rows[name] = disk.rows_bytes(_half(values, self.path) if half else values)
        with self._trusted():
            for name in given:
                if len(status):
                    disk.write_rows(self._file, self._places[name], start, rows[name])
            for name, data in rows.items():
                self._digests.update(name, data)
            self._status[start : start + len(status)] = status
            self.rows_done += len(status)
            if time.monotonic() - self._synced_s > _SYNC_EVERY_S:
                self._commit()

    def finish(self, root_attrs: Mapping[str, Any], drop_bad: bool = False) -> None:
        """Commit all rows, add what only the end of a run knows, and give the file its name.

        Args:
            root_attrs: attributes of the file.
            drop_bad: leave out the rows whose status is not GOOD.

        Raises:
            OutputUnwritable: the disk is full or gone; the partial file stays.
            ClaimLost: another process took the slide over.
        """
        assert self.rows_done == len(self._layout.coords), (self.rows_done, len(self._layout.coords))
        with self._trusted():
            self._commit()
            if drop_bad:
                self._finish_good_rows(root_attrs)
            else:
                image, places = lay_out(self._layout)
                assert places == self._places, "HDF5 lays out the same file in the same way"
                complete(image, self._layout, self._status, root_attrs, self._digests.hex(), self._pooled())
                self._progress.move(max(image.size_bytes, os.fstat(self._file).st_size))
                os.fsync(self._file)
                self._write_structure(self._file, image, self._places)
                self._fence()
                done = _done_path(self.partial)
                disk.rename_own(self._file, self.partial, done)
                if not disk.is_own(self._file, done):  # it was replaced between the look and the rename
                    done.replace(self.partial)
                    raise ClaimLost(f"{self.partial}: another process has replaced it")
                done.replace(self.path)
                sync_folder(self.path.parent)
                with suppress(OSError):  # the file is whole; behind its end HDF5 does not look
                    os.ftruncate(self._file, image.size_bytes)
            self._spoilt = True  # nothing more to write

    def _finish_good_rows(self, root_attrs: Mapping[str, Any]) -> None:
        """Write a file of the GOOD rows only, under its final name at once."""
        good = self._status == TileStatus.GOOD
        whole = self._layout
        smaller = replace(
            whole,
            coords=whole.coords[good],
            tissue_fraction=whole.tissue_fraction[good],
            classes=None if whole.classes is None else whole.classes[good],
        )
        image, places = lay_out(smaller)
        target = disk.own_file(self._scratch)
        try:
            disk.reserve(target, image.size_bytes)
            digests = RowDigests(tuple(smaller.shapes))
            for name in smaller.shapes if good.any() else ():
                place, done = self._places[name], 0
                step = max(1, _COPY_BYTES // place.row_bytes)
                for start in range(0, len(good), step):
                    part = good[start : start + step]
                    data = np.frombuffer(disk.read_rows(self._file, place, start, len(part)), np.uint8)
                    kept = data.reshape(len(part), place.row_bytes)[part]
                    disk.write_rows(target, places[name], done, kept.tobytes())
                    digests.update(name, kept.tobytes())
                    done += len(kept)
            status = self._status[good]
            if len(status):
                disk.write_rows(target, places[STATUS], 0, status.tobytes())
            complete(image, smaller, status, root_attrs, digests.hex(), self._pooled())
            self._write_structure(target, image, places)
            self._fence()
            disk.rename_own(target, self._scratch, self.path)
            sync_folder(self.path.parent)
            if disk.is_own(self._file, self.partial):
                self.partial.unlink()
        finally:
            os.close(target)

    def _pooled(self) -> NDArray[np.float32] | None:
        """Return float32[D]: the mean of the rows that are good, as they are stored; NaN where none is.

        They are read back, block by block: a run that went on after a stop adds them up in the same order.
        """
        if not self._layout.pooled:
            return None
        place, good = self._places.get(FEATURES), self._status == TileStatus.GOOD
        total = np.zeros(self._layout.outputs[FEATURES], np.float64)
        for start in range(0, len(good), _POOL_ROWS):
            part = good[start : start + _POOL_ROWS]
            assert place is not None
            data = disk.read_rows(self._file, place, start, len(part))
            rows = np.frombuffer(data, self._layout.dtype_of(FEATURES)).reshape(len(part), -1)
            total += rows[part].sum(axis=0, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            mean: NDArray[np.float32] = (total / good.sum()).astype(np.float32)
        return mean

    def _write_structure(self, file: int, image: SparseImage, places: Mapping[str, disk.Place]) -> None:
        """Write all of a file but its rows; sync it, and read it back, the status of the rows included.

        Raises:
            OSError: what is there is not what was written.
        """
        for offset, length in image.outside([one for place in places.values() for one in place.ranges()]):
            disk.write_at(file, image.read_at(offset, length), offset)
        os.fsync(file)
        unknown = [one for name, place in places.items() if name != STATUS for one in place.ranges()]
        for offset, length in image.outside(unknown):
            if disk.read_at(file, length, offset) != image.read_at(offset, length):
                raise OSError(errno.EIO, "what was written there is not what is read there")

    def statuses(self) -> NDArray[np.uint8]:
        """Commit, and return uint8[N], TileStatus of every row: those of earlier runs included."""
        with self._trusted():
            self._commit()
        return self._status.copy()

    def discard(self) -> None:
        """Throw away what was written: nothing of it is worth going on with."""
        self._spoilt = True
        disk.unlink_own(self._file, self.partial)

    def close(self) -> None:
        if self._file < 0:
            return
        try:
            if not self._spoilt and self.partial.exists():
                with self._trusted():
                    self._commit()
        finally:
            file, self._file = self._file, -1
            with suppress(OSError):  # all that counts was synced before
                os.close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except (OutputUnwritable, StoreError):
            if error is None:
                raise

    @contextmanager
    def _trusted(self) -> Iterator[None]:
        """Whatever fails inside ends this store's writing: see the top of this module.

        Raises:
            OutputUnwritable: the disk is full or gone, now or before.
        """
        if self._spoilt:
            raise OutputUnwritable(
                f"{self.path}: cannot be written since an earlier error", hint=f"See that error, {_RERUN}"
            )
        self._spoilt = True
        try:
            yield
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self._spoilt = False

    def _commit(self) -> None:
        """Mark what was written, after it reached the disk."""
        self._fence()
        if self.rows_done > self._committed:
            os.fdatasync(self._file)
            self._mark()
        self._synced_s = time.monotonic()

    def _mark(self) -> None:
        """Say of the rows which are there: of all of them, since a mark may be lost as well as a row."""
        disk.write_rows(self._file, self._places[STATUS], 0, self._status[: self.rows_done].tobytes())
        self._progress.commit(self.rows_done, self._digests.joined())
        self._committed = self.rows_done

    def _give_up_scratch(self) -> None:
        if self._file >= 0:
            with suppress(OSError):
                disk.unlink_own(self._file, self._scratch)
            with suppress(OSError):
                os.close(self._file)
            self._file = -1


def _done_path(partial: Path) -> Path:
    """A file that is complete has this name for a moment, so that it can be looked at once more."""
    return partial.with_name(f"{partial.name}.done")


def _half(values: NDArray[Any], path: Path) -> NDArray[np.float16]:
    """Return rows of float32 as float16.

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
    for suffix in ("", ".new", ".done", ".undo", ".undo.new"):  # the last two are of version 1
        partial = partial_path(path)
        partial.with_name(f"{partial.name}{suffix}").unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> OutputUnwritable:
    detail = " ".join(str(error.strerror or error).split())
    return OutputUnwritable(f"{path}: cannot be written: {detail}", hint=f"{capitalised(remedy(error))}, {_RERUN}")
