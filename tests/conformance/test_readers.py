"""Our files, as the libraries that others use read them: spatialdata, wsidata (LazySlide), geopandas."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from mtdp_runtime.formats import derive
from mtdp_runtime.formats.spatial import table_name
from mtdp_runtime.store.layout import Layout
from mtdp_runtime.store.writer import FeatureStore
from mtdp_runtime.tiling.outlines import PlacedMask, piece_of_tiles, pieces
from support import extract

READ = """
import sys, warnings
warnings.simplefilter("ignore")
import h5py, numpy as np, spatialdata
from wsidata import open_wsi
h5, store, slide = sys.argv[1:]
with h5py.File(h5, locking=False) as file:
    name = f"{file.attrs['model']}_tiles"
    features, coords, side = file["features"][:], file["coords"][:], file["coords"].attrs["patch_size_level0"]
    tile_px, mpp, mpp0 = file["coords"].attrs["patch_size"], file.attrs["mpp"], file.attrs["mpp_level0"]
data = spatialdata.read_zarr(store)
tiles, tissues, table = data.shapes["tiles"], data.shapes["tissues"], data.tables[name]
np.testing.assert_array_equal(np.asarray(table.X), features)
np.testing.assert_array_equal(tiles[["x", "y"]].to_numpy(), coords)
np.testing.assert_array_equal(tiles.geometry.bounds["maxx"] - tiles.geometry.bounds["minx"], side)
assert len(spatialdata.match_table_to_element(data, "tiles", table_name=name)) == len(coords)
assert tissues.geometry.is_valid.all()
of = dict(zip(tissues.tissue_id, tissues.geometry))
for number, tile in zip(tiles.tissue_id, tiles.geometry):
    mine = of[number].intersection(tile).area
    assert mine > 0
    assert all(mine >= other.intersection(tile).area - 1 for other in of.values())
