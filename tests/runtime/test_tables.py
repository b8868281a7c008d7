"""Feature files as AnnData and Parquet read them, and the vector of a slide."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

import mtdp_runtime
from mtdp_runtime.formats import derive
from mtdp_runtime.store.layout import Layout, TileStatus
from mtdp_runtime.store.reader import open_features
from mtdp_runtime.store.verify import verify_folder
from mtdp_runtime.store.writer import FeatureStore
from support import damage_tile

DIM = 5


def make(folder: Path, rows: int, classes: bool = True) -> tuple[Path, NDArray[np.float32]]:
    """A finished file with a head and classes, whose third tile could not be read."""
    rng = np.random.default_rng(0)
    layout = Layout(
        rng.integers(0, 9000, (rows, 2)),
        rng.random(rows, np.float32),
        {"features": DIM, "probabilities_blood": 2},
        {"patch_size": 224, "patch_size_level0": 448},
        {"model": "lab/UNI 2", "grid": {"x0": 0, "y0": 0}},
        {"model": "m"},
        "r",
        {"probabilities_blood": {"class_names": ["rbc", "wbc"]}},
        classes=rng.integers(-1, 2, rows).astype(np.int16) if classes else None,
        class_names=("Tumor", "Stroma") if classes else (),
        pooled=True,
    )
    values = {name: rng.random((rows, columns), np.float32) for name, columns in layout.outputs.items()}
    status = np.array([TileStatus.UNREADABLE if i == 2 else TileStatus.GOOD for i in range(rows)], np.uint8)
    with FeatureStore(folder / "slide.h5", layout) as store:
        if rows:
            store.append(values, status)
        store.finish({})
    return folder / "slide.h5", values["features"]


@pytest.mark.parametrize("rows", [0, 1, 7, 5000])
def test_anndata_reads_features_places_and_classes(tmp_path: Path, rows: int) -> None:
    pytest.importorskip("anndata")
    h5, features = make(tmp_path, rows)
    derive(h5, tmp_path, ["h5ad"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library about itself
        import anndata

        data = anndata.read_h5ad(tmp_path / "h5ad/slide.h5ad")
    features[2:3] = np.nan
    np.testing.assert_array_equal(data.obsm["X_lab_UNI 2"], features)
    with open_features(h5) as file:
        np.testing.assert_array_equal(data.obsm["spatial"], file.coords + 224.0)
        np.testing.assert_array_equal(data.obs[["x", "y"]].to_numpy(), file.coords)
        np.testing.assert_array_equal(data.obs["status"], file.status)
        assert data.obs["class"].tolist() == list(file.classes or ())
        np.testing.assert_array_equal(data.uns["slide_features"], file.slide_features)
        np.testing.assert_array_equal(data.obsm["probabilities_blood"].to_numpy(), file.heads[0].probabilities[:])
    assert data.uns["mtdp"]["model"] == "lab/UNI 2"
    assert [verdict.derived for verdict in verify_folder(tmp_path)] == [("h5ad",)]


@pytest.mark.parametrize("rows", [0, 1, 7, 5000])
def test_parquet_holds_a_row_for_each_tile(tmp_path: Path, rows: int) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    h5, features = make(tmp_path, rows)
    derive(h5, tmp_path, ["parquet"])
    table = parquet.read_table(tmp_path / "parquet/slide.parquet")
    features[2:3] = np.nan
    assert table.column_names == [
        "x", "y", "status", "tissue_fraction", "class", "prob_rbc", "prob_wbc", "features"
    ]  # fmt: skip
    stored = np.array(table["features"].to_pylist(), np.float32).reshape(rows, DIM)
    np.testing.assert_array_equal(stored, features)
    with open_features(h5) as file:
        np.testing.assert_array_equal(np.stack([table["x"], table["y"]], axis=1), file.coords)
        assert table["class"].to_pylist() == list(file.classes or ())
        np.testing.assert_array_equal(table["prob_wbc"], file.heads[0].probabilities[:, 1])
    assert json.loads(table.schema.metadata[b"mtdp"])["model"] == "lab/UNI 2"
    assert [verdict.status for verdict in verify_folder(tmp_path)] == ["ok"]


@pytest.mark.parametrize("name", ["h5ad", "parquet"])
def test_the_same_features_make_the_same_bytes(tmp_path: Path, name: str) -> None:
    pytest.importorskip({"h5ad": "anndata", "parquet": "pyarrow"}[name])
    h5, _ = make(tmp_path, 7)
    path = tmp_path / name / f"slide.{name}"
    derive(h5, tmp_path, [name])
    first = path.read_bytes()
    path.unlink()
    derive(h5, tmp_path, [name])
    assert path.read_bytes() == first


def test_a_table_without_classes_has_no_such_column(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    h5, _ = make(tmp_path, 3, classes=False)
    derive(h5, tmp_path, ["parquet"])
    assert "class" not in parquet.read_table(tmp_path / "parquet/slide.parquet").column_names


class TestTheVectorOfASlide:
    def stored(self, path: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        with h5py.File(path) as file:
            return file["slide_features"][:], file["features"][:][file["status"][:] == 0]

    @pytest.mark.parametrize("bad", ["nan", "drop"])
    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_it_is_the_mean_of_the_good_rows_as_they_are_stored(
        self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path, bad: str, dtype: str
    ) -> None:
        slide = make_slide(lossy=True)
        damage_tile(slide, 11)
        arguments: dict[str, Any] = {"pool": "mean", "on_bad_tile": bad, "features_dtype": dtype}
        (outcome,) = mtdp_runtime.extract(slide, tmp_path, model=tiny_bundle, backend="onnxruntime", **arguments)
        assert outcome.bad_tiles > 0
        vector, rows = self.stored(tmp_path / "slide.h5")
        assert vector.dtype == np.float32
        np.testing.assert_allclose(vector, rows.astype(np.float64).mean(axis=0), rtol=1e-6)
        assert [verdict.status for verdict in verify_folder(tmp_path)] == ["ok"]

    def test_a_slide_of_no_tiles_has_none(self, tmp_path: Path) -> None:
        make(tmp_path, 0)
        vector, _ = self.stored(tmp_path / "slide.h5")
        assert np.isnan(vector).all()

    def test_it_is_in_the_fingerprint_only_where_it_is_asked_for(
        self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
    ) -> None:
        slide = make_slide()
        (first,) = mtdp_runtime.extract(slide, tmp_path, model=tiny_bundle)
        with h5py.File(tmp_path / "slide.h5") as file:
            assert "pool" not in json.loads(file.attrs["made_of"])
            assert "slide_features" not in file
        (second,) = mtdp_runtime.extract(slide, tmp_path, model=tiny_bundle, pool="mean")
        assert (first.status, second.status) == ("done", "failed")
        assert "pool is None there, mean now" in second.message
