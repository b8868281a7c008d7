"""Killed at any moment, a run goes on and ends as if nothing had been."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mtdp_runtime.errors import OutputUnwritable
from mtdp_runtime.store.layout import Layout, TileStatus
from mtdp_runtime.store.writer import FeatureStore, differences, partial_path

ROWS, DIM = 500, 40


def layout() -> Layout:
    coords = np.arange(2 * ROWS, dtype=np.int64).reshape(ROWS, 2)
    return Layout(
        coords, np.ones(ROWS, np.float32), {"features": DIM}, {"name": "s"}, {"model": "m"}, {"slide": "s"}, "r"
    )


def features() -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)


def test_fifty_kills_of_real_processes(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed.py")
    result = subprocess.run(
        [sys.executable, script, tmp_path, "--kills", "50"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout.splitlines()[-1])
    assert facts["kills"] >= 50
    assert facts["resumed_from_a_partial"] > 5  # or the kills came too early to show anything


class Died(BaseException):
    """Stands for SIGKILL: nothing that the store does afterwards counts."""


@pytest.mark.parametrize("seed", range(5))
def test_whatever_hdf5_left_half_written_at_the_end_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """HDF5 changes the file's structure in an order of its own. So let it leave anything there at all."""
    path = tmp_path / "slide.h5"
    with FeatureStore(path, layout()) as first:
        first.append({"features": features()}, np.zeros(ROWS, np.uint8))
    partial = partial_path(path)
    with h5py.File(partial) as file:
        kept = np.zeros(partial.stat().st_size, np.bool_)
        for name in ("features", "status"):
            for i in range(file[name].id.get_num_chunks()):
                info = file[name].id.get_chunk_info(i)
                kept[info.byte_offset : info.byte_offset + info.size] = True
    opened = h5py.File

    def die_in_the_middle(name: Path, mode: str, **options: Any) -> h5py.File:
        if mode != "r+":
            return opened(name, mode, **options)
        content = np.fromfile(partial, np.uint8)
        noise = np.random.default_rng(seed).integers(0, 256, content.size, np.uint8)
        content[~kept] = noise[~kept]
        partial.write_bytes(content.tobytes() + b"and a tail" * seed)
        raise Died

    with FeatureStore(path, layout()) as second, monkeypatch.context() as patch:
        patch.setattr(h5py, "File", die_in_the_middle)
        with pytest.raises(Died):
            second.finish({"timing": {}})
    with pytest.raises(OSError):  # the noise is real: without the undo nothing could open this
        h5py.File(partial)
    with FeatureStore(path, layout()) as third:
        assert third.rows_done == ROWS
        third.finish({"timing": {}})
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["features"][:], features())
    assert [p.name for p in tmp_path.iterdir()] == ["slide.h5"]


def test_bad_rows_of_an_earlier_run_are_counted(tmp_path: Path) -> None:
    status = np.zeros(ROWS, np.uint8)
    status[[3, 77, 400]] = TileStatus.UNREADABLE
    path = tmp_path / "slide.h5"
    with FeatureStore(path, layout()) as store:
        store.append({"features": features()[:200]}, status[:200])
    with FeatureStore(path, layout()) as store:
        assert store.rows_done == 200
        store.append({"features": features()[200:]}, status[200:])
        assert np.flatnonzero(store.statuses()).tolist() == [3, 77, 400]


def test_a_run_killed_between_dropping_rows_and_its_end_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "slide.h5"
    status = np.zeros(ROWS, np.uint8)
    status[7] = TileStatus.UNREADABLE
    unlink = Path.unlink

    def die(self: Path, missing_ok: bool = False) -> None:
        if self == partial_path(path):
            raise Died
        unlink(self, missing_ok)

    with FeatureStore(path, layout()) as store, monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", die)
        store.append({"features": features()}, status)
        with pytest.raises(Died):
            store.finish({}, drop_bad=True)
    assert differences(path, {"slide": "s"}) == ""
    with h5py.File(path) as file:
        assert len(file["features"]) == ROWS - 1


def test_a_file_that_another_process_began_anew_is_not_given_its_name(tmp_path: Path) -> None:
    """The first slept, the second took over with another engine: the first must not rename the second's file."""
    path = tmp_path / "slide.h5"
    with FeatureStore(path, layout()) as sleeper:
        sleeper.append({"features": features()}, np.zeros(ROWS, np.uint8))
        partial_path(path).unlink()
        with FeatureStore(path, layout()) as other:
            assert other.rows_done == 0
            with pytest.raises(OutputUnwritable, match="another process"):
                sleeper.finish({})
            assert not path.exists()
            other.append({"features": features()}, np.zeros(ROWS, np.uint8))
            other.finish({})
    assert differences(path, {"slide": "s"}) == ""
