"""The one door through which a finished feature file is read, and what each thing in it is called.

features                float32 or float16[N, D]   one row per tile
coords                  int64[N, 2]                level-0 x, y of each tile's top left; its attributes say more
status                  uint8[N]                   `TileStatus`
tissue_fraction         float32[N]                 the part of each tile that is tissue
probabilities_<task>    float32[N, C]              where the heads were stored
tokens                  float16[N, T, D]           where they were asked for: of the patches of each tile, row by row
class                   int16[N]                   where classes were given: a number of its `class_names`, or -1
slide_features          float32[D]                 where it was asked for: the mean of the rows that are good
tissue_mask             uint8[H, W]                where the tissue is; empty slides have none
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import StoreError
from mtdp_runtime.store.layout import (
    CLASS,
    COORDS,
    FEATURES,
    MASK,
    PROBABILITIES,
    SLIDE_FEATURES,
    STATUS,
    TISSUE_FRACTION,
    TOKENS,
    TileStatus,
)


@dataclass(frozen=True, slots=True)
class PlacedMask:
    """bool[H, W]; a pixel covers scale x scale level-0 pixels, the first at (x0, y0)."""

    mask: NDArray[np.bool_]
    scale: float
    x0: float
    y0: float


@dataclass(frozen=True, slots=True)
class StoredHead:
    """The probabilities of a task: float32[N, C], rows read when they are asked for."""

    task: str
    class_names: tuple[str, ...]
    probabilities: h5py.Dataset


class FeatureFile:
    """A feature file that is open. What is small is read whole, once; features row by row, as they are asked for."""

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self._file = file

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._file[COORDS])

    @property
    def features(self) -> h5py.Dataset:
        """float32 or float16[N, D]; NaN where the status is not GOOD."""
        return self._file[FEATURES]

    @property
    def tokens(self) -> h5py.Dataset | None:
        """float16[N, T, D]: a tile's patches, row by row from its top left; NaN where the status is not GOOD.

        Rows are read when they are asked for; None where none were stored.
        """
        return self._file.get(TOKENS)

    @cached_property
    def token_grid(self) -> tuple[int, int] | None:
        """Rows and columns of the patches; their product is T."""
        if TOKENS not in self._file:
            return None
        rows, columns = json.loads(self._file[TOKENS].attrs["grid"])
        return int(rows), int(columns)

    @cached_property
    def coords(self) -> NDArray[np.int64]:
        """int64[N, 2]: level-0 x, y of each tile's top left."""
        return np.asarray(self._file[COORDS][:])

    @cached_property
    def status(self) -> NDArray[np.uint8]:
        """uint8[N]: `TileStatus`."""
        return np.asarray(self._file[STATUS][:])

    @property
    def good(self) -> NDArray[np.bool_]:
        """bool[N]: which rows are features of a tile."""
        return np.asarray(self.status == TileStatus.GOOD)

    @cached_property
    def tissue_fraction(self) -> NDArray[np.float32]:
        """float32[N]: the part of each tile that is tissue."""
        return np.asarray(self._file[TISSUE_FRACTION][:])

    @cached_property
    def attrs(self) -> Mapping[str, Any]:
        """What the file says of itself, as Python's own values."""
        return _plain(self._file.attrs)

    @cached_property
    def tile_attrs(self) -> Mapping[str, Any]:
        """What it says of its tiles, by TRIDENT's names."""
        return _plain(self._file[COORDS].attrs)

    @property
    def tile_side(self) -> int:
        """Side of a tile in level-0 pixels."""
        return int(self.tile_attrs["patch_size_level0"])

    def fact(self, name: str) -> Any:
        """Return an attribute that the file keeps as JSON: `grid`, `timing`, `made_of`, ...; None where it has none."""
        return json.loads(self.attrs[name]) if name in self.attrs else None

    @cached_property
    def heads(self) -> tuple[StoredHead, ...]:
        """The probabilities of each task, in the order of their names."""
        names = sorted(name for name in self._file if name.startswith(PROBABILITIES))
        return tuple(
            StoredHead(
                name.removeprefix(PROBABILITIES),
                tuple(json.loads(self._file[name].attrs["class_names"])),
                self._file[name],
            )
            for name in names
        )

    @cached_property
    def classes(self) -> tuple[str, ...] | None:
        """The name of each tile's class, empty where it has none; None where no classes were given."""
        if CLASS not in self._file:
            return None
        names = (*json.loads(self._file[CLASS].attrs["class_names"]), "")  # -1 is the last
        return tuple(names[number] for number in self._file[CLASS][:].tolist())

    @cached_property
    def slide_features(self) -> NDArray[np.float32] | None:
        """float32[D]: the mean of the good rows; None where none was asked for."""
        return np.asarray(self._file[SLIDE_FEATURES][:]) if SLIDE_FEATURES in self._file else None

    @cached_property
    def tissue(self) -> PlacedMask | None:
        """The mask that the tiles were chosen by; None in files of earlier versions and of empty slides."""
        if MASK not in self._file:
            return None
        dataset = self._file[MASK]
        at = _plain(dataset.attrs)
        return PlacedMask(dataset[:].astype(np.bool_), float(at["scale"]), float(at["x0"]), float(at["y0"]))


@contextmanager
def open_features(path: Path) -> Iterator[FeatureFile]:
    """Open a feature file that is finished, or whose rows are all there.

    Raises:
        StoreError: it cannot be read as a feature file.
    """
    try:
        file = h5py.File(path, "r", locking=False)
    except (OSError, RuntimeError) as error:
        raise _unreadable(path, " ".join((getattr(error, "strerror", None) or str(error)).split())) from error
    with file:
        missing = [name for name in (FEATURES, COORDS, STATUS) if name not in file]
        if missing:
            raise _unreadable(path, f"it has no {' and no '.join(missing)}")
        yield FeatureFile(path, file)


def _unreadable(path: Path, detail: str) -> StoreError:
    return StoreError(
        f"{path}: cannot be read as a feature file: {detail}", hint="Delete it, and run the same command again."
    )


def _plain(attrs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in attrs.items()}
