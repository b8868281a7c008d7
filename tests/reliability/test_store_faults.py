"""Any call to the file system may fail once, and lose what it should have kept: no wrong row has the final name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mtdp_runtime.errors import ClaimLost, OutputUnwritable
from mtdp_runtime.store import progress, writer
from mtdp_runtime.store.layout import TileStatus
from mtdp_runtime.store.writer import FeatureStore, partial_path
from shim import under_shim
from store_life import BATCH, ROWS, layout, live, problem, rows

CALLS = ["write", "pwrite", "fsync", "fdatasync", "rename", "open", "ftruncate", "unlink", "mmap"]


@pytest.mark.parametrize(("drop", "lose"), [(False, True), (True, False)])
def test_each_call_of_a_stores_life_may_fail_once(shim: Path, tmp_path: Path, drop: bool, lose: bool) -> None:
    """All of them, one after the other: then either the file is right at once, or it is not there and that is said;
    the next run ends right, and nothing is left over."""
    result = under_shim(
        shim,
        """
        import json, shutil
        from store_life import live, problem
        folder, drop, lose = Path(sys.argv[1]), sys.argv[2] == "True", sys.argv[3] == "True"
        wrong, tried = [], {}
        def child(work):
            pid = os.fork()
            if pid == 0:
                try:
                    work()
                finally:
                    os._exit(0)
            os.waitpid(pid, 0)
        def first():
            arm(folder / "o", call, number, (errno.EIO, errno.ENOSPC, errno.ESTALE)[number % 3], lose)
            said = live(path, drop)
            reached = seen() >= number
            disarm()
            (folder / "first").write_text(json.dumps([said, reached]))
        def second():
            found = problem(path, drop) if path.exists() else ""
            (folder / "second").write_text(json.dumps([path.exists(), found, live(path, drop), problem(path, drop)]))
        for call in json.loads(sys.argv[4]):
            number, reached = 0, True
            while reached:
                number += 1
                (folder / "o").mkdir()
                path = folder / "o" / "s.h5"
                child(first)
                said, reached = json.loads((folder / "first").read_text())
                there, found, again, at_last = json.loads((folder / "second").read_text()) if not child(second) else 0
                left = sorted(p.name for p in (folder / "o").iterdir() if p.name != "s.h5")
                if found or again or at_last or left or not (there or said):
                    wrong.append([call, number, said, there, found, again, at_last, left])
                shutil.rmtree(folder / "o")
            tried[call] = number - 1
        print(json.dumps([tried, wrong]))
        """,
        tmp_path,
        drop,
        lose,
        json.dumps(CALLS),
    )
    assert result.returncode == 0, result.stderr
    tried, wrong = json.loads(result.stdout.splitlines()[-1])
    assert wrong == []
    assert tried["pwrite"] > 20
    assert tried["fdatasync"] == ROWS // BATCH
    assert tried["write"] == tried["mmap"] == 0, "HDF5 writes no file: all is written by pwrite"


def test_rows_that_a_failed_sync_lost_are_computed_again(shim: Path, tmp_path: Path) -> None:
    """The kernel tells of it once; a second sync succeeds. What follows it may not be believed."""
    result = under_shim(
        shim,
        """
        import h5py
        from store_life import live
        path = Path(sys.argv[1]) / "s.h5"
        arm(path.parent, "fdatasync", 4, errno.EIO, True)
        print(live(path))
        disarm()
        with h5py.File(path.with_name(".s.h5.partial")) as file:
            good = file["status"][:] == 0
            print(int(good.sum()), int((good & (file["features"][:] == 0).all(axis=1)).sum()))
        """,
        tmp_path,
    )
    said, counts = result.stdout.splitlines()
    assert "cannot be written: Input/output error" in said
    good, zeros = map(int, counts.split())
    assert zeros == 0
    # The third commit's marks were on their way to the disk, too: those of the second are there.
    assert good == 2 * BATCH - 1, "what was committed before is kept"
    with FeatureStore(tmp_path / "s.h5", layout()) as store:
        assert store.rows_done == 2 * BATCH
    assert live(tmp_path / "s.h5") == ""
    assert problem(tmp_path / "s.h5") == ""


def test_after_an_error_a_store_writes_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_SYNC_EVERY_S", -1)
    values, status = rows()
    part = {name: one[:BATCH] for name, one in values.items()}

    def fails(file: int) -> None:
        raise OSError(5, "Input/output error")

    with FeatureStore(tmp_path / "s.h5", layout()) as store:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fails)
            with pytest.raises(OutputUnwritable, match="Input/output error") as caught:
                store.append(part, status[:BATCH])
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == 5
        before = store.partial.read_bytes()
        with pytest.raises(OutputUnwritable, match="since an earlier error"):
            store.append(part, status[:BATCH])
        with pytest.raises(OutputUnwritable, match="since an earlier error"):
            store.statuses()
    assert partial_path(tmp_path / "s.h5").read_bytes() == before, "closing writes nothing, either"


@pytest.mark.parametrize("where", ["features", "probabilities_x", "status", "record", "key"])
def test_a_partial_file_that_was_changed_is_not_gone_on_with(tmp_path: Path, where: str) -> None:
    path = tmp_path / "s.h5"
    values, status = rows()
    with FeatureStore(path, layout()) as store:
        store.append({name: one[:BATCH] for name, one in values.items()}, status[:BATCH])
        places = dict(store._places)
    content = bytearray(partial_path(path).read_bytes())
    ends = {"record": len(content) - progress.BYTES + 60, "key": len(content) - progress.BYTES + 10}
    content[places[where].offsets[0] + 5 if where in places else ends[where]] ^= 1
    partial_path(path).write_bytes(content)
    with FeatureStore(path, layout()) as store:
        assert store.rows_done == 0
    assert live(path) == ""
    assert problem(path) == ""


def test_what_a_sleeper_writes_never_reaches_its_successors_file(tmp_path: Path) -> None:
    """Even where nothing tells the sleeper that it lost its claim: the two write to files of their own."""
    path = tmp_path / "s.h5"
    values, status = rows()
    every = {name: one[:BATCH] for name, one in values.items()}
    sleeper = FeatureStore(path, layout())
    sleeper.append(every, status[:BATCH])
    sleeper.statuses()
    assert live(path) == ""
    nonsense = {name: np.full_like(one, np.nan) for name, one in every.items()}
    sleeper.append(nonsense, np.full(BATCH, TileStatus.UNREADABLE, np.uint8))
    sleeper.close()
    assert problem(path) == ""
    assert [one.name for one in tmp_path.iterdir()] == ["s.h5"]


def test_a_lost_claim_stops_the_next_commit(tmp_path: Path) -> None:
    path, lost = tmp_path / "s.h5", []
    values, status = rows()

    def fence() -> None:
        if lost:
            raise ClaimLost("another process took it over")

    with FeatureStore(path, layout(), fence) as store:
        store.append({name: one[:BATCH] for name, one in values.items()}, status[:BATCH])
        before = store.partial.read_bytes()
        lost.append(True)
        with pytest.raises(ClaimLost):
            store.statuses()
    assert partial_path(path).read_bytes() == before
    with pytest.raises(ClaimLost):
        FeatureStore(path, layout(), fence)
    assert partial_path(path).read_bytes() == before, "who has no claim replaces nothing"


def test_a_link_under_a_temporary_name_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    for name in (".s.h5.partial", ".s.h5.partial.new"):
        (tmp_path / name).symlink_to(victim)
    said = live(tmp_path / "s.h5")
    assert victim.read_bytes() == b"precious"
    assert said == "" or "cannot be written" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of a given size can be mounted by root alone")
def test_a_disk_that_is_full_at_any_level_costs_nothing(tmp_path: Path) -> None:
    """A real tmpfs of each size, from nothing to enough; then it grows, and the same run ends right."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this root may not mount")
    try:
        said = 0
        for pages in range(1, 400, 6):
            subprocess.run(["mount", "-o", f"remount,size={4 * pages}k", disk], check=True)
            path = disk / f"s{pages}.h5"
            first = live(path, drop=pages % 2 == 0)
            said += bool(first)
            assert path.exists() != bool(first)
            subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
            assert live(path, drop=pages % 2 == 0) == ""
            assert problem(path, drop=pages % 2 == 0) == ""
            assert [one.name for one in disk.iterdir()] == [path.name]
            path.unlink()
        assert said > 20
    finally:
        subprocess.run(["umount", disk], check=True)


def test_random_faults_of_whole_runs(shim: Path, tmp_path: Path) -> None:
    """A few of those that `injections.py --count 500` tries: slides, formats and reports included."""
    script = Path(__file__).with_name("injections.py")
    command = [sys.executable, str(script), str(tmp_path), "--count", "6", "--seed", "7"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    facts = json.loads(result.stdout.splitlines()[-1])
    assert (facts["injections"], facts["wrong"]) == (6, 0)
    assert facts["said"] >= 3
