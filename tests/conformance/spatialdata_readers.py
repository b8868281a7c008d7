"""Opens a `zarr` output with spatialdata, and with wsidata (LazySlide's reader) where a slide is named, too.

Not part of the test suite: the two bring more than a hundred packages. In an environment of their own:

    pip install 'mtdp[spatial]' wsidata
    python tests/conformance/spatialdata_readers.py features/slide.h5 slide.svs
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
import warnings
from pathlib import Path

import h5py
import numpy as np

from mtdp_runtime.formats.spatial import write_zarr


def main() -> None:
    warnings.simplefilter("ignore")
    import spatialdata

    h5 = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder, h5py.File(h5, locking=False) as file:
        store = Path(folder) / f"{h5.stem}.zarr"
        write_zarr(h5, store)
        data = spatialdata.read_zarr(store)
        table = data.tables[f"{file.attrs['model']}_tiles"]
        np.testing.assert_array_equal(np.asarray(table.X), file["features"][:])
        tiles = data.shapes["tiles"]
        np.testing.assert_array_equal(tiles[["x", "y"]].to_numpy(), file["coords"][:])
        side = file["coords"].attrs["patch_size_level0"]
        np.testing.assert_array_equal(tiles.geometry.bounds["maxx"] - tiles.geometry.bounds["minx"], side)
        assert table.uns["spatialdata_attrs"]["region"] == "tiles"
        assert data.attrs["tile_spec"]["tiles"]["mpp"] == file.attrs["mpp"]
        matched = spatialdata.match_table_to_element(data, "tiles", table_name=f"{file.attrs['model']}_tiles")
        assert len(matched) == len(file["coords"])
        print(f"spatialdata {importlib.metadata.version('spatialdata')}: {len(tiles)} tiles, {table.shape[1]} features")
        if len(sys.argv) < 3:
            return
        from wsidata import open_wsi

        opened = open_wsi(sys.argv[2], store=str(store))
        spec = opened.tile_spec("tiles")
        assert (spec.height, spec.mpp) == (file["coords"].attrs["patch_size"], file.attrs["mpp"])
        print(f"wsidata {importlib.metadata.version('wsidata')}: {spec}")


if __name__ == "__main__":
    main()
