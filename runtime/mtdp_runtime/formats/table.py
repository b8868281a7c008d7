"""Parquet: a row for each tile, for pandas, polars, DuckDB or R.

Columns: `x`, `y` (level-0 pixels of the top left), `status`, `tissue_fraction`, `class` where classes were given,
`prob_<class>` of the heads, and `features`, a list of fixed size. What the file says of itself is in the schema's
metadata under `mtdp`, as JSON. Bad tiles keep their row, as NaN.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np

from mtdp_runtime.formats.wsinfer import probability_columns
from mtdp_runtime.store.reader import FeatureFile, open_features

_ROWS: Final = 4096


def write_parquet(h5: Path, target: Path) -> None:
    """Write the table; `pyarrow` must be installed (the extra `parquet`)."""
    import pyarrow
    from pyarrow import parquet

    with open_features(h5) as file:
        said = {"mtdp": json.dumps(dict(file.attrs)), "tiles": json.dumps(dict(file.tile_attrs))}
        schema = pyarrow.table(_columns(file, slice(0, 0))).schema.with_metadata(said)
        with parquet.ParquetWriter(target, schema) as writer:
            for start in range(0, len(file), _ROWS):
                part = slice(start, min(start + _ROWS, len(file)))
                writer.write_table(pyarrow.table(_columns(file, part), schema=schema))


def _columns(file: FeatureFile, part: slice) -> dict[str, Any]:
    import pyarrow

    columns: dict[str, Any] = {
        "x": file.coords[part, 0],
        "y": file.coords[part, 1],
        "status": file.status[part],
        "tissue_fraction": file.tissue_fraction[part],
    }
    if file.classes is not None:
        columns["class"] = pyarrow.array(file.classes[part], pyarrow.string())
    names, datasets = probability_columns(file)
    values = [dataset[part] for dataset in datasets]
    columns |= dict(zip(names, np.concatenate(values, axis=1).T if values else (), strict=True))
    rows = np.asarray(file.features[part], np.float32)
    flat = pyarrow.array(np.ascontiguousarray(rows).ravel(), pyarrow.float32())
    columns["features"] = pyarrow.FixedSizeListArray.from_arrays(flat, file.features.shape[1])
    return columns