wsi = open_wsi(slide, store=store)
spec = wsi.tile_spec("tiles")
assert (spec.height, spec.width, spec.mpp) == (tile_px, tile_px, mpp)
assert wsi.properties.mpp == mpp0
assert wsi.fetch.features_anndata(name.removesuffix("_tiles")).shape == features.shape
image = next(iter(wsi.iter.tile_images("tiles")))
assert image.image.shape == (tile_px, tile_px, 3)
print("tissues", len(tissues))
"""


def test_spatialdata_and_wsidata_read_the_store(tiny_bundle: Path, slides_dir: Path, tmp_path: Path) -> None:
    slide = slides_dir / "CMU-1-Small-Region.svs"
    done = extract(slide, "--model", tiny_bundle, "--out", tmp_path, "--format", "zarr")
    assert done.returncode == 0, done.stderr
    name = slide.stem
    files = [str(tmp_path / f"{name}.h5"), str(tmp_path / f"{name}.zarr"), str(slide)]
    read = subprocess.run([sys.executable, "-c", READ, *files], capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
    assert read.stdout.splitlines()[-1] == "tissues 1"


def test_geopandas_reads_the_geojson_as_the_tiles(tiny_bundle: Path, slides_dir: Path, tmp_path: Path) -> None:
    import geopandas

    slide = slides_dir / "CMU-1-Small-Region.svs"
    done = extract(slide, "--model", tiny_bundle, "--out", tmp_path, "--format", "geojson")
    assert done.returncode == 0, done.stderr
    frame = geopandas.read_file(tmp_path / "model-outputs-geojson" / f"{slide.stem}.geojson")
    frame = frame.set_crs(None, allow_override=True)  # pixels; GeoJSON means degrees
    assert frame.geometry.is_valid.all()
    assert (frame.objectType == "tile").all(), "what QuPath makes of them"
    with h5py.File(tmp_path / f"{slide.stem}.h5") as file:
        np.testing.assert_array_equal(frame.geometry.bounds[["minx", "miny"]].to_numpy(), file["coords"][:])
        np.testing.assert_array_equal(frame.geometry.area, file["coords"].attrs["patch_size_level0"] ** 2)


def test_a_slide_without_tissue_gives_a_store_that_opens(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    done = extract(make_slide(), "--model", tiny_bundle, "--out", tmp_path / "o", "--mpp", 20, "--format", "zarr")
    assert done.returncode == 0, done.stderr
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library about itself
        import spatialdata

        data = spatialdata.read_zarr(tmp_path / "o" / "slide.zarr")
    assert not data.tables
    assert "tiles" not in data.shapes


@pytest.mark.parametrize(("model", "dtype"), [("UNI 2: h+", "float32"), ("__x", "float32"), ("resnet50", "float16")])
def test_a_model_of_any_name_and_more_rows_than_are_held_at_once(tmp_path: Path, model: str, dtype: str) -> None:
    rows, rng = 9000, np.random.default_rng(0)
    grid = {"x0": 0, "y0": 0, "step0": 64.0, "scale": 1.0}
    root = {"model": model, "grid": grid, "mpp": 0.5, "mpp_level0": 0.5, "scale": 1.0, "level": 0}
    tile = {"patch_size": 64, "patch_size_level0": 64, "level0_width": 6400, "level0_height": 5760}
    coords = np.stack([np.tile(np.arange(100), 90), np.repeat(np.arange(90), 100)], axis=1) * 64
    features = rng.random((rows, 300), np.float32).astype(np.float16).astype(np.float32)
    fractions = np.ones(rows, np.float32)
    root["level_downsample"] = 1.0
    layout = Layout(coords, fractions, {"features": 300}, tile, root, {}, "r", features_dtype=dtype)
    with FeatureStore(tmp_path / "slide.h5", layout) as store:
        store.append({"features": features}, np.zeros(rows, np.uint8))
        store.finish({})
    derive(tmp_path / "slide.h5", tmp_path, ["zarr"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library about itself
        import spatialdata

        data = spatialdata.read_zarr(tmp_path / "slide.zarr")
    ((name, table),) = data.tables.items()
    assert name == table_name(model)
    assert data.attrs["mtdp"]["model"] == model
    assert table.X.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(table.X), features)
    assert not list(tmp_path.glob(".*"))


masks = arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 12)))


@given(masks, st.sampled_from([1.0, 16.0, 31.7]), st.integers(-50, 50))
def test_pieces_are_valid_apart_and_cover_the_mask(mask: NDArray[np.bool_], scale: float, x0: int) -> None:
    from shapely import Point

    labels, polygons = pieces(PlacedMask(mask, scale, x0, 7))
    count, _ = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    assert len(polygons) == count - 1 == labels.max()
    assert all(polygon.is_valid and polygon.geom_type == "Polygon" for polygon in polygons)
    assert sum(polygon.area for polygon in polygons) == pytest.approx(mask.sum() * scale**2)
    for (row, column), inside in np.ndenumerate(mask):
        centre = Point(x0 + (column + 0.5) * scale, 7 + (row + 0.5) * scale)
        holders = [number for number, polygon in enumerate(polygons) if polygon.contains(centre)]
        assert holders == ([labels[row, column] - 1] if inside else [])


def test_a_tile_belongs_to_the_piece_that_covers_most_of_it() -> None:
    mask = np.zeros((10, 10), np.bool_)
    mask[0:2, 0:3] = True
    mask[5:10, 0:10] = True
    placed = PlacedMask(mask, 10.0, 100, 200)
    labels, _ = pieces(placed)
    coords = np.array([[100, 200], [100, 210], [140, 200]], np.int64)
    assert piece_of_tiles(labels, placed, coords, 40).tolist() == [0, 0, -1]
    assert piece_of_tiles(labels, placed, coords, 60).tolist() == [0, 1, 1]


@pytest.mark.parametrize("bad", ["nan", "drop"])
def test_the_mask_is_stored_with_its_place(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path, bad: str
) -> None:
    done = extract(make_slide(), "--model", tiny_bundle, "--out", tmp_path / "o", "--on-bad-tile", bad)
    assert done.returncode == 0, done.stderr
    with h5py.File(tmp_path / "o" / "slide.h5") as file:
        mask, at = file["tissue_mask"], file["tissue_mask"].attrs
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {0, 1}
        height, width = mask.shape
        assert (width * at["scale"], height * at["scale"]) == pytest.approx((1024, 768), abs=at["scale"])
        assert at["scale"] * file.attrs["mpp_level0"] == pytest.approx(at["mpp"])
        assert mask[:].sum() * at["mpp"] ** 2 / 1e6 == pytest.approx(file.attrs["tissue_mm2"])
        side = file["coords"].attrs["patch_size_level0"] / at["scale"]
        for (x, y), fraction in zip(file["coords"][:20] / at["scale"], file["tissue_fraction"][:20], strict=True):
            inside = mask[round(y) : round(y + side), round(x) : round(x + side)]
            assert inside.mean() == pytest.approx(fraction, abs=0.02)
