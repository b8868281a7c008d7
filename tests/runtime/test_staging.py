"""Slides on slow storage: copied one ahead, and nothing of it stays."""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import IO

import h5py
import numpy as np
import pytest

import mtdp_runtime
import warm
from mtdp_runtime.cohort import staging
from mtdp_runtime.cohort.claims import claim
from mtdp_runtime.cohort.staging import PREFIX, IsDone, Staging
from support import damage_tile, extract, pyramid, stained


def nothing() -> None:
    pass


def test_a_copy_is_the_slide_and_goes(make_slide: Callable[..., Path], tmp_path: Path) -> None:
    slide, said = make_slide(), []
    with Staging(tmp_path / "stage", said.append) as stage:
        stage.begin(slide)
        local = stage.wait(slide, nothing)
        assert local != slide
        assert local.name == slide.name
        assert local.read_bytes() == slide.read_bytes()
        stage.remove(slide)
        assert not local.exists()
        stage.begin(slide)
        stage.wait(slide, nothing)
    assert list((tmp_path / "stage").iterdir()) == []
    assert said == []


def test_a_slide_of_many_files_comes_whole(tmp_path: Path, slides_dir: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a.mrxs", "a/Slidedat.ini", "a/Data0000.dat", "b.svs"):
        (tmp_path / name).write_text(name)
    case = tmp_path / "case"
    case.mkdir()
    for name in ("1.dcm", "2.dcm"):
        shutil.copyfile(slides_dir / "odd" / "boxes_0.dcm", case / name)
    shutil.copyfile(slides_dir / "odd" / "sm_image.dcm", case / "another.dcm")
    with Staging(tmp_path / "stage", lambda _: None) as stage:
        for slide in (tmp_path / "a.mrxs", case / "1.dcm"):
            stage.begin(slide)
        local = stage.wait(tmp_path / "a.mrxs", nothing)
        there = sorted(str(p.relative_to(local.parent)) for p in local.parent.rglob("*") if p.is_file())
        assert there == ["a.mrxs", "a/Data0000.dat", "a/Slidedat.ini"]
        local = stage.wait(case / "1.dcm", nothing)
        assert sorted(p.name for p in local.parent.iterdir()) == ["1.dcm", "2.dcm"]


def test_a_full_disk_is_said_and_the_slide_read_in_place(
    make_slide: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_SPARE_BYTES", 1 << 60)
    slide, said = make_slide(), []
    with Staging(tmp_path / "stage", said.append) as stage:
        stage.begin(slide)
        assert stage.wait(slide, nothing) == slide
    assert len(said) == 1
    assert "read in place" in said[0]


def test_what_a_killed_run_left_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    for name in ("dead", "living"):
        (tmp_path / f"{PREFIX}{name}").mkdir()
        (tmp_path / f"{PREFIX}{name}" / "lock").touch()
    (tmp_path / "mine").touch()
    with (tmp_path / f"{PREFIX}living" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with Staging(tmp_path, print):
            pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", f"{PREFIX}living"]


def test_a_staged_run_gives_the_same_and_names_the_slides_own_path(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slides = [make_slide(f"{name}.tiff", seed=i) for i, name in enumerate("ab")]
    (tmp_path / "c.tiff").write_bytes(b"no slide")
    arguments = (*slides, tmp_path / "c.tiff", "--model", tiny_bundle, "--json", "--no-report")
    extract(*arguments, "--out", tmp_path / "plain")
    result = extract(*arguments, "--out", tmp_path / "staged", "--stage", tmp_path / "stage")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["status"] for line in lines] == ["done", "done", "failed"]
    assert [line["slide"] for line in lines[:2]] == [str(slide) for slide in slides]
    assert lines[2]["message"].startswith(f"{tmp_path / 'c.tiff'}: ")
    for name in "ab":
        with h5py.File(tmp_path / "plain" / f"{name}.h5") as a, h5py.File(tmp_path / "staged" / f"{name}.h5") as b:
            np.testing.assert_array_equal(a["features"][:], b["features"][:])
            assert a.attrs["made_of"] == b.attrs["made_of"]
    assert list((tmp_path / "stage").iterdir()) == []


def test_a_signal_leaves_nothing(make_slide: Callable[..., Path], tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from mtdp_runtime.cohort.staging import Staging\n"
        "with Staging(Path(sys.argv[1]), print) as s:\n"
        "    s.begin(Path(sys.argv[2])); s.wait(Path(sys.argv[2]), lambda: None)\n"
        "    print('ready', flush=True)\n"
        "    while True: time.sleep(0.1)\n"  # one long sleep would sleep over a signal that comes just before it
    )
    process = warm.start(code, tmp_path / "stage", make_slide())
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert len(list((tmp_path / "stage").rglob("*.tiff"))) == 1
    process.send_signal(signal.SIGTERM)
    process.communicate(30)
    assert process.returncode == 128 + signal.SIGTERM
    assert list((tmp_path / "stage").iterdir()) == []


def test_a_bad_tile_of_a_staged_slide_names_the_slide(tiny_bundle: Path, tmp_path: Path) -> None:
    slide = pyramid(stained(768, 1024), tmp_path / "a.tiff", 0.5, levels=2, lossy=True)
    damage_tile(slide, 3)
    extract(slide, "--model", tiny_bundle, "--out", tmp_path / "o", "--stage", tmp_path / "stage")
    with h5py.File(tmp_path / "o" / "a.h5") as file:
        reasons = json.loads(file.attrs["bad_tile_reasons"])
    assert len(reasons) == 4
    assert all(reason.startswith(f"{slide}: ") for reason in reasons)


def test_what_is_copied_ahead_is_what_will_be_read(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a slide that failed before, nor one that another run is at, nor one that is done."""
    slides = [make_slide(f"{name}.tiff", seed=i) for i, name in enumerate("acde")]
    bad = tmp_path / "b.tiff"
    bad.write_bytes(b"no slide")
    out, arguments = tmp_path / "o", {"model": tiny_bundle, "backend": "onnxruntime"}
    mtdp_runtime.extract([bad, slides[2]], out, **arguments)  # type: ignore[arg-type]
    begun, begin = [], Staging.begin

    def recorded(self: Staging, slide: Path, is_done: IsDone | None) -> None:
        begun.append(slide.name)
        begin(self, slide, is_done)

    monkeypatch.setattr(Staging, "begin", recorded)
    with claim(out, "c"):
        arguments["stage"] = tmp_path / "stage"
        mtdp_runtime.extract([slides[0], bad, *slides[1:]], out, **arguments)  # type: ignore[arg-type]
    assert list(dict.fromkeys(begun)) == ["a.tiff", "e.tiff"]


def test_another_run_may_remove_a_folder_before_its_lock_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, calls = fcntl.flock, []

    def late(file: IO[str], operation: int) -> None:
        calls.append(1)
        if len(calls) == 1:  # the other one was quicker, and is through
            shutil.rmtree(Path(file.name).parent)
        if len(calls) == 2:  # the other one is at it
            raise BlockingIOError(11, "Resource temporarily unavailable")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with Staging(tmp_path / "stage", print) as stage:
        assert len(calls) == 3
        assert (stage._folder / "lock").exists()


def test_links_that_others_lay_in_the_staging_folder_lead_nowhere(
    make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    """A folder for all users, such as /tmp: what a run removes and writes there is its own."""
    victim, shared, slide = tmp_path / "victim", tmp_path / "stage", make_slide()
    victim.mkdir()
    shared.mkdir()
    for name in ("lock", "precious"):
        (victim / name).write_text("kept")
    (shared / f"{PREFIX}evil").symlink_to(victim)
    (shared / f"{PREFIX}lock").mkdir()
    (shared / f"{PREFIX}lock" / "lock").symlink_to(victim / "lock")
    (shared / f"{PREFIX}file").write_text("no folder")
    with Staging(shared, lambda _: None) as stage:
        stage.begin(slide)
        local = stage.wait(slide, nothing)
        assert local.read_bytes() == slide.read_bytes()
        assert local.parent.parent.stat().st_mode & 0o777 == 0o700, "nobody else may lay a link there"
    assert sorted(path.read_text() for path in victim.iterdir()) == ["kept", "kept"]


def test_a_copy_never_takes_the_place_of_what_is_there(make_slide: Callable[..., Path], tmp_path: Path) -> None:
    slide, victim = make_slide(), tmp_path / "victim"
    victim.write_text("kept")
    said: list[str] = []
    with Staging(tmp_path / "stage", said.append) as stage:
        (own,) = (tmp_path / "stage").iterdir()
        (own / "1").mkdir()
        (own / "1" / slide.name).symlink_to(victim)
        stage.begin(slide)
        assert stage.wait(slide, nothing) == slide, "it is read in place"
    assert victim.read_text() == "kept"
    assert said == [f"{slide}: read in place, not staged: File exists"]
