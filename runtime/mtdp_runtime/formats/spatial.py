"""A SpatialData store as LazySlide and wsidata lay it out: the shapes `tiles` and `tissues`, and a table of features.

Level-0 pixels throughout. `attrs["tile_spec"]["tiles"]` says how the tiles were cut, and `attrs["slide_properties"]`
what the slide is. Bad tiles keep their row, as NaN, with their code in the table's `status`.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mtdp_runtime.formats.pieces import PlacedMask, piece_of_tiles, pieces
from mtdp_runtime.store import MASK


def write_zarr(h5: Path, target: Path) -> None:
    """Write the store; `spatialdata` must be installed (the extra `spatial`)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries about themselves
        import geopandas
        import pandas
        import spatialdata
        from anndata import AnnData
        from shapely.geometry import box
        from spatialdata.models import ShapesModel, TableModel

        with h5py.File(h5, "r", locking=False) as file:
            coords, features = file["coords"][:], file["features"][:]
            status, fraction = file["status"][:], file["tissue_fraction"][:]
            attrs = {key: _plain(value) for key, value in file.attrs.items()}
            tile = {key: _plain(value) for key, value in file["coords"].attrs.items()}
            tissue = _tissue(file)
        side = int(tile["patch_size_level0"])
        number = np.arange(len(coords))
        labels, outlines = pieces(tissue)
        numbers = piece_of_tiles(labels, tissue, coords, side)
        frame = geopandas.GeoDataFrame(
            {
                "tile_id": number,
                "x": coords[:, 0],
                "y": coords[:, 1],
                "tissue_id": numbers,
                "tissue_fraction": fraction,
            },
            geometry=[box(x, y, x + side, y + side) for x, y in coords.tolist()],
        )
        shapes = {"tiles": ShapesModel.parse(frame)} if len(coords) else {}
        if outlines:
            found = geopandas.GeoDataFrame({"tissue_id": np.arange(len(outlines))}, geometry=outlines)
            shapes["tissues"] = ShapesModel.parse(found)
        tables = {}
        if len(coords):
            observed = pandas.DataFrame(
                {
                    "tile_id": number,
                    "library_id": pandas.Categorical(["tiles"] * len(coords)),
                    "status": status,
                },
                index=[str(i) for i in number],
            )
            table = AnnData(X=features, obs=observed)
            tables[f"{attrs['model']}_tiles"] = TableModel.parse(
                table, region="tiles", region_key="library_id", instance_key="tile_id"
            )
        data = spatialdata.SpatialData(shapes=shapes, tables=tables, attrs=_attrs(attrs, tile))
        data.write(target)


def _tissue(file: h5py.File) -> PlacedMask:
    """Return the mask that the tiles were chosen by; files of earlier versions, and empty slides, have none."""
    if MASK not in file:
        return PlacedMask(np.zeros((1, 1), np.bool_), 1.0, 0, 0)
    at = file[MASK].attrs
    return PlacedMask(file[MASK][:].astype(np.bool_), float(at["scale"]), float(at["x0"]), float(at["y0"]))


def _attrs(attrs: dict[str, Any], tile: dict[str, Any]) -> dict[str, Any]:
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


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
