"""NumPy's own format: features alone; the coordinates go beside them. Bad tiles keep their row, as NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np

from mtdp_runtime.store.reader import open_features

_ROWS: Final = 4096


def write_npy(h5: Path, target: Path) -> None:
    """Write features, float32[N, D]."""
    with open_features(h5) as file:
        _write(file.features, "<f4", target)


def write_coords(h5: Path, target: Path) -> None:
    """Write level-0 coordinates, int64[N, 2]."""
    with open_features(h5) as file:
        _write(file.coords, "<i8", target)


def _write(rows: Any, dtype: str, target: Path) -> None:
    # Not through a memory map: on a disk that is full that ends the process (SIGBUS), where a write says so.
    with target.open("wb") as stream:
        header = {"descr": dtype, "fortran_order": False, "shape": rows.shape}
        np.lib.format.write_array_header_1_0(stream, header)
        for start in range(0, len(rows), _ROWS):
            stream.write(np.ascontiguousarray(rows[start : start + _ROWS], dtype).tobytes())
