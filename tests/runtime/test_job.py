"""A run as data: a job that any process can carry out, slide by slide, in any order."""

from __future__ import annotations

import json
import pickle
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
import pytest

import warm
from mtdp_runtime import extract
from mtdp_runtime.backends import BACKENDS
from mtdp_runtime.backends.onnxruntime import OnnxRuntime
from mtdp_runtime.bundle.tolerance import MIN_COSINE
from mtdp_runtime.cohort import pool as pool_module
from mtdp_runtime.cohort.attempt import attempt
from mtdp_runtime.cohort.claims import Held, claim
from mtdp_runtime.cohort.job import Job, load_bundles, shared_settings
from mtdp_runtime.cohort.pool import Pool
from mtdp_runtime.cohort.requests import SlideRequest, list_slides
from mtdp_runtime.cohort.run import load_engine
from mtdp_runtime.cohort.under_way import Run
from mtdp_runtime.cohort.watchdog import Unwatched, Worker
from mtdp_runtime.errors import UsageError
from mtdp_runtime.extraction.extract import SILENT
from mtdp_runtime.extraction.models import Model
from mtdp_runtime.extraction.outcome import Outcome
from mtdp_runtime.formats import FORMATS
from mtdp_runtime.settings import BackendName, FormatName, PrecisionName
from mtdp_runtime.store import run_log


@pytest.fixture
def job(tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path) -> Job:
    slides = [make_slide("a.tiff", seed=1), make_slide("b.tiff", seed=2)]
    bundles = load_bundles([tiny_bundle])
    return Job(
        slides=tuple(list_slides(slides)),
        out=tmp_path / "o",
        bundles=bundles,
        settings=shared_settings(bundles),
        threads=1,
        backend="onnxruntime",
        batch=8,
        formats=("npy",),
    )


def rows(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        return {name: file[name][:] for name in ("features", "coords", "status")}


def test_a_job_is_a_value(job: Job) -> None:
    assert pickle.loads(pickle.dumps(job)) == job
    with pytest.raises(FrozenInstanceError):
        job.threads = 2  # type: ignore[misc]


def test_a_job_that_was_sent_to_another_process_gives_the_files_of_the_call(job: Job, tmp_path: Path) -> None:
    (tmp_path / "job").write_bytes(pickle.dumps(job))
    code = (
        "import pickle, sys\n"
        "from pathlib import Path\n"
        "from mtdp_runtime.cohort.run import look_first, run_job\n"
        "job = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        "look_first(job)\n"
        "print(*(outcome.status for outcome in run_job(job)))\n"
    )
    sent = warm.run(code, tmp_path / "job")
    assert (sent.stdout, sent.returncode) == ("done done\n", 0), sent.stderr
    paths = [request.path for request in job.slides]
    extract(paths, tmp_path / "call", model=job.bundles[0].path, backend="onnxruntime", batch=8, threads=1)
    for path in paths:
        here, there = rows(tmp_path / "call" / f"{path.stem}.h5"), rows(job.out / f"{path.stem}.h5")
        for name, values in here.items():
            np.testing.assert_array_equal(there[name], values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"formats": ("xlsx",)}, "--format 'xlsx': unknown"),
        ({"bundles": 2}, "two models are called 'tiny'"),
    ],
)
def test_a_job_that_nobody_could_do_cannot_be_made(job: Job, change: dict[str, object], message: str) -> None:
    if change.get("bundles"):
        change = {"bundles": (*job.bundles, *load_bundles([job.bundles[0].path]))}
    with pytest.raises(UsageError, match=message):
        replace(job, **change)  # type: ignore[arg-type]


def test_slides_may_be_attempted_in_any_order_and_each_has_its_line(job: Job) -> None:
    job.out.mkdir()
    with OnnxRuntime.load(job.bundles[0], "fp32", 8, 1) as engine:
        run = Run(job, [Model(job.bundles[0], engine)])
        outcomes = [attempt(request, run) for request in reversed(job.slides)]
    assert [isinstance(outcome, Outcome) and outcome.status for outcome in outcomes] == ["done", "done"]
    lines = [json.loads(text) for text in (job.out / run_log.NAME).read_text().splitlines()]
    assert [Path(line["slide"]).name for line in lines] == ["b.tiff", "a.tiff"]
    assert all((job.out / f"npy/{name}.npy").exists() for name in "ab")
    assert not list(job.out.glob(".claims/*"))


def test_a_slide_that_another_has_is_left_alone_and_its_owner_named(job: Job) -> None:
    job.out.mkdir()
    other = claim(job.out, job.slides[0].name)
    assert not isinstance(other, Held)
    with other, OnnxRuntime.load(job.bundles[0], "fp32", 8, 1) as engine:
        found = attempt(job.slides[0], Run(job, [Model(job.bundles[0], engine)]))
    assert isinstance(found, Held)
    assert found.by.startswith("process ")
    assert not (job.out / run_log.NAME).exists()


