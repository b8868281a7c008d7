"""NumPy's own format: features alone; the coordinates go beside them. Bad tiles keep their row, as NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from mtdp_runtime.store.reader import open_features

_ROWS: Final = 4096


def write_npy(h5: Path, target: Path) -> None:
    """Write features float32[N, D] to the target, and int64[N, 2] level-0 coordinates to NAME.coords.npy."""
    with open_features(h5) as file:
        features = file.features
        shape = features.shape
        if shape[0]:
            array = np.lib.format.open_memmap(target, "w+", np.dtype("<f4"), shape)
            for start in range(0, shape[0], _ROWS):
                array[start : start + _ROWS] = features[start : start + _ROWS]
            array.flush()
            del array
        else:  # a file of no bytes cannot be mapped
            np.save(target, np.empty(shape, np.float32), allow_pickle=False)
        # First of the two to get its final name: who finds the features finds their places.
        coords = target.with_name(f"{h5.stem}.coords.npy")
        partial = target.with_name(f".{h5.stem}.coords.partial.npy")
        np.save(partial, file.coords, allow_pickle=False)
        partial.replace(coords)
