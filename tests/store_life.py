"""A store's life, small enough to try what happens when any of its calls to the file system fails."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import RuntimeFailure
from mtdp_runtime.store import writer
from mtdp_runtime.store.layout import Layout, TileStatus
from mtdp_runtime.store.verify import verify_file
from mtdp_runtime.store.writer import FeatureStore

ROWS, DIM, BATCH = 400, 700, 80  # chunks of 374 rows, so a batch crosses the end of one


def layout() -> Layout:
    coords = np.arange(2 * ROWS, dtype=np.int64).reshape(ROWS, 2)
    mask = np.arange(600).reshape(20, 30) % 7 == 0
    return Layout(
        coords,
        np.linspace(0, 1, ROWS, dtype=np.float32),
        {"features": DIM, "probabilities_x": 3},
        {"name": "s", "patch_size": 224},
        {"model": "m"},
        {"slide": "s"},
        "r",
        {"probabilities_x": {"class_names": ["a", "b", "c"]}},
        mask=mask,
        mask_attrs={"scale": 16.0, "x0": 0, "y0": 0},
    )


def rows() -> tuple[dict[str, NDArray[np.float32]], NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    values = {"features": rng.normal(size=(ROWS, DIM)), "probabilities_x": rng.random((ROWS, 3))}
    status = np.zeros(ROWS, np.uint8)
    status[[3, 200, 399]] = TileStatus.UNREADABLE
    return {name: one.astype(np.float32) for name, one in values.items()}, status


def live(path: Path, drop: bool = False) -> str:
    """Fill a file from where it stands and finish it, with a commit after each batch; return what it says."""
    writer._SYNC_EVERY_S = -1
    values, status = rows()
    try:
        with FeatureStore(path, layout()) as store:
            for start in range(store.rows_done, ROWS, BATCH):
                part = slice(start, start + BATCH)
                store.append({name: one[part] for name, one in values.items()}, status[part])
            store.finish({"bottleneck": "store"}, drop_bad=drop)
    except RuntimeFailure as error:
        return str(error)
    return ""


def problem(path: Path, drop: bool = False) -> str:
    """Return what is wrong with a finished file; it is compared with the numbers, not with another file."""
    values, status = rows()
    kept = status == 0 if drop else np.ones(ROWS, np.bool_)
    with h5py.File(path) as file:
        for name, one in values.items():
            expected = np.where((status == 0)[:, None], one, np.float32(np.nan))[kept]
            if file[name][:].tobytes() != expected.tobytes():
                return f"{name} differs"
        whole = layout()
        assert whole.mask is not None
        for name, array in (
            ("status", status[kept]),
            ("coords", whole.coords[kept]),
            ("tissue_fraction", whole.tissue_fraction[kept]),
            ("tissue_mask", whole.mask.astype(np.uint8)),
        ):
            if not np.array_equal(file[name][:], array):
                return f"{name} differs"
        if (file["coords"].attrs["patch_size"], file.attrs["bottleneck"]) != (224, "store"):
            return "attributes differ"
    return "; ".join(verify_file(path).problems)
