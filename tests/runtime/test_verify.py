"""`mtdp-extract --verify OUT`: finished files are as they were computed, or it is said which are not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from mtdp_runtime.formats import derive
from mtdp_runtime.store.verify import verify_file
from mtdp_runtime.store.writer import FeatureStore
from store_life import ROWS, layout, live
from support import extract, one_error


def finished(folder: Path) -> Path:
    path = folder / "s.h5"
    assert live(path) == ""
    return path


def test_a_file_holds_as_it_was_computed(tmp_path: Path) -> None:
    verdict = verify_file(finished(tmp_path))
    assert (verdict.status, verdict.tiles, verdict.problems) == ("ok", ROWS, ())


@pytest.mark.parametrize("name", ["features", "probabilities_x", "status", "coords", "tissue_fraction", "tissue_mask"])
def test_one_changed_value_shows(tmp_path: Path, name: str) -> None:
    path = finished(tmp_path)
    with h5py.File(path, "r+") as file:
        values = file[name][:]
        values.reshape(-1)[7] = 1 - values.reshape(-1)[7]
        file[name][:] = values
    verdict = verify_file(path)
    assert (verdict.status, verdict.problems) == ("wrong", (f"not what was computed: {name}",))


@pytest.mark.parametrize("where", ["/", "coords", "features"])
def test_a_changed_attribute_shows(tmp_path: Path, where: str) -> None:
    path = finished(tmp_path)
    with h5py.File(path, "r+") as file:
        file[where].attrs["model" if where == "/" else "name"] = "another"
    assert verify_file(path).problems == ("attributes were changed",)


def test_a_dataset_that_is_gone_and_one_too_many_show(tmp_path: Path) -> None:
    path = finished(tmp_path)
    with h5py.File(path, "r+") as file:
        del file["tissue_mask"]
        file["more"] = np.zeros(3)
    assert verify_file(path).problems[0] == "not what was computed: more, tissue_mask"


def test_a_file_that_is_cut_or_incomplete_is_wrong(tmp_path: Path) -> None:
    path = finished(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert verify_file(path).problems[0].startswith("it cannot be read")
    path.write_bytes(whole)
    with h5py.File(path, "r+") as file:
        file["status"][5] = 255
    assert verify_file(path).problems[0] == "it is incomplete: rows were never computed"


def test_a_file_of_an_earlier_version_is_read_and_said_to_have_no_checksums(tmp_path: Path) -> None:
    path = finished(tmp_path)
    with h5py.File(path, "r+") as file:
        del file.attrs["checksums"]
    assert verify_file(path).status == "no-checksums"


def test_checksums_of_halves_and_of_no_rows(tmp_path: Path) -> None:
    for number, rows in enumerate((0, 3)):
        few = replace(
            layout(), coords=layout().coords[:rows], tissue_fraction=np.ones(rows, np.float32), features_dtype="float16"
        )
        path = tmp_path / f"{number}.h5"
        with FeatureStore(path, few) as store:
            ones = {name: np.ones((rows, columns), np.float32) for name, columns in few.outputs.items()}
            store.append(ones, np.zeros(rows, np.uint8))
            store.finish({})
        assert verify_file(path).status == "ok"


def test_derived_files_agree_or_are_named(tmp_path: Path) -> None:
    path = finished(tmp_path)
    derive(path, tmp_path, ["pt", "npy"])
    verdict = verify_file(path)
    assert (verdict.status, verdict.derived) == ("ok", ("npy", "pt"))
    coords = tmp_path / "npy/s.coords.npy"
    content = bytearray(coords.read_bytes())
    content[-1] ^= 1
    coords.write_bytes(content)
    (tmp_path / "pt_files/s.pt").unlink()
    assert set(verify_file(path).problems) == {"npy/s.coords.npy is not as it was made", "pt_files/s.pt is gone"}
    coords.unlink()
    derive(path, tmp_path, ["pt", "npy"])
    assert verify_file(path).status == "ok"


def test_the_command_names_each_file_and_says_by_its_exit_code_whether_all_hold(tmp_path: Path) -> None:
    folder = tmp_path / "o" / "model"
    folder.mkdir(parents=True)
    path = finished(folder)
    (folder / ".other.h5.partial").write_bytes(b"of a run that goes on")
    result = extract("--verify", tmp_path / "o")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"ok     {path}: {ROWS} tiles", "1 of 1 files hold"]
    with h5py.File(path, "r+") as file:
        file["features"][4, 3] += 1
    before = path.read_bytes()
    result = extract("--verify", tmp_path / "o", "--json")
    assert result.returncode == 1
    line = json.loads(result.stdout)
    assert (line["file"], line["status"], line["problems"]) == (str(path), "wrong", ["not what was computed: features"])
    assert path.read_bytes() == before


def test_a_feature_file_that_is_gone_is_missed_where_files_were_derived_from_it(tmp_path: Path) -> None:
    path = finished(tmp_path)
    derive(path, tmp_path, ["pt"])
    path.unlink()
    result = extract("--verify", tmp_path)
    assert result.returncode == 1
    assert "it is gone" in result.stdout


def test_there_must_be_something_to_verify(tmp_path: Path) -> None:
    assert "no finished feature file" in one_error(result := extract("--verify", tmp_path))
    assert result.returncode == 2
    assert "no such folder" in one_error(extract("--verify", tmp_path / "no"))
    assert "takes a folder and no slides" in one_error(extract("--verify", tmp_path, "slide.svs"))
