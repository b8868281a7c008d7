"""NumPy's own format: features alone; the coordinates go beside them. Bad tiles keep their row, as NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import h5py
import numpy as np

_ROWS: Final = 4096


def write_npy(h5: Path, target: Path) -> None:
    """Write features, float32[N, D]."""
    _write(h5, "features", "<f4", target)


def write_coords(h5: Path, target: Path) -> None:
    """Write level-0 coordinates, int64[N, 2]."""
    _write(h5, "coords", "<i8", target)


def _write(h5: Path, name: str, dtype: str, target: Path) -> None:
    # Not through a memory map: on a disk that is full that ends the process (SIGBUS), where a write says so.
    with h5py.File(h5, "r", locking=False) as file, target.open("wb") as stream:
        dataset = file[name]
        header = {"descr": dtype, "fortran_order": False, "shape": dataset.shape}
        np.lib.format.write_array_header_1_0(stream, header)
        for start in range(0, len(dataset), _ROWS):
            stream.write(np.ascontiguousarray(dataset[start : start + _ROWS], dtype).tobytes())
