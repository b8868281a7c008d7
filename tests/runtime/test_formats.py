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
from mtdp_runtime.formats import FORMATS, check_formats, check_slide_names, derive, derived_path
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
    path = tmp_path / "pt_files/slide.pt"
    if rows:
        assert torch.load(path, weights_only=True).shape == (rows - (rows > 2), DIM)
    assert path.exists() == (rows > 0), "no bag of no tiles"


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


def test_geojson_classifies_a_tile_by_the_one_head_and_shows_the_tissue(tmp_path: Path) -> None:
    h5, _ = make(tmp_path, corner=(2000, 1000))
    with h5py.File(h5, "r+") as file:
        probabilities = file["probabilities_blood"][:]
        mask = file.create_dataset("tissue_mask", data=np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]], np.uint8))
        mask.attrs.update({"scale": 10.0, "x0": 2000.0, "y0": 1000.0})
    derive(h5, tmp_path, ["geojson"])
    *tiles, tissue = json.loads((tmp_path / "model-outputs-geojson/slide.geojson").read_text())["features"]
    classes = [tile["properties"].get("classification", {}).get("name") for tile in tiles]
    expected = [("rbc", "wbc")[b > a] for a, b in probabilities.tolist()]
    expected[2] = None  # it could not be read
    assert classes == expected
    assert tissue["properties"] == {
        "isLocked": True,
        "objectType": "annotation",
        "classification": {"name": "Tissue"},
    }
    outer, hole = tissue["geometry"]["coordinates"]
    assert outer == [[0, 0], [30, 0], [30, 30], [0, 30], [0, 0]]
    assert sorted(map(tuple, hole[1:])) == [(10, 10), (10, 20), (20, 10), (20, 20)]


def test_a_bag_of_no_tiles_that_an_earlier_version_wrote_is_removed(tmp_path: Path) -> None:
    h5, _ = make(tmp_path)
    (path,) = derive(h5, tmp_path, ["pt"])
    make(tmp_path, rows=0)
    assert derive(h5, tmp_path, ["pt"]) == []
    assert not path.exists()


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


@pytest.mark.parametrize("name", ["npy", "csv", "geojson"])
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
def test_what_was_made_from_this_content_is_left_whatever_the_clock_says(tmp_path: Path, name: str) -> None:
    h5, _ = make(tmp_path)
    (path,) = derive(h5, tmp_path, [name])
    later = path.stat().st_mtime_ns + 10**9
    os.utime(h5, ns=(later, later))
    assert derive(h5, tmp_path, [name]) == []
    assert not [one for one in path.parent.iterdir() if "partial" in one.name], "no partial file is left"


@pytest.mark.parametrize("name", HERE)
def test_what_was_made_from_another_content_is_made_anew_though_it_is_younger(tmp_path: Path, name: str) -> None:
    h5, _ = make(tmp_path)
    (path,) = derive(h5, tmp_path, [name])
    content = path.read_bytes()
    make(tmp_path, rows=ROWS - 1)
    os.utime(h5, ns=(0, 0))
    assert derive(h5, tmp_path, [name]) == [path]
    assert path.read_bytes() != content
    make(tmp_path)
    assert derive(h5, tmp_path, [name]) == [path]
    assert path.read_bytes() == content, "the same features make the same bytes"


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("harm", ["gone", "empty", "cut", "no record", "broken record"])
def test_what_is_not_there_as_it_was_made_is_made_anew(tmp_path: Path, name: str, harm: str) -> None:
    h5, _ = make(tmp_path)
    (path,) = derive(h5, tmp_path, [name])
    content = path.read_bytes()
    if harm == "gone":
        path.unlink()
    elif "record" in harm:
        record = tmp_path / ".derived/slide.json"
        record.write_text('{"' + name + '": 3}') if harm == "broken record" else record.unlink()
    else:
        path.write_bytes(content[:-5] if harm == "cut" else b"")
    assert derive(h5, tmp_path, [name]) == [path]
    assert path.read_bytes() == content


def test_a_files_coordinates_belong_to_it(tmp_path: Path) -> None:
    """The first of NumPy's two files is looked at as the second is."""
    h5, _ = make(tmp_path)
    derive(h5, tmp_path, ["npy"])
    (tmp_path / "npy/slide.coords.npy").write_bytes(b"")
    derive(h5, tmp_path, ["npy"])
    assert np.load(tmp_path / "npy/slide.coords.npy").shape == (ROWS, 2)


def test_a_slide_does_not_take_the_name_of_anothers_coordinates(tmp_path: Path) -> None:
    check_slide_names(["x.coords"], ["pt", "csv"])
    check_slide_names(["x.coords.1", "coords"], ["npy"])
    with pytest.raises(UsageError, match=r"x\.coords\.npy holds the coordinates of a slide called x"):
        check_slide_names(["x", "x.coords"], ["npy"])


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
    with pytest.raises(UsageError, match="xlsx") as caught:
        check_formats(["xlsx"])
    assert all(name in caught.value.hint for name in FORMATS)
    assert check_formats(["h5", "pt", "pt", "csv"]) == ("pt", "csv")


def test_a_format_whose_library_is_missing_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="spatialdata") as caught:
        check_formats(["zarr"])
    assert caught.value.hint == "pip install 'mtdp[spatial]'"
