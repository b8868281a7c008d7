"""A feature file as everything reads it that shows or converts it, compared with what h5py sees."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from mtdp_runtime.errors import StoreError
from mtdp_runtime.store.layout import Layout, TileStatus
from mtdp_runtime.store.reader import open_features
from mtdp_runtime.store.writer import FeatureStore

ROWS = 5


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    heads = {"probabilities_b": 2, "probabilities_a": 3}
    layout = Layout(
        rng.integers(0, 9999, (ROWS, 2)),
        rng.random(ROWS, np.float32),
        {"features": 4, **heads},
        {"patch_size_level0": 448, "name": "slide"},
        {"model": "m", "grid": {"x0": 3}, "mpp": 0.5},
        {"on_bad_tile": "nan"},
        "r",
        {name: {"class_names": [f"{name[-1]}{i}" for i in range(count)]} for name, count in heads.items()},
        mask=rng.random((7, 9)) < 0.5,
        mask_attrs={"scale": 16.0, "x0": 3, "y0": 4},
    )
    status = np.array([TileStatus.GOOD, TileStatus.UNREADABLE, *[TileStatus.GOOD] * (ROWS - 2)], np.uint8)
    with FeatureStore(tmp_path / "slide.h5", layout) as store:
        store.append({name: rng.random((ROWS, n), np.float32) for name, n in layout.outputs.items()}, status)
        store.finish({"timing": {"wall_s": 2.0}, "bad_tiles": 1})
    return tmp_path / "slide.h5"


def test_it_is_what_h5py_sees(path: Path) -> None:
    with open_features(path) as file, h5py.File(path, locking=False) as plain:
        assert len(file) == ROWS
        np.testing.assert_array_equal(file.features[:], plain["features"][:])
        np.testing.assert_array_equal(file.coords, plain["coords"][:])
        np.testing.assert_array_equal(file.status, plain["status"][:])
        np.testing.assert_array_equal(file.good, [True, False, True, True, True])
        np.testing.assert_array_equal(file.tissue_fraction, plain["tissue_fraction"][:])
        assert [(head.task, head.class_names) for head in file.heads] == [
            ("a", ("a0", "a1", "a2")),
            ("b", ("b0", "b1")),
        ]
        for head in file.heads:
            np.testing.assert_array_equal(head.probabilities[:], plain[f"probabilities_{head.task}"][:])
        assert file.tissue is not None
        np.testing.assert_array_equal(file.tissue.mask, plain["tissue_mask"][:] == 1)
        assert (file.tissue.scale, file.tissue.x0, file.tissue.y0) == (16.0, 3.0, 4.0)


def test_facts_are_pythons_own_values(path: Path) -> None:
    with open_features(path) as file:
        assert file.tile_side == 448
        assert (type(file.attrs["mpp"]), type(file.attrs["bad_tiles"])) == (float, int)
        assert (file.fact("grid"), file.fact("timing"), file.fact("absent")) == ({"x0": 3}, {"wall_s": 2.0}, None)
        assert file.tile_attrs["name"] == "slide"


def test_a_file_without_a_mask_has_none(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["tissue_mask"]
    with open_features(path) as file:
        assert file.tissue is None


@pytest.mark.parametrize("name", ["features", "coords", "status"])
def test_a_file_that_lacks_what_every_feature_file_has_is_refused(path: Path, name: str) -> None:
    with h5py.File(path, "r+") as file:
        del file[name]
    with (
        pytest.raises(StoreError, match=rf"slide\.h5: cannot be read as a feature file: it has no {name}"),
        open_features(path),
    ):
        pass


@pytest.mark.parametrize("content", [None, b"", b"no HDF5"])
def test_what_is_no_hdf5_is_refused_in_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "slide.h5"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StoreError) as caught, open_features(path):
        pass
    assert "\n" not in str(caught.value)
    assert caught.value.hint
