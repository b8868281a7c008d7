"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from mtdp_runtime import files
from mtdp_runtime.errors import BackendError
from mtdp_runtime.files import atomic_file, cache_folder, private_folder, remove_strays, sync_folder, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_gets_its_name_with_all_its_bytes_and_nothing_else_is_left(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.bin", b"1234")
    assert (tmp_path / "a.bin").read_bytes() == b"1234"
    assert names(tmp_path) == ["a.bin"]


def test_until_the_end_a_reader_sees_the_file_of_before(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with atomic_file(path) as stream:
        stream.write(b"new, and longer")
        stream.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new, and longer"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("no"), KeyboardInterrupt()])
def test_whatever_ends_the_writing_leaves_the_old_file_and_no_stray(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write_half() -> None:
        with atomic_file(path) as stream:
            stream.write(b"half")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end_leaves_the_old_file_and_no_stray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fails(*given: object) -> None:
        raise OSError(5, "Input/output error")

    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    monkeypatch.setattr(os if step == "fsync" else Path, step, fails)
    with pytest.raises(OSError, match="Input/output error"):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_bytes_reach_the_disk_before_the_rename_and_the_rename_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def syncing(descriptor: int) -> None:
        facts = os.fstat(descriptor)
        done.append("folder" if stat.S_ISDIR(facts.st_mode) else f"{facts.st_size} bytes")
        fsync(descriptor)

    def replacing(scratch: Path, path: Path) -> Path:
        done.append("rename")
        return replace(scratch, path)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "replace", replacing)
    write_atomically(tmp_path / "a.bin", b"12345")
    assert done == ["5 bytes", "rename", "folder"]


def test_a_library_may_write_the_file_by_its_name(tmp_path: Path) -> None:
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    with atomic_file(tmp_path / "a.npy") as stream:
        np.save(stream.name, rows)  # appends .npy to a name that has another suffix
    assert np.array_equal(np.load(tmp_path / "a.npy"), rows)
    assert names(tmp_path) == ["a.npy"]


def test_a_link_laid_for_the_scratch_file_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    tokens = iter(["aaaaaa", "bbbbbb"])
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: next(tokens))
    (tmp_path / ".a.aaaaaa.partial.bin").symlink_to(victim)
    write_atomically(tmp_path / "a.bin", b"new")
    assert victim.read_bytes() == b"precious"
    assert (tmp_path / "a.bin").read_bytes() == b"new"
    assert not (tmp_path / "a.bin").is_symlink()


def test_a_file_is_as_readable_as_any_other_that_this_user_makes(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_atomically(tmp_path / "a.bin", b"")
    assert (tmp_path / "a.bin").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_many_writers_of_one_path_leave_the_file_of_one_of_them(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    contents = [bytes([i]) * 50_000 for i in range(8)]
    threads = [threading.Thread(target=write_atomically, args=(path, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert names(tmp_path) == ["a.bin"]


def test_what_a_killed_process_left_is_removed_and_nothing_of_another_name(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from mtdp_runtime.errors import BackendError
from mtdp_runtime.files import (
    atomic_file, cache_folder, private_folder, remove_strays, sync_folder, write_atomically
)
with atomic_file(Path(sys.argv[1])) as stream:
    stream.write(b"half")
    stream.flush()
    os.kill(os.getpid(), 9)
"""
    for name in ("a.b.h5", "a.h5"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=False)
    (tmp_path / ".a.h5.partial").write_bytes(b"rows of a run that goes on")
    assert len(names(tmp_path)) == 3
    remove_strays(tmp_path / "a.h5")
    left = names(tmp_path)
    assert len(left) == 2
    assert left[0].startswith(".a.b.")
    assert left[1] == ".a.h5.partial"


def test_a_file_system_that_cannot_sync_a_folder_is_no_error_and_a_disk_that_is_gone_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(number: int) -> object:
        def fsync(descriptor: int) -> None:
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", fails(22))
    sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", fails(5))
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)


def test_a_user_without_a_home_has_no_cache_and_is_told_how_to_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MTDP_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987_654)  # who has no entry in passwd
    with pytest.raises(BackendError, match="cannot be made") as refused:
        private_folder(cache_folder())
    assert "MTDP_CACHE" in refused.value.hint
