"""Rights, names and limits of the system: said in its words, with a remedy that fits, and for one slide alone."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

import warm
from denied import run_without
from mtdp_runtime.faults import remedy
from support import slide_lines

RIGHTS = "hint: You may not read it: ask its owner, or chmod. The next run tries it again."


# capset(2): root must ask, too. Of the three sets' first words, CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH are cleared.
WITHOUT_ROOTS_RIGHTS = """
import ctypes
head, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capget(head, sets) == 0
for number in range(3):
    sets[number] &= ~0b110
assert ctypes.CDLL(None).capset(head, sets) == 0
"""


def run(bundle: Path, *arguments: object, limit: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command without root's rights; a limit holds from its start on."""
    code = f"{WITHOUT_ROOTS_RIGHTS}\nfrom mtdp_runtime.commands.entry import extract; extract()"
    options = [*map(str, arguments), "--model", bundle, "--no-report", "--backend", "onnxruntime", "--threads", "1"]
    if limit is None:
        done = warm.run(code, *options)
    else:
        command = [sys.executable, "-c", code, *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
@pytest.mark.parametrize("closed", ["the slide", "its folder", "a folder of slides"])
def test_what_may_not_be_read_is_said_so_and_the_others_are_done(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path, closed: str, more: tuple[str, ...]
) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    bad = Path(shutil.copy(make_slide("open.tiff"), folder / "bad.tiff"))
    (bad if closed == "the slide" else folder).chmod(0)
    named = folder if closed == "a folder of slides" else bad
    done = run(tiny_bundle, named, tmp_path / "open.tiff", "--out", tmp_path / "out", *more)
    folder.chmod(0o755)
    assert "Permission denied" in done.stderr
    assert "space" not in done.stderr
    assert done.returncode == 1
    assert RIGHTS in done.stderr
    assert "open.tiff: 48 tiles" in done.stdout
    if not more:
        assert "attempt" not in slide_lines(tmp_path / "out")[0], "the next run tries it again"


@pytest.mark.parametrize(
    ("format_", "derived"),
    [
        ("pt", "pt_files/a.pt"),
        ("npy", "npy/a.npy"),
        ("csv", "model-outputs-csv/a.csv"),
        ("geojson", "model-outputs-geojson/a.geojson"),
    ],
)
def test_a_folder_under_the_name_of_a_derived_file_fails_its_slide_alone(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path, format_: str, derived: str
) -> None:
    out = tmp_path / "out"
    (out / derived / "kept").mkdir(parents=True)
    slides = [make_slide("a.tiff"), make_slide("b.tiff", 1)]
    done = run(tiny_bundle, *slides, "--out", out, "--format", format_)
    assert done.returncode == 1
    assert f"failed: {out / derived}: cannot be written: Is a directory" in done.stderr
    assert "move away what lies under this name" in done.stderr
    assert [line["status"] for line in slide_lines(out)] == ["failed", "done"]
    assert (out / derived / "kept").is_dir()
    shutil.rmtree(out / derived)
    assert run(tiny_bundle, *slides, "--out", out, "--format", format_).returncode == 0


def test_a_name_that_is_no_text_gives_every_format(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    name, out = os.fsdecode(b"na\xefve"), tmp_path / "out"
    make_slide("a.tiff").rename(tmp_path / f"{name}.tiff")
    formats = [part for one in ("npy", "csv", "geojson") for part in ("--format", one)]
    done = run(tiny_bundle, tmp_path / f"{name}.tiff", "--out", out, *formats)
    assert done.returncode == 0, done.stderr
    assert {path.suffix for path in out.rglob(f"{name}.*")} >= {".h5", ".npy", ".csv", ".geojson"}


@pytest.mark.skipif(find_spec("spatialdata") is None, reason="needs the extra `spatial`")
def test_a_name_that_is_no_text_is_refused_where_a_librarys_paths_are_text(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    odd, slide = tmp_path / os.fsdecode(b"na\xefve.tiff"), make_slide("b.tiff", 1)
    make_slide("a.tiff").rename(odd)
    done = run(tiny_bundle, odd, slide, "--out", tmp_path / "out", "--format", "zarr")
    assert done.returncode == 1
    assert "cannot be written: a name that is no UTF-8" in done.stderr
    assert "give it a name in UTF-8 (a manifest with the columns slide,name)" in done.stderr
    assert [line["status"] for line in slide_lines(tmp_path / "out")] == ["failed", "done"]


def test_a_name_that_is_no_text_gives_a_tensor_that_torch_reads(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    name = os.fsdecode(b"na\xefve")
    make_slide("a.tiff").rename(tmp_path / f"{name}.tiff")
    done = run(tiny_bundle, tmp_path / f"{name}.tiff", "--out", tmp_path / "out", "--format", "pt")
    assert done.returncode == 0, done.stderr
    torch = pytest.importorskip("torch")
    with (tmp_path / "out" / "pt_files" / f"{name}.pt").open("rb") as file:
        assert tuple(torch.load(file, weights_only=True).shape) == (48, 12)


def test_a_system_without_more_threads_ends_the_run_in_a_line(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    options = ["--model", tiny_bundle, "--no-report", "--backend", "onnxruntime", "--threads", "1"]
    done = run_without("threads", [make_slide(), "--out", tmp_path / "out", *options], {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "error: the system gives no more threads: can't start new thread"
    assert "ulimit -u" in done.stderr.splitlines()[1]
    assert not list((tmp_path / "out" / ".claims").iterdir()), "the slide is free for the next run"


@pytest.mark.parametrize(
    ("limit", "number", "said"),
    [
        (resource.RLIMIT_FSIZE, 1000, "raise the limit of file sizes (ulimit -f)"),
        (resource.RLIMIT_NOFILE, 24, "ulimit -n"),
    ],
)
def test_a_limit_of_the_shell_is_named(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path, limit: int, number: int, said: str
) -> None:
    out = tmp_path / "out"
    slide = make_slide()
    done = run(tiny_bundle, slide, "--out", out, limit=lambda: resource.setrlimit(limit, (number, number)))
    if done.returncode:
        assert said.lower() in done.stderr.lower(), done.stderr
    assert run(tiny_bundle, slide, "--out", out).returncode == 0


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_file_fails_at_once_and_the_others_are_done(
    tiny_bundle: Path,
    make_slide: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    odd, slide = tmp_path / "odd.tiff", make_slide()
    with socket.socket(socket.AF_UNIX) as bound:
        if kind == "pipe":
            os.mkfifo(odd)
        elif kind == "socket":
            monkeypatch.chdir(tmp_path)  # a socket's path is short
            bound.bind("odd.tiff")
        else:
            odd.symlink_to("/dev/zero")
        done = run(tiny_bundle, odd, slide, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert f"failed: {odd}: no file, but a pipe, a socket or a device" in done.stderr
    assert [line["status"] for line in slide_lines(tmp_path / "out")] == ["failed", "done"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EISDIR, errno.EMFILE])
def test_more_space_is_the_remedy_for_a_full_disk_alone(number: int) -> None:
    assert remedy(OSError(errno.ENOSPC, "x")) == remedy(OSError(errno.EDQUOT, "x")) == "free space"
    assert "space" not in remedy(OSError(number, os.strerror(number)))
