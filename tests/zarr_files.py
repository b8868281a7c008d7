"""OME-Zarr slides for the tests, written with zarr."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

AXES = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}


def half(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    cells = image.reshape(image.shape[0] // 2, 2, image.shape[1] // 2, 2, 3)
    return np.rint(cells.mean(axis=(1, 3))).astype(np.uint8)


def write_zarr(
    folder: Path,
    image: NDArray[Any],
    version: str = "0.4",
    axes: str = "tczyx",
    levels: int = 3,
    omero: dict[str, Any] | None = None,
    unit: str = "micrometer",
    mpp: float = 0.25,
    **how: Any,
) -> Path:
    """Write uint8[H, W, C] as multiscales of so many levels, in chunks of one colour and 128 px."""
    import zarr

    group = zarr.open_group(str(folder), mode="w", zarr_format=2 if version == "0.4" else 3)
    datasets = []
    for level in range(levels):
        data = image.transpose(2, 0, 1).reshape(
            [1 if name in "tz" else -1 for name in axes if name in "tz"] + [image.shape[2], *image.shape[:2]]
        )
        order = [name for name in "tz" if name in axes] + ["c", "y", "x"]
        data = data.transpose([order.index(name) for name in axes])
        chunks = tuple(128 if name in "yx" else 1 for name in axes)
        array = group.create_array(str(level), shape=data.shape, dtype=data.dtype, chunks=chunks, **how)
        array[...] = data
        scale = [mpp * 2**level if name in "yx" else 1.0 for name in axes]
        datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
        if level + 1 < levels:
            image = half(image)
    described = [{"name": name, "type": AXES[name], **({"unit": unit} if name in "yx" else {})} for name in axes]
    told: dict[str, Any] = {"multiscales": [{"version": version, "axes": described, "datasets": datasets}]}
    if omero is not None:
        told["omero"] = omero
    group.attrs.update(told if version == "0.4" else {"ome": {"version": version, **told}})
    return folder
