"""Whose fault it is: what the storage, the model or the caller did is not remembered against a slide."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import mtdp_runtime.cohort.attempt as attempts
from mtdp_runtime import extract
from mtdp_runtime.cohort import blame, claims, local
from mtdp_runtime.cohort.blame import Evidence
from mtdp_runtime.cohort.claims import Claim, Held, claim
from mtdp_runtime.cohort.folder_search import search
from mtdp_runtime.cohort.requests import open_requested
from mtdp_runtime.commands import exit_codes
from mtdp_runtime.errors import NothingFinite, SlideUnreadable, StorageFailed, TileUnreadable
from mtdp_runtime.faults import system_fault
from mtdp_runtime.slide import wrappers
from mtdp_runtime.slide.wrappers import WatchedSlide
from mtdp_runtime.store import run_log
from support import extract as run_command
from support import pyramid, slide_lines, stained

PASSING = [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN]
LASTING = [errno.EACCES, errno.ENOMEM, errno.ENOSPC, errno.EMFILE, errno.ENOENT]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blame, "RETRY_AFTER_S", (0.01, 0.01))
    monkeypatch.setattr(wrappers, "RETRY_AFTER_S", (0.01, 0.01))


def raised_from(cause: BaseException | None, text: str = "cannot decode") -> SlideUnreadable:
    try:
        raise SlideUnreadable(text) from cause
    except SlideUnreadable as error:
        return error


@given(st.sampled_from([*PASSING, *LASTING]), st.integers(0, 3), st.booleans())
def test_what_the_system_said_is_found_however_deep_it_lies(number: int, depth: int, as_text: bool) -> None:
    error: BaseException = RuntimeError(f"x: {os.strerror(number)}") if as_text else OSError(number, "")
    for _ in range(depth):
        error = raised_from(error)
    fault = system_fault(error)
    assert fault is not None
    assert (fault.reason, fault.passing) == (os.strerror(number), number in PASSING)


def test_what_is_wrong_with_the_content_is_no_fault_of_the_system() -> None:
    for error in (ValueError("bad marker"), OSError("cannot identify image file"), EOFError()):
        assert system_fault(raised_from(error)) is None


def test_a_slide_is_guilty_after_two_openings_that_find_its_content_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.tiff").write_bytes(b"no slide")
    evidence = Evidence(tmp_path / "a.tiff")
    assert evidence.try_again(raised_from(None), lambda: None)
    assert not evidence.is_the_slides()
    assert not evidence.try_again(raised_from(None), lambda: None)
    assert evidence.is_the_slides()


@given(st.lists(st.sampled_from(["content", "passing", "lasting", "not finite"]), min_size=1, max_size=12))
def test_openings_end_and_the_last_word_of_the_system_or_the_model_frees_the_slide(errors: list[str]) -> None:
    kinds = {
        "content": raised_from(None),
        "passing": raised_from(OSError(errno.EIO, "")),
        "lasting": raised_from(OSError(errno.EACCES, "")),
        "not finite": NothingFinite("x"),
    }
    evidence = Evidence(Path(__file__), waits_s=[0, 0])
    for count, kind in enumerate(errors):  # noqa: B007
        if not evidence.try_again(kinds[kind], lambda: None):
            break
    assert count <= 4
    if kind != "content":
        assert not evidence.is_the_slides() or kind == "not finite"
    assert not evidence.is_the_slides() or errors[: count + 1].count("content") >= 2


def test_a_file_that_may_not_be_read_is_no_bad_slide(tiny_bundle: Path, tmp_path: Path) -> None:
    """The folder may be looked at; opening fails as it does for a user without rights."""
    evidence = Evidence(tmp_path / "gone.tiff")
    assert not evidence.try_again(raised_from(None, "not a slide"), lambda: None)
    assert evidence.fault is not None
    assert evidence.fault.reason == os.strerror(errno.ENOENT)
    assert not evidence.is_the_slides()


class _Flaky:
    """A slide whose reads fail some times."""

    def __init__(self, failures: int, number: int | None) -> None:
        self.left, self.number, self.reads = failures, number, 0
        self.info = None

    def read_into(self, *arguments: object) -> None:
        self.reads += 1
        if self.left:
            self.left -= 1
            cause = None if self.number is None else OSError(self.number, "")
            raise TileUnreadable("tile") from cause

    def close(self) -> None: ...


def read(slide: _Flaky) -> None:
    out: NDArray[np.uint8] = np.zeros((1, 1, 3), np.uint8)
    WatchedSlide(slide, lambda: None).read_into(out, 0, 0, 1.0)  # type: ignore[arg-type]


def test_a_tile_is_read_again_while_the_storage_fails_and_is_not_called_bad() -> None:
    passing, lasting, damaged = _Flaky(2, errno.EIO), _Flaky(3, errno.ESTALE), _Flaky(1, None)
    read(passing)
    assert passing.reads == 3
    with pytest.raises(StorageFailed, match=os.strerror(errno.ESTALE)):
        read(lasting)
    with pytest.raises(TileUnreadable):
        read(damaged)
    assert damaged.reads == 1


def options(bundle: Path) -> dict[str, object]:
    return {"model": bundle, "threads": 1, "backend": "onnxruntime", "min_tissue": 0.0}


def test_a_disk_that_fails_once_costs_nothing_and_one_that_stays_away_is_not_remembered(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide, left = make_slide("a.tiff"), [99]
    opened = open_requested

    def fails(*arguments: object) -> object:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(attempts, "open_requested", fails)
    (first,) = extract(slide, tmp_path / "o", **options(tiny_bundle))  # type: ignore[arg-type]
    assert first.status == "failed"
    assert "Input/output error" in first.message
    assert first.attempt == ""
    left[0] = 1
    (again,) = extract(slide, tmp_path / "o", **options(tiny_bundle))  # type: ignore[arg-type]
    assert again.status == "done"


def test_what_a_callers_function_raises_is_raised_to_the_caller_and_not_remembered(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    def boom(slide: Path, done: int, total: int) -> None:
        if done:
            raise KeyError("of the progress bar")

    slide = make_slide("a.tiff")
    with pytest.raises(KeyError, match="of the progress bar"):
        extract(slide, tmp_path / "o", on_progress=boom, **options(tiny_bundle))  # type: ignore[arg-type]
    assert run_log.failures(tmp_path / "o") == {}
    assert not (tmp_path / "o" / ".claims").exists()
    (again,) = extract(slide, tmp_path / "o", **options(tiny_bundle))  # type: ignore[arg-type]
    assert again.status == "done"


def test_what_is_wrong_with_one_slides_names_fails_it_alone(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "o"
    (out / ".claims").mkdir(parents=True)
    names = ["dir", "fifo", "zero", "link", "b" * 240, "fine"]
    folder = tmp_path / "slides"
    folder.mkdir()
    for name in names:
        make_slide("one.tiff").rename(folder / f"{name}.tiff")
    (out / ".claims" / "dir.1").mkdir()
    os.mkfifo(out / ".claims" / "fifo.1")
    (out / ".claims" / "zero.1").symlink_to("/dev/zero")
    (out / ".claims" / "link.1").symlink_to(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="will fail, the others are done: .*its name is too long"):
        found = extract(folder, out, **options(tiny_bundle))  # type: ignore[arg-type]
    assert {one.slide.stem[:5]: one.status for one in found} == {
        **dict.fromkeys(("dir", "fifo", "zero", "link", "bbbbb"), "failed"),
        "fine": "done",
    }
    assert not (tmp_path / "elsewhere").exists()
    assert run_log.failures(out) == {}


def test_a_bad_mask_and_a_zero_byte_fail_their_slides_alone(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    for name in ("a.tiff", "b.tiff"):
        make_slide(name)
    corner = "9" * 4000
    ring = f"[[0,0],[{corner},0],[{corner},5],[0,0]]"
    (tmp_path / "m.geojson").write_text(f'{{"type":"Polygon","coordinates":[{ring}]}}')
    (tmp_path / "s.csv").write_text("slide,mask\na.tiff,m.geojson\nb.tiff,\nc\0.tiff,\n")
    with pytest.warns(UserWarning, match="will fail, the others are done"):
        found = extract(tmp_path / "s.csv", tmp_path / "o", **options(tiny_bundle))  # type: ignore[arg-type]
    assert [one.status for one in found] == ["failed", "done", "failed"]


def _claim_as_a_container(out: Path) -> None:
    claims._machine = lambda: "another namespace"
    claim(out, "s")
    (out / "ready").touch()
    time.sleep(60)


def test_a_claim_of_another_container_is_taken_over_the_moment_its_process_dies(tmp_path: Path) -> None:
    owner = multiprocessing.get_context("fork").Process(target=_claim_as_a_container, args=(tmp_path,))
    owner.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    assert isinstance(claim(tmp_path, "s"), Held)
    assert owner.pid is not None
    os.kill(owner.pid, signal.SIGKILL)
    owner.join()
    mine = claim(tmp_path, "s")
    assert isinstance(mine, Claim)
    mine.release()


@pytest.mark.parametrize("beats", [False, True], ids=["silent", "beating"])
def test_a_claim_that_gives_no_sign_is_waited_for_and_one_that_beats_is_left(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beats: bool
) -> None:
    monkeypatch.setattr(claims, "EXPIRES_S", 2.0)
    monkeypatch.setattr(local, "_LOOK_EVERY_S", 0.2)
    slide, theirs = make_slide("a.tiff"), tmp_path / "o" / ".claims" / "a.1"
    theirs.parent.mkdir(parents=True)
    theirs.write_text(json.dumps({"host": "h", "machine": "another", "pid": 1, "born": "1"}))
    if beats:
        looked = attempts.attempt

        def beating(*arguments: object) -> object:
            os.utime(theirs)
            return looked(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(local, "attempt", beating)
    (one,) = extract(slide, tmp_path / "o", **options(tiny_bundle))  # type: ignore[arg-type]
    assert one.status == ("claimed" if beats else "done")


def test_exit_codes_say_what_a_workflow_manager_must_know(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slide = make_slide("a.tiff")
    common = ("--model", tiny_bundle, "--no-report", "--backend", "onnxruntime", "--threads", "1")
    assert run_command("", *common).returncode == exit_codes.REFUSED
    assert run_command(slide, "--out=", *common).returncode == exit_codes.REFUSED
    assert run_command(slide, "--out", tmp_path / "o", "--model", tmp_path / "none").returncode == exit_codes.REFUSED
    assert not (tmp_path / "features").exists()
    (tmp_path / "o").mkdir()
    mine = claim(tmp_path / "o", "a")
    assert isinstance(mine, Claim)
    with mine:
        left = run_command(slide, "--out", tmp_path / "o", *common)
    assert left.returncode == exit_codes.LEFT, left.stderr
    assert run_command(slide, "--out", tmp_path / "o", *common).returncode == exit_codes.DONE
    assert "3: nothing failed" in " ".join(run_command("--help").stdout.split())


def test_a_search_takes_each_real_folder_once_and_names_what_it_passes_over(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "real", outside):
        folder.mkdir(parents=True)
    for path in (root / "a.tiff", root / "real" / "c.tiff", outside / "b.tiff", root / "x.vsi", root / "n.txt"):
        path.touch()
    (root / "again").symlink_to(root / "real")
    (root / "linked").symlink_to(outside)
    (root / "zlinked").symlink_to(outside)
    (root / "real" / "up").symlink_to(root)
    (root / "d.svs").symlink_to(tmp_path / "nowhere.svs")
    found = search(root, lambda name: name.endswith((".tiff", ".svs")))
    assert [str(path.relative_to(root)) for path in found.paths] == ["a.tiff", "linked/b.tiff", "n.txt", "real/c.tiff"]
    assert {one.path.name: one.why for one in found.passed_over} == {
        "d.svs": "a link that leads nowhere",
        "x.vsi": ".vsi is not read",
    }


def test_what_is_passed_over_is_said_counted_and_recorded(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    for number in range(2):
        pyramid(stained(384, 512, number), folder / f"{number}.tiff", 0.5, 2, lossy=True)
    (folder / "x.vsi").touch()
    result = run_command(
        *(folder, "--out", tmp_path / "o", "--model", tiny_bundle, "--no-report", "--backend", "onnxruntime"),
        *("--threads", "1"),
    )
    assert "1 passed over in folders: .vsi is not read (1)" in result.stderr
    assert "0 failed, 1 passed over" in result.stdout
    lines = slide_lines(tmp_path / "o")
    assert [line["status"] for line in lines] == ["passed-over", "done", "done"]
