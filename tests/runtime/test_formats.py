"""Feature files as CLAM, WSInfer, QuPath and NumPy read them."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mtdp_runtime.errors import OutputUnwritable, UsageError
from mtdp_runtime.formats import FORMATS, check_formats, derive, derived_path
from mtdp_runtime.store.layout import Layout, TileStatus
from mtdp_runtime.store.writer import FeatureStore
from mtdp_runtime.tiling.given_mask import check_fits, coverage, load_mask
from support import info_of

HERE = ("pt", "npy", "csv", "geojson")  # zarr needs spatialdata: tests/conformance
ROWS, DIM = 6, 5


def make(
    folder: Path, rows: int = ROWS, heads: bool = True, corner: tuple[int, int] = (0, 0), dtype: str = "float32"
) -> tuple[Path, NDArray[np.float32]]:
    """A finished feature file whose third tile could not be read."""
    coords = np.array([[448 * i, 100 + i] for i in range(rows)], np.int64).reshape(rows, 2) + corner
    outputs = {"features": DIM} | ({"probabilities_blood": 2} if heads else {})
    attrs = {"patch_size": 224, "patch_size_level0": 448, "level0_width": 5000, "level0_height": 4000}
    layout = Layout(
        coords,
        np.full(rows, 0.5, np.float32),
        outputs,
        attrs,
        {"model": "tiny", "grid": {"x0": corner[0], "y0": corner[1]}},
        {"model": "m"},
        "r",
        {"probabilities_blood": {"class_names": ["rbc", "wbc"]}} if heads else {},
        features_dtype=dtype,
    )
    rng = np.random.default_rng(0)
    values = {name: rng.random((rows, columns), np.float32) for name, columns in outputs.items()}
    status = np.array([TileStatus.UNREADABLE if i == 2 else TileStatus.GOOD for i in range(rows)], np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    with FeatureStore(folder / "slide.h5", layout) as store:
        if rows:
            store.append(values, status)
        store.finish({})
    return folder / "slide.h5", values["features"]


def test_torch_reads_the_bag_without_being_asked_to_trust_it(tmp_path: Path) -> None:
    h5, features = make(tmp_path)
    derive(h5, tmp_path, ["pt"])
    bag = torch.load(tmp_path / "pt_files/slide.pt", weights_only=True)
    assert bag.dtype == torch.float32
    assert not bag.requires_grad
    np.testing.assert_array_equal(bag.numpy(), np.delete(features, 2, axis=0))  # CLAM knows no bad tiles
    assert (bag.clone() @ torch.ones(DIM)).shape == (ROWS - 1,), "it is a tensor like any other"


def test_derived_files_of_halves_are_float32_as_their_readers_expect(tmp_path: Path) -> None:
    h5, features = make(tmp_path, heads=False, dtype="float16")
    derive(h5, tmp_path, HERE)
    expected = features.astype(np.float16).astype(np.float32)
    bag, array = torch.load(tmp_path / "pt_files/slide.pt", weights_only=True), np.load(tmp_path / "npy/slide.npy")
    assert (bag.dtype, array.dtype) == (torch.float32, np.float32)
    np.testing.assert_array_equal(bag.numpy(), np.delete(expected, 2, axis=0))
    np.testing.assert_array_equal(np.delete(array, 2, 0), np.delete(expected, 2, 0))
    with (tmp_path / "model-outputs-csv/slide.csv").open(newline="") as stream:
        np.testing.assert_allclose([float(v) for v in list(csv.reader(stream))[1][4:]], expected[0], rtol=1e-6)


@pytest.mark.parametrize("rows", [0, 1, 200])
def test_bags_of_any_size(tmp_path: Path, rows: int) -> None:
    h5, _ = make(tmp_path, rows)
    derive(h5, tmp_path, ["pt"])
    assert torch.load(tmp_path / "pt_files/slide.pt", weights_only=True).shape == (rows - (rows > 2), DIM)


def test_npy_keeps_the_rows_of_the_coordinates(tmp_path: Path) -> None:
    h5, features = make(tmp_path)
    derive(h5, tmp_path, ["npy"])
    got, coords = np.load(tmp_path / "npy/slide.npy"), np.load(tmp_path / "npy/slide.coords.npy")
    assert np.isnan(got[2]).all()
    np.testing.assert_array_equal(np.delete(got, 2, 0), np.delete(features, 2, 0))
    with h5py.File(h5) as file:
        np.testing.assert_array_equal(coords, file["coords"][:])


def test_csv_has_wsinfers_columns(tmp_path: Path) -> None:
    h5, _ = make(tmp_path)
    derive(h5, tmp_path, ["csv"])
    with (tmp_path / "model-outputs-csv/slide.csv").open(newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["minx", "miny", "width", "height", "prob_rbc", "prob_wbc"]
    assert rows[1][:4] == ["448", "101", "448", "448"]
    assert rows[2][4:] == ["", ""]
    with h5py.File(h5) as file:
        np.testing.assert_allclose([float(v) for v in rows[5][4:]], file["probabilities_blood"][5], rtol=1e-6)


def test_without_heads_csv_has_the_features(tmp_path: Path) -> None:
    h5, features = make(tmp_path, heads=False)
    derive(h5, tmp_path, ["csv", "geojson"])
    with (tmp_path / "model-outputs-csv/slide.csv").open(newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header[4:] == [f"feature_{i}" for i in range(DIM)]
    np.testing.assert_allclose([float(v) for v in rows[0][4:]], features[0], rtol=1e-6)
    tile = json.loads((tmp_path / "model-outputs-geojson/slide.geojson").read_text())["features"][0]
    assert tile["properties"]["measurements"] == {"tissue_fraction": 0.5}


def test_geojson_is_wsinfers_and_qupaths(tmp_path: Path) -> None:
    h5, _ = make(tmp_path)
    derive(h5, tmp_path, ["geojson"])
    document = json.loads((tmp_path / "model-outputs-geojson/slide.geojson").read_text())
    assert set(document) == {"type", "features"}, "no coordinate system: level-0 pixels are not on Earth"
    first, bad = document["features"][0], document["features"][2]
    assert first["geometry"]["coordinates"] == [[[448, 100], [448, 548], [0, 548], [0, 100], [448, 100]]]
    assert first["properties"]["objectType"] == "tile"
    assert first["properties"]["isLocked"] is True
    assert set(first["properties"]["measurements"]) == {"prob_rbc", "prob_wbc"}
    assert bad["properties"]["measurements"] == {}
    assert bad["properties"]["name"] == "unreadable"
    assert len({tile["id"] for tile in document["features"]}) == ROWS


def test_geojson_counts_from_the_scanned_corner_as_qupath_and_a_given_mask_do(tmp_path: Path) -> None:
    h5, _ = make(tmp_path, corner=(2000, 1000))
    derive(h5, tmp_path, ["geojson", "csv"])
    path = tmp_path / "model-outputs-geojson/slide.geojson"
    ring = json.loads(path.read_text())["features"][0]["geometry"]["coordinates"][0]
    assert ring == [[448, 100], [448, 548], [0, 548], [0, 100], [448, 100]]
    with (tmp_path / "model-outputs-csv/slide.csv").open(newline="") as stream:
        assert list(csv.reader(stream))[1][:2] == ["2000", "1100"], "WSInfer's own code counts from level 0"
    info, mask = info_of(9000, 9000, 0.5, bounds=(2000, 1000, 4480, 4480)), load_mask(path)
    check_fits(mask, info)
    covered = coverage(mask, info, 16.0, 280, 280)
    assert covered[10:30, 1:27].min() == 1, "given back as a mask, the tiles lie where they were"
    assert covered[:6].max() == 0
    assert covered[40:].max() == 0


@pytest.mark.parametrize("name", HERE)
def test_a_slide_without_tissue_has_valid_empty_files(tmp_path: Path, name: str) -> None:
    h5, _ = make(tmp_path, rows=0)
    (path,) = derive(h5, tmp_path, [name])
    if name == "npy":
        assert np.load(path).shape == (0, DIM)
    elif name == "geojson":
        assert json.loads(path.read_text())["features"] == []
    elif name == "csv":
        assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize("name", HERE)
def test_what_is_there_is_left_and_what_is_stale_is_made_anew(tmp_path: Path, name: str) -> None:
    h5, _ = make(tmp_path)
    (path,) = derive(h5, tmp_path, [name])
    content = path.read_bytes()
    assert derive(h5, tmp_path, [name]) == []
    later = path.stat().st_mtime_ns + 10**9
    os.utime(h5, ns=(later, later))
    assert derive(h5, tmp_path, [name]) == [path]
    assert path.read_bytes() == content, "the same features make the same bytes"
    assert not list(path.parent.glob(".*")), "no partial file is left"


def test_a_full_disk_leaves_the_features_and_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    h5, _ = make(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mtdp_runtime.formats.clam.write_pt", full)
    with pytest.raises(OutputUnwritable, match=r"slide\.pt: cannot be written: No space left"):
        derive(h5, tmp_path, ["pt"])
    assert not derived_path(tmp_path, "slide", "pt").exists()
    assert h5.exists()


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    h5, _ = make(tmp_path)
    folder = tmp_path / "pt_files"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, living = folder / f".slide.{dead.pid}.partial.pt", folder / f".slide.{os.getppid()}.partial.pt"
    another, odd = folder / f".slide.5.{dead.pid}.partial.pt", folder / ".slide.x.partial.pt"
    for path in (left, living, another, odd):
        path.mkdir(parents=True)
        (path / "part").touch()
    derive(h5, tmp_path, ["pt"])
    assert not left.exists()
    assert living.exists()
    assert another.exists(), "of the slide slide.5"
    assert odd.exists()


def test_unknown_and_uninstalled_formats_are_refused_before_work() -> None:
    with pytest.raises(UsageError, match="parquet") as caught:
        check_formats(["parquet"])
    assert all(name in caught.value.hint for name in FORMATS)
    assert check_formats(["h5", "pt", "pt", "csv"]) == ("pt", "csv")


def test_a_format_whose_library_is_missing_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="spatialdata") as caught:
        check_formats(["zarr"])
    assert caught.value.hint == "pip install 'mtdp[spatial]'"