def test_what_failed_before_is_not_attempted_again(job: Job) -> None:
    job.out.mkdir()
    job.slides[0].path.write_bytes(b"no slide")
    with OnnxRuntime.load(job.bundles[0], "fp32", 8, 1) as engine:
        run = Run(job, [Model(job.bundles[0], engine)])
        first = attempt(job.slides[0], run)
        again = attempt(job.slides[0], replace(run, failures=run_log.failures(job.out)))
    assert isinstance(first, Outcome)
    assert isinstance(again, Outcome)
    assert (first.status, again.status) == ("failed", "failed")
    assert again.message.endswith("(an earlier run found this; --retry-failed tries it again)")
    assert len((job.out / run_log.NAME).read_text().splitlines()) == 1


def test_a_run_that_nobody_watches_tells_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(Worker, "_tell", lambda worker, what: told.append(what))
    worker = Unwatched()
    worker.begin("a", {}, "")
    worker.start()
    worker.beat()
    worker.end("a")
    assert not told
    assert (worker.started, worker.settled) == (False, {})


def test_the_names_that_options_offer_are_the_names_that_there_are() -> None:
    assert get_args(BackendName) == ("auto", *BACKENDS)
    assert set(get_args(PrecisionName)) == {"auto", *MIN_COSINE}
    assert list(FormatName) == ["h5", *FORMATS]


def test_a_warning_names_the_line_of_the_caller(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    make_slide("a.tiff")
    (tmp_path / "list.csv").write_text("slide,patient\na.tiff,7\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        extract(tmp_path / "list.csv", tmp_path / "o", model=tiny_bundle, backend="onnxruntime")
    assert [Path(warning.filename) for warning in caught if "patient" in str(warning.message)] == [Path(__file__)]


def test_an_automatic_batch_follows_from_all_threads_and_not_from_a_workers_share(job: Job) -> None:
    """So several workers compute each row in the company that one worker would have given it."""
    batches = []
    for workers in (1, 4):
        many = replace(job, threads=8, workers=workers, batch=None)
        with load_engine(many, many.bundles[0], None, lambda bundle, engine, reason: None) as engine:
            batches.append(engine.batch)
    assert batches == [16, 16]
    assert (replace(job, threads=8, workers=4).threads_each, replace(job, threads=2, share=3).threads_each) == (2, 3)


class _DiesLate:
    """A crew of one worker, which is gone when it has been silent for longer than it may."""

    size = 1

    def __init__(self) -> None:
        self.starts = 0
        self.running: set[int] = set()
        self.given: list[str] = []

    def start(self, worker: int) -> bool:
        self.starts += 1
        self.running.add(worker)
        return True

    def give(self, worker: int, given: tuple[SlideRequest, SlideRequest | None]) -> None:
        self.given.append(given[0].name)

    def events(self, timeout_s: float) -> Iterator[tuple[int, str, Any]]:
        if self.starts > len(self.given):
            yield 0, "ready", ()
        elif self.starts == 1:
            time.sleep(0.02)
            self.running.remove(0)
            yield 0, "lost", "died (SIGKILL)"
        else:
            yield 0, "outcome", Outcome(Path(self.given[-1]), "done", name=self.given[-1])

    def end(self, worker: int) -> None:
        self.running.remove(worker)

    def close(self, stopped: bool) -> None:
        self.running.clear()


def test_a_worker_that_died_when_its_time_was_up_is_not_ended_again(job: Job) -> None:
    crew = _DiesLate()
    one = replace(job, slides=job.slides[:1], workers=2, stall_limit_s=0.01)
    pool = Pool(one, crew, run_log.RunMark(), lambda worker: SILENT, lambda models: None, lambda text: None)
    assert [(found.name, found.status) for found in pool.extract({})] == [("a", "done")]
    assert crew.given == ["a", "a"]


class _OneOfThree(_DiesLate):
    """A crew of which one worker is started, since there is one slide; it takes its time."""

    size = 3

    def events(self, timeout_s: float) -> Iterator[tuple[int, str, Any]]:
        if not self.given:
            yield 0, "ready", ()
        else:
            time.sleep(0.02)
            yield 0, "outcome", Outcome(Path(self.given[-1]), "done", name=self.given[-1])


def test_a_worker_that_was_never_started_is_not_waited_for(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_START_S", 0.01)
    one = replace(job, slides=job.slides[:1], workers=3, stall_limit_s=0.01)
    pool = Pool(one, _OneOfThree(), run_log.RunMark(), lambda worker: SILENT, lambda models: None, lambda text: None)
    assert [(found.name, found.status) for found in pool.extract({})] == [("a", "done")]
