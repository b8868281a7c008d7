"""An AnnData of a slide (`.h5ad`), as scanpy, squidpy and TissUUmaps open it: an observation for each tile.

`obsm["X_<model>"]` are the features, `obsm["spatial"]` the centres of the tiles in level-0 pixels, as squidpy has them
of its spots; `obs` has `x`, `y` of their top left, `status`, `tissue_fraction`, and `class` where classes were given.
The probabilities of a head are `obsm["probabilities_<task>"]`; a slide's own vector is `uns["slide_features"]`, and
what the file says of itself `uns["mtdp"]`. Bad tiles keep their row, as NaN.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Final

import numpy as np

from mtdp_runtime.store.layout import PROBABILITIES
from mtdp_runtime.store.reader import open_features

_ROWS: Final = 4096


def write_h5ad(h5: Path, target: Path) -> None:
    """Write the AnnData; `anndata` must be installed (the extra `spatial`)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries about themselves
        import dask
        import pandas
        from anndata import AnnData
        from dask.array import from_array

        with open_features(h5) as file:
            observed = pandas.DataFrame(
                {
                    "x": file.coords[:, 0],
                    "y": file.coords[:, 1],
                    "status": file.status,
                    "tissue_fraction": file.tissue_fraction,
                },
                index=[str(i) for i in range(len(file))],
            )
            if file.classes is not None:
                observed["class"] = pandas.Categorical(file.classes)
            columns: dict[str, Any] = {"spatial": file.coords + file.tile_side / 2}
            # Read while it is written, a part at a time: the features of a large slide have a gigabyte.
            columns[features_name(str(file.attrs["model"]))] = (
                from_array(file.features, chunks=(_ROWS, -1), lock=True).astype(np.float32)  # type: ignore[no-untyped-call]
                if len(file)
                else np.empty(file.features.shape, np.float32)
            )
            for head in file.heads:
                columns[f"{PROBABILITIES}{head.task}"] = pandas.DataFrame(
                    head.probabilities[:], index=observed.index, columns=list(head.class_names)
                )
            said: dict[str, Any] = {"mtdp": dict(file.attrs)}
            if file.slide_features is not None:
                said["slide_features"] = file.slide_features
            with dask.config.set(scheduler="single-threaded"):
                AnnData(obs=observed, obsm=columns, uns=said).write_h5ad(target)


def features_name(model: str) -> str:
    """Return what a model's features are called; a slash would be a folder of the file.

    >>> features_name("owner/UNI 2")
    'X_owner_UNI 2'
    """
    return f"X_{model.replace('/', '_')}"
