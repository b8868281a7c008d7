"""A SpatialData store as LazySlide and wsidata lay it out: the shapes `tiles` and `tissues`, and a table of features.

Level-0 pixels throughout. `attrs["tile_spec"]["tiles"]` says how the tiles were cut, and `attrs["slide_properties"]`
what the slide is. Bad tiles keep their row, as NaN, with their code in the table's `status`. The probabilities of a
head are the table's `obsm["probabilities_<task>"]`, a column for each class.
"""

from __future__ import annotations

import errno
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from mtdp_runtime.store.layout import PROBABILITIES
from mtdp_runtime.store.reader import PlacedMask, open_features
from mtdp_runtime.tiling.outlines import piece_of_tiles, pieces

_ROWS: Final = 4096


def write_zarr(h5: Path, target: Path) -> None:
    """Write the store; `spatialdata` must be installed (the extra `spatial`).

    Raises:
        OSError: the path is no UTF-8, which pyarrow does not write.
    """
    try:
        str(target).encode()
    except UnicodeEncodeError as error:
        raise OSError(errno.EILSEQ, "a name that is no UTF-8", str(target)) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries about themselves
        import dask
        import geopandas
        import pandas
        import spatialdata
        from anndata import AnnData
        from dask.array import from_array
        from shapely.geometry import box
        from spatialdata.models import ShapesModel, TableModel

        with open_features(h5) as file:
            coords, attrs, side = file.coords, dict(file.attrs), file.tile_side
            number = np.arange(len(coords))
            tissue = file.tissue or PlacedMask(np.zeros((1, 1), np.bool_), 1.0, 0, 0)
            labels, outlines = pieces(tissue)
            shapes, tables = {}, {}
            if len(coords):
                frame = geopandas.GeoDataFrame(
                    {
                        "tile_id": number,
                        "x": coords[:, 0],
                        "y": coords[:, 1],
                        "tissue_id": piece_of_tiles(labels, tissue, coords, side),
                        "tissue_fraction": file.tissue_fraction,
                    },
                    geometry=[box(x, y, x + side, y + side) for x, y in coords.tolist()],
                )
                shapes["tiles"] = ShapesModel.parse(frame)
                observed = pandas.DataFrame(
                    {
                        "tile_id": number,
                        "library_id": pandas.Categorical(["tiles"] * len(coords)),
                        "status": file.status,
                    },
                    index=[str(i) for i in number],
                )
                # Read while it is written, a part at a time: the features of a large slide have a gigabyte.
                features = from_array(  # type: ignore[no-untyped-call]
                    file.features, chunks=(_ROWS, -1), lock=True
                ).astype(np.float32)
                heads = {
                    f"{PROBABILITIES}{head.task}": pandas.DataFrame(
                        head.probabilities[:], index=observed.index, columns=list(head.class_names)
                    )
                    for head in file.heads
                }
                table = AnnData(X=features, obs=observed, obsm=heads)
                tables[table_name(attrs["model"])] = TableModel.parse(
                    table, region="tiles", region_key="library_id", instance_key="tile_id"
                )
            if outlines:
                found = geopandas.GeoDataFrame({"tissue_id": np.arange(len(outlines))}, geometry=outlines)
                shapes["tissues"] = ShapesModel.parse(found)
            data = spatialdata.SpatialData(shapes=shapes, tables=tables, attrs=_attrs(attrs, file.tile_attrs))
            with dask.config.set(num_workers=1):  # two parts share a chunk of the store, which has no lock
                data.write(target)


def table_name(model: str) -> str:
    """Return the name of a model's table; SpatialData allows letters, digits, `_`, `.` and `-`, and no leading `__`.

    >>> table_name("UNI 2: h+")
    'UNI_2__h__tiles'
    """
    name = "".join(letter if letter.isalnum() or letter in "_.-" else "_" for letter in model)
    return f"{name.lstrip('_') if name.startswith('__') else name}_tiles"


def _attrs(attrs: dict[str, Any], tile: Mapping[str, Any]) -> dict[str, Any]:
    grid = json.loads(attrs["grid"])
    stride = round(grid["step0"] / grid["scale"])
    width, height = int(tile["level0_width"]), int(tile["level0_height"])
    spec = {
        "height": int(tile["patch_size"]),
        "width": int(tile["patch_size"]),
        "stride_height": stride,
        "stride_width": stride,
        "mpp": attrs["mpp"],
        "ops_level": attrs["level"],
        "ops_downsample": attrs["scale"] / attrs["level_downsample"],
        "base_level": 0,
        "base_downsample": attrs["scale"],
        "tissue_name": "tissues",
    }
    slide = {
        "shape": [height, width],
        "n_level": 1,
        "level_shape": [[height, width]],
        "level_downsample": [1.0],
        "mpp": attrs["mpp_level0"],
        "magnification": None,
        "bounds": [0, 0, width, height],
    }
    return {"tile_spec": {"tiles": spec}, "slide_properties": slide, "mtdp": attrs}
