"""Several workers on one machine: the same files as one worker makes, whatever happens to some of them."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

import warm
from crew import OPTIONS, content, owner, run_and_disturb, survives
from mtdp_runtime.cohort import pool, processes
from mtdp_runtime.cohort.job import Job, load_bundles, shared_settings
from mtdp_runtime.cohort.pool import largest_first
from mtdp_runtime.cohort.processes import core_groups
from mtdp_runtime.cohort.requests import SlideRequest, list_slides
from mtdp_runtime.cohort.run import run_job
from mtdp_runtime.errors import BackendError
from support import extract, one_error, slide_lines

TWO = ("--workers", 2)
pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers need two cores")


def test_two_workers_make_the_files_of_one(
    slides: Path, tiny_bundle: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "o"
    (slides / "bad.tiff").write_bytes(b"no slide")
    try:
        result = extract(slides, "--model", tiny_bundle, "--out", out, *OPTIONS, *TWO, "--stage", tmp_path / "disk")
    finally:
        (slides / "bad.tiff").unlink()
    assert result.returncode == 1, result.stderr
    assert content(out) == whole
    assert result.stdout.count("engine: ") == 1
    assert "7 of 8 slides done, 1 failed" in result.stdout
    assert [line.split("] ")[0] for line in result.stdout.splitlines() if line.startswith("[")][:2] == ["[1/8", "[2/8"]
    lines = [json.loads(text) for text in (out / "run.jsonl").read_text().splitlines()]
    assert "slide" not in lines[0], "what the run is stands before its slides"
    assert (lines[0]["models"][0]["batch"], len(lines)) == (4, 9)
    first = {Path(line["slide"]).stem for line in lines[1:4]} - {"bad"}
    assert any(name.startswith("big") for name in first)
    assert not list((tmp_path / "disk").iterdir())


def test_two_workers_make_the_bytes_of_one_with_openvino_too(slides: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    arguments = (slides, "--model", tiny_bundle, *OPTIONS, "--backend", "openvino", "--stride-px", 20)
    for name, workers in (("one", 1), ("two", 2)):
        result = extract(*arguments, "--out", tmp_path / name, "--workers", workers)
        assert result.returncode == 0, result.stderr
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert len(content(tmp_path / "one")) == len(list(slides.iterdir()))


def test_a_worker_that_dies_or_hangs_costs_its_slide_one_more_try(
    slides: Path, tiny_bundle: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    survives(run_and_disturb, slides, tiny_bundle, whole, tmp_path / "o", *TWO)


def test_a_stopped_run_leaves_no_process_and_no_claim_and_goes_on(
    slides: Path, tiny_bundle: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "o"
    code = "from mtdp_runtime.commands.extract import main; main()"
    arguments = [slides, "--model", tiny_bundle, "--out", out, *OPTIONS, *TWO]
    process = warm.start(code, *arguments)
    while (worker := owner(out, "big-0")) is None:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors.splitlines()[-1].startswith("stopped: ")
    assert not Path("/proc", str(worker)).exists()
    assert not list(out.glob(".claims/*"))
    assert extract(*arguments).returncode == 0
    assert content(out) == whole


def test_workers_die_with_a_driver_that_is_killed(slides: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    code = "from mtdp_runtime.commands.extract import main; main()"
    arguments = [slides, "--model", tiny_bundle, "--out", out, *OPTIONS, *TWO]
    process = warm.start(code, *arguments, streams=(0, 1, 2))
    while (worker := owner(out, "big-0")) is None:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    give_up_s = time.monotonic() + 20
    while Path("/proc", str(worker), "exe").exists() and time.monotonic() < give_up_s:
        time.sleep(0.02)
    assert not Path("/proc", str(worker), "exe").exists()


def test_what_would_fail_for_every_slide_ends_the_run(slides: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    result = extract(slides, "--model", tiny_bundle, "--out", out, *OPTIONS, *TWO, "--precision", "bf16")
    assert result.returncode == 2
    assert "--precision bf16" in one_error(result)
    assert not slide_lines(out) if (out / "run.jsonl").exists() else True


def test_a_worker_that_hangs_before_it_loads_anything_ends_the_run_however_long_its_list(
    slides: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_CODE", "import time; time.sleep(99)")
    monkeypatch.setattr(pool, "_START_S", 0.2)
    bundles = load_bundles([tiny_bundle])
    job = Job(
        slides=(*list_slides([slides]), *(SlideRequest(slides / f"{number:0100}.svs") for number in range(999))),
        out=tmp_path / "o",
        bundles=bundles,
        settings=shared_settings(bundles),
        workers=2,
        stall_limit_s=0.1,
    )
    run = run_job(job)
    with pytest.raises(BackendError, match=r"read and computed nothing for 0\.2 s and was ended while it started"):
        next(run)


def test_more_workers_than_cores_and_gpus_that_are_not_there_are_refused(tiny_bundle: Path, slides: Path) -> None:
    few = extract(slides, "--model", tiny_bundle, "--threads", 2, "--workers", 3)
    assert one_error(few) == "error: --workers 3: more than the 2 threads that there are for them"
    both = extract(slides, "--model", tiny_bundle, "--workers", 2, "--devices", "all")
    assert "both say how many workers" in one_error(both)


def test_cores_are_split_with_the_threads_of_a_core_together(tmp_path: Path) -> None:
    for cpu in range(8):  # as Linux numbers them: the second threads after all first ones, two packages
        (tmp_path / f"cpu{cpu}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}/topology/core_id").write_text(f"{cpu % 4 % 2}\n")
        (tmp_path / f"cpu{cpu}/topology/physical_package_id").write_text(f"{cpu % 4 // 2}\n")
    assert core_groups(set(range(8)), 2, tmp_path) == [{0, 4, 1, 5}, {2, 6, 3, 7}]
    assert core_groups(set(range(8)), 4, tmp_path) == [{0, 4}, {1, 5}, {2, 6}, {3, 7}]
    assert core_groups({3, 5}, 2, tmp_path) == [{5}, {3}]


def test_the_largest_slide_comes_first(slides: Path) -> None:
    sizes = [request.path.stat().st_size for request in largest_first(list_slides([slides]))]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]
