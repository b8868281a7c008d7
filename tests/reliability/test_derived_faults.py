"""What is derived from a feature file is whole and of its content, or is made again: whatever a kill or a disk left."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

import warm
from mtdp_runtime.errors import OutputUnwritable
from mtdp_runtime.formats import derive
from mtdp_runtime.store import derived
from store_life import ROWS, live, rows
from support import extract


class Died(BaseException):
    """Stands for SIGKILL."""


def write_store(target: Path, text: str = "x") -> None:
    """A folder, as zarr makes it."""
    for name in ("a", "b", "c/d", "c/e"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(f"{name} {text}")


@pytest.mark.parametrize("dies_at", [1, 2, 3, 4])
def test_a_folder_whose_removal_was_cut_short_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    h5, store = tmp_path / "s.h5", tmp_path / "s.zarr"
    assert live(h5) == ""
    derived.make(h5, "zarr", [(store, write_store)])
    assert derived.is_current(h5, "zarr", [store])
    h5.unlink()
    assert live(h5, drop=True) == ""
    assert not derived.is_current(h5, "zarr", [store])
    unlink, removed = os.unlink, []

    def dies(path: str, **options: object) -> None:
        if "s.zarr" in str(path) or "dir_fd" in options:
            removed.append(path)
            if len(removed) == dies_at:
                raise Died
        unlink(path, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", dies)
        with pytest.raises(Died):
            derived.make(h5, "zarr", [(store, lambda target: write_store(target, "y"))])
    assert not derived.is_current(h5, "zarr", [store])
    derived.make(h5, "zarr", [(store, lambda target: write_store(target, "y"))])
    assert derived.is_current(h5, "zarr", [store])
    assert sorted(p.name for p in store.rglob("*") if p.is_file()) == ["a", "b", "d", "e"]


def test_a_folder_that_lost_a_file_is_made_again(tmp_path: Path) -> None:
    h5, store = tmp_path / "s.h5", tmp_path / "s.zarr"
    assert live(h5) == ""
    derived.make(h5, "zarr", [(store, write_store)])
    (store / "c" / "e").unlink()
    assert not derived.is_current(h5, "zarr", [store])


def test_a_report_that_a_full_disk_lost_is_made_by_the_next_run_without_inference(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "o"
    options = [make_slide(), "--model", tiny_bundle, "--out", out, "--backend", "onnxruntime"]
    code = (
        "import mtdp_runtime.report.slide as report\n"
        "def full(*arguments): raise OSError(28, 'No space left on device')\n"
        "report._write = full\n"
        "from mtdp_runtime.commands.extract import main; main()"
    )
    lost = warm.run(code, *options)
    assert lost.returncode == 2
    assert "slide.html: cannot be written: No space left on device" in lost.stderr
    report = out / "report" / "slide.html"
    assert (out / "slide.h5").exists()
    assert not report.exists()
    again = extract(*options)
    assert (again.returncode, "already done" in again.stdout) == (0, True), again.stderr
    first = report.read_bytes()
    assert first.endswith(b"</html>\n")
    with h5py.File(out / "slide.h5") as file:
        assert f"{len(file['features'])} tiles of 64 px".encode() in first
    assert extract(*options).returncode == 0
    assert report.read_bytes() == first, "what is there is left"
    report.write_bytes(first[:100])
    assert extract(*options).returncode == 0
    assert report.read_bytes().endswith(b"</html>\n")


def test_a_report_of_an_earlier_version_is_left(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "o"
    options = [make_slide(), "--model", tiny_bundle, "--out", out, "--backend", "onnxruntime"]
    assert extract(*options).returncode == 0
    (out / ".derived" / "slide.json").unlink()
    report = out / "report" / "slide.html"
    report.write_bytes(b"<!doctype html>older</html>\n")
    assert extract(*options).returncode == 0
    assert b"older" in report.read_bytes()


def test_npy_on_a_disk_that_is_full_is_an_error_and_no_signal(tmp_path: Path) -> None:
    """A real limit of the kernel. A write says so; a memory map would end the process."""
    h5 = tmp_path / "s.h5"
    assert live(h5) == ""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OutputUnwritable, match=r"npy: cannot be written: "):
            derive(h5, tmp_path, ["npy"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "npy" / "s.npy").exists()
    derive(h5, tmp_path, ["npy"])
    assert np.load(tmp_path / "npy" / "s.npy").shape == (ROWS, rows()[0]["features"].shape[1])


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of a given size can be mounted by root alone")
@pytest.mark.parametrize("name", ["pt", "npy", "csv", "geojson"])
def test_no_format_dies_on_a_real_full_disk(tmp_path: Path, name: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this root may not mount")
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})
from pathlib import Path
from mtdp_runtime.formats import derive
import mtdp_runtime.store.layout, store_life
from dataclasses import replace
from mtdp_runtime.errors import OutputUnwritable
h5 = Path({str(disk)!r}) / "s.h5"
if not h5.exists():
    whole = store_life.layout()
    store_life.layout = lambda: replace(
        whole, coords_attrs={{"patch_size_level0": 64, "patch_size": 224}},
        root_attrs={{"model": "m", "grid": {{"x0": 0, "y0": 0}}}})
    assert store_life.live(h5) == ""
try:
    derive(h5, h5.parent, ["{name}"])
except OutputUnwritable as error:
    print(error)
"""
    try:
        first = warm.run(code)
        assert first.returncode == 0, first.stderr
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        made = [one for one in disk.rglob("*") if one.is_file() and one.name != "s.h5"]
        size = sum(one.stat().st_size for one in made)
        for one in made:
            one.unlink()
        room = max(0, size // 2)
        with (disk / "filler").open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, max(4096, free + size - room))
        full = warm.run(code)
        assert full.returncode == 0, full.stderr
        assert "No space left on device" in full.stdout
        (disk / "filler").unlink()
        assert warm.run(code).stdout == ""
        record = json.loads((disk / ".derived" / "s.json").read_text())
        assert list(record) == [name]
    finally:
        subprocess.run(["umount", disk], check=True)
