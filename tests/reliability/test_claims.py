"""Several processes on one folder: each slide is computed once, whoever dies."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import h5py
import pytest

import warm
from mtdp_runtime.cohort import claims
from mtdp_runtime.cohort.claims import Claim, Held, claim
from mtdp_runtime.cohort.requests import SlideRequest, shard_of
from support import pyramid, slide_lines, stained


def test_one_has_it_and_the_other_is_told(tmp_path: Path) -> None:
    with claim(tmp_path, "s") as first:
        assert isinstance(first, Claim)
        assert claim(tmp_path, "s") == Held(f"process {os.getpid()}")
        with claim(tmp_path, "other"):
            pass
        assert not first.lost()
    assert list(tmp_path.iterdir()) == []


def test_a_claim_of_a_process_that_is_gone_is_taken_at_once(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=_claim_and_die, args=(tmp_path,))
    child.start()
    child.join()
    assert (tmp_path / ".claims" / "s.1").exists()
    with claim(tmp_path, "s") as mine:
        assert isinstance(mine, Claim)
        assert mine.path.name == "s.2"
        assert isinstance(claim(tmp_path, "s"), Held)
    assert list(tmp_path.iterdir()) == []


def _claim_and_die(out: Path) -> None:
    claim(out, "s")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("later_s", [-1, 1])
def test_a_claim_of_another_machine_dies_when_its_heart_stops(tmp_path: Path, later_s: int) -> None:
    """Also one whose last beat lies in the future: the server's clock was set back since."""
    (tmp_path / ".claims").mkdir()
    theirs = tmp_path / ".claims" / "s.1"
    theirs.write_text(json.dumps({"host": "node7", "machine": "another boot", "pid": 1, "born": "5"}))
    assert claim(tmp_path, "s") == Held("process 1 on node7")
    beat_s = time.time() + later_s * (claims.EXPIRES_S + 5)
    os.utime(theirs, (beat_s, beat_s))
    with claim(tmp_path, "s") as mine:
        assert isinstance(mine, Claim)


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_S", 0.02)
    with claim(tmp_path, "s") as mine:
        assert isinstance(mine, Claim)
        os.utime(mine.path, (1, 1))
        for _ in range(200):
            if mine.path.stat().st_mtime > 1:
                break
            time.sleep(0.02)
        assert mine.path.stat().st_mtime > 1


def test_who_slept_too_long_learns_that_another_took_over(tmp_path: Path) -> None:
    with claim(tmp_path, "s") as sleeper:
        assert isinstance(sleeper, Claim)
        (tmp_path / ".claims" / "s.2").write_text("")
        assert sleeper.lost()
        (tmp_path / ".claims" / "s.2").unlink()


def test_a_claim_whose_owner_died_before_writing_it_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "_WRITTEN_S", 0.1)
    (tmp_path / ".claims").mkdir()
    (tmp_path / ".claims" / "s.1").touch()
    with claim(tmp_path, "s") as mine:
        assert isinstance(mine, Claim)


def test_of_many_that_race_for_a_dead_claim_one_wins(tmp_path: Path) -> None:
    """Eight processes, twenty rounds; each winner holds on for a moment and notes when it had the slide."""
    context = multiprocessing.get_context("fork")
    (tmp_path / ".claims").mkdir()
    for number in range(20):
        dead = {"host": "x", "machine": claims._machine(), "pid": 2**22 + 1, "born": "1"}
        (tmp_path / ".claims" / f"{number}.1").write_text(json.dumps(dead))
    racers = [context.Process(target=_race, args=(tmp_path, i)) for i in range(8)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    held = [json.loads(line) for file in tmp_path.glob("racer*") for line in file.read_text().splitlines()]
    assert {number for number, _, _ in held} == set(range(20))
    for number in range(20):
        times = sorted((start, end) for n, start, end in held if n == number)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(times)), times
    assert not (tmp_path / ".claims").exists()


def _race(out: Path, me: int) -> None:
    with (out / f"racer{me}").open("w") as log:
        for number in range(20):
            mine = claim(out, str(number))
            if isinstance(mine, Claim):
                start = time.monotonic()
                time.sleep(0.002)
                log.write(json.dumps([number, start, time.monotonic()]) + "\n")
                mine.release()


def test_each_slide_is_in_one_part(tmp_path: Path) -> None:
    requests = [SlideRequest(Path(f"slide-{i}.svs")) for i in range(200)]
    parts = [[r for r in requests if shard_of(r, 3) == part] for part in (1, 2, 3)]
    assert sum(map(len, parts)) == 200
    assert all(40 < len(part) < 95 for part in parts)
    assert shard_of(SlideRequest(Path("elsewhere/slide-7.tiff")), 3) == shard_of(requests[7], 3)


@pytest.mark.parametrize("options", [["--shard", "{}/2"], []], ids=["shards", "no shards"])
def test_two_processes_do_each_slide_once(tiny_bundle: Path, tmp_path: Path, options: list[str]) -> None:
    folder, out = tmp_path / "slides", tmp_path / "out"
    folder.mkdir()
    for number in range(12):
        pyramid(stained(384, 512, number), folder / f"s{number}.tiff", 0.5, 2, lossy=True)
    code = "from mtdp_runtime.commands.extract import main; main()"
    common = [folder, "--out", out, "--model", tiny_bundle, "--no-report", "--json", "--backend", "onnxruntime"]
    parts = [[option.format(part) for option in options] for part in (1, 2)]
    both = [warm.start(code, *common, "--threads", 1, *part) for part in parts]
    for process in both:
        process.communicate()
        assert process.returncode in ((0,) if options else (0, 3))  # 3: the other one is at the last slide
    lines = slide_lines(out)
    done = [Path(line["slide"]).name for line in lines if line["status"] == "done"]
    assert sorted(done) == sorted(f"s{number}.tiff" for number in range(12))
    assert sorted(p.name for p in out.iterdir()) == sorted([*(f"s{n}.h5" for n in range(12)), "run.jsonl"])
    for number in range(12):
        with h5py.File(out / f"s{number}.h5") as file:
            assert (file["status"][:] == 0).all()
