"""The feature file: valid at every moment, resumed to the same bytes, named only when complete."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from mtdp_runtime.errors import OutputUnwritable, StoreError
from mtdp_runtime.store.layout import Layout, TileStatus
from mtdp_runtime.store.writer import FeatureStore, differences, partial_path

ROWS, DIM, BATCH = 1000, 300, 16  # 300 columns: chunks of 873 rows, so that a batch crosses a chunk's end


FACTS = {"model": "m", "mpp": 0.5}


def layout(rows: int = ROWS, facts: dict[str, object] = FACTS, resume: str = "r") -> Layout:
    coords = np.arange(2 * rows, dtype=np.int64).reshape(rows, 2)
    return Layout(
        coords,
        np.full(rows, 0.5, np.float32),
        {"features": DIM, "probabilities_x": 3},
        {"name": "slide", "patch_size": 224, "custom": None, "nested": {"a": 1}},
        {"model": "tiny"},
        facts,
        resume,
    )


def values(rows: int = ROWS) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return {
        "features": rng.normal(size=(rows, DIM)).astype(np.float32),
        "probabilities_x": rng.random((rows, 3), np.float32),
    }


def append_from(store: FeatureStore, stop: int = ROWS) -> None:
    every = values()
    for start in range(store.rows_done, stop, BATCH):
        rows = slice(start, min(start + BATCH, stop))
        store.append({k: v[rows] for k, v in every.items()}, np.zeros(rows.stop - rows.start, np.uint8))


def test_a_whole_run(tmp_path: Path) -> None:
    path = tmp_path / "slide.h5"
    with FeatureStore(path, layout()) as store:
        append_from(store)
        store.finish({"bottleneck": "infer", "timing": {"read": 1.5}})
    assert [p.name for p in tmp_path.iterdir()] == ["slide.h5"]
    assert differences(path, FACTS) == ""
    assert differences(path, {"model": "m", "mpp": 0.25}) == "mpp is 0.5 there, 0.25 now"
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["features"][:], values()["features"])
        np.testing.assert_array_equal(file["probabilities_x"][:], values()["probabilities_x"])
        np.testing.assert_array_equal(file["coords"][:], layout().coords)
        assert file["coords"].dtype == np.int64
        assert (file["status"][:] == TileStatus.GOOD).all()
        assert 0.5e6 < file["features"].chunks[0] * DIM * 4 <= 2**20
        assert file["coords"].attrs["custom"] == "None"
        assert json.loads(file["coords"].attrs["nested"]) == {"a": 1}
        assert json.loads(file.attrs["timing"]) == {"read": 1.5}


@pytest.mark.parametrize("stop", [0, 16, 864, 880, 992])
def test_a_stopped_run_goes_on_and_ends_with_the_same_rows(tmp_path: Path, stop: int) -> None:
    path = tmp_path / "slide.h5"
    with FeatureStore(path, layout()) as store:
        append_from(store, stop)
    assert not path.exists()
    with FeatureStore(path, layout()) as store:
        assert store.rows_done == stop
        append_from(store)
        store.finish({})
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["features"][:], values()["features"])


@pytest.mark.parametrize("other", [layout(facts={"model": "n", "mpp": 0.5}), layout(resume="s"), layout(rows=999)])
def test_a_partial_file_of_another_run_is_not_continued(tmp_path: Path, other: Layout) -> None:
    path = tmp_path / "slide.h5"
    with FeatureStore(path, layout()) as store:
        append_from(store, 160)
    with FeatureStore(path, other) as store:
        assert store.rows_done == 0


def test_a_damaged_partial_file_is_started_anew(tmp_path: Path) -> None:
    path = tmp_path / "slide.h5"
    partial_path(path).write_bytes(b"not HDF5")
    with FeatureStore(path, layout()) as store:
        assert store.rows_done == 0


def test_bad_rows_are_nan_and_say_why(tmp_path: Path) -> None:
    path = tmp_path / "slide.h5"
    features = np.ones((4, DIM), np.float32)
    features[3, 7] = np.inf
    status = np.array([0, TileStatus.UNREADABLE, 0, 0], np.uint8)
    with FeatureStore(path, layout(rows=4)) as store:
        store.append({"features": features, "probabilities_x": np.ones((4, 3), np.float32)}, status)
        store.finish({})
    with h5py.File(path) as file:
        assert file["status"][:].tolist() == [0, TileStatus.UNREADABLE, 0, TileStatus.NOT_FINITE]
        assert np.isnan(file["features"][[1, 3]]).all()
        assert np.isnan(file["probabilities_x"][1]).all()
        assert (file["features"][[0, 2]] == 1).all()


@pytest.mark.parametrize("stop", [None, 864])
@pytest.mark.parametrize("drop", [False, True])
def test_features_can_be_halves(tmp_path: Path, stop: int | None, drop: bool) -> None:
    """Half the bytes, `features` alone; a stopped run goes on."""
    path, half = tmp_path / "slide.h5", replace(layout(), features_dtype="float16")
    if stop is not None:
        with FeatureStore(path, half) as store:
            append_from(store, stop)
    with FeatureStore(path, half) as store:
        assert store.rows_done == (stop or 0)
        append_from(store)
        store.finish({}, drop_bad=drop)
    with h5py.File(path) as file:
        assert (file["features"].dtype, file["probabilities_x"].dtype) == (np.float16, np.float32)
        np.testing.assert_array_equal(file["features"][:], values()["features"].astype(np.float16))
        assert file["features"].id.get_storage_size() < 1.2 * 2 * ROWS * DIM


@pytest.mark.parametrize("value", [65520.0, -1e6])
def test_what_is_beyond_a_half_is_an_error_and_never_infinite(tmp_path: Path, value: float) -> None:
    rows = {name: one[:BATCH] for name, one in values().items()}
    rows["features"][3, 7] = value
    with FeatureStore(tmp_path / "slide.h5", replace(layout(), features_dtype="float16")) as store:
        with pytest.raises(StoreError, match=r"slide\.h5: a feature of .* is beyond float16"):
            store.append(rows, np.zeros(BATCH, np.uint8))
        assert store.rows_done == 0
        rows["features"][3, 7] = np.inf
        rows["features"][4, 7] = 65504.0
        store.append(rows, np.zeros(BATCH, np.uint8))
        assert store.statuses()[3] == TileStatus.NOT_FINITE, "of the model's own: this one is the tile's"
        assert store.statuses()[4] == TileStatus.GOOD


def test_bad_rows_can_be_dropped(tmp_path: Path) -> None:
    path = tmp_path / "slide.h5"
    status = np.array([0, TileStatus.UNREADABLE, 0, 0], np.uint8)
    features = np.arange(4, dtype=np.float32)[:, None].repeat(DIM, 1)
    with FeatureStore(path, layout(rows=4)) as store:
        store.append({"features": features, "probabilities_x": np.ones((4, 3), np.float32)}, status)
        store.finish({}, drop_bad=True)
    assert differences(path, FACTS) == ""
    with h5py.File(path) as file:
        assert file["features"][:, 0].tolist() == [0, 2, 3]
        np.testing.assert_array_equal(file["coords"][:], layout(rows=4).coords[[0, 2, 3]])
        assert file["coords"].attrs["patch_size"] == 224


def test_no_rows_make_a_valid_file(tmp_path: Path) -> None:
    path = tmp_path / "slide.h5"
    with FeatureStore(path, layout(rows=0)) as store:
        store.finish({})
    assert differences(path, FACTS) == ""
    with h5py.File(path) as file:
        assert file["features"].shape == (0, DIM)
        assert file["coords"].shape == (0, 2)


def test_an_incomplete_file_under_the_final_name_is_not_done(tmp_path: Path) -> None:
    path = tmp_path / "slide.h5"
    with FeatureStore(path, layout()) as store:
        append_from(store, 160)
    partial_path(path).rename(path)
    assert differences(path, FACTS) == "it is incomplete"
    path.write_bytes(path.read_bytes()[:5000])
    assert differences(path, FACTS) == "it cannot be read as a feature file of ours"


def test_an_unwritable_place_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputUnwritable, match="cannot be written"):
        FeatureStore(tmp_path / "file" / "slide.h5", layout())


def test_a_killed_process_leaves_a_file_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "slide.h5"
    code = textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import mtdp_runtime.store.writer as s
        s._SYNC_EVERY_S = 0
        from test_store import *
        store = FeatureStore(Path({str(path)!r}), layout())
        every = values()
        for start in range(store.rows_done, ROWS, BATCH):
            rows = slice(start, min(start + BATCH, ROWS))
            store.append({{k: v[rows] for k, v in every.items()}}, np.zeros(rows.stop - rows.start, np.uint8))
            print(start, flush=True)
            time.sleep(0.01)
        """)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(8):
        process.stdout.readline()
    time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    with FeatureStore(path, layout()) as store:
        assert store.rows_done >= 8 * BATCH
        with h5py.File(store.partial) as file:
            done = store.rows_done
            np.testing.assert_array_equal(file["features"][:done], values()["features"][:done])
        append_from(store)
        store.finish({})
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["features"][:], values()["features"])
