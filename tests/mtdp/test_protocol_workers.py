"""Cells that several workers compute: the files of a run in one process, whatever happens to a worker."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

import warm
from mtdp.errors import MtdpError, TaskError, UsageError
from mtdp.protocol.cells import Cell
from mtdp.protocol.config import ProtocolConfig
from mtdp.protocol.crew import Done, Given, Told, attempt, threads_each
from mtdp.protocol.many import run_by_many
from mtdp.protocol.run import Protocol, compute_cell, run_protocol
from mtdp.protocol.tables import write_tables
from mtdp.run_state import write_json
from mtdp.tasks import load_pool

Make = Callable[..., Path]

ITERATIONS = 60  # long enough to be met in the middle
CONFIG = ProtocolConfig(
    arch="timm:test_resnet",
    init="random",
    lrs=(1e-2,),
    head_lr_multipliers=(1.0,),
    warmups=(0,),
    seeds=1,
    iterations=ITERATIONS,
    batch_size=4,
    image_px=32,
    precision="fp32",
)
OPTIONS = (
    f"--arch timm:test_resnet --init random --lr 1e-2 --head-lr-multiplier 1 --warmup 0 --seeds 1 "
    f"--iterations {ITERATIONS} --batch-size 4 --image-px 32 --precision fp32"
).split()
# The number of threads decides how sums are rounded: one, on any machine.
MAIN = "import os; os.environ['OMP_NUM_THREADS'] = '1'; from mtdp.cli import main; main()"
two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers need two cores")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, make_task: Make) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    for name in ("c", "d"):
        make_task(folder / name, ("blue", "red"))
    (folder / "pool.toml").write_text("".join(f'[[task]]\nname = "{n}"\npath = "{n}"\n' for n in "cd"))
    return folder / "pool.toml"


@pytest.fixture(scope="module")
def alone(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run in one process, with one thread."""
    import torch

    protocol = Protocol(load_pool(pool), CONFIG, tmp_path_factory.mktemp("alone") / "run")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    run_protocol(protocol)
    torch.set_num_threads(before)
    write_tables(protocol)
    return files(protocol.out)


def files(out: Path) -> dict[str, bytes]:
    """What a run leaves, without the times that it states and the folder's name."""
    found = {}
    for path in sorted([*out.glob("cells/**/*.json"), *out.glob("pretrain/**/*.safetensors"), *out.glob("table.*")]):
        text = path.read_bytes().replace(str(out).encode(), b"OUT")
        found[str(path.relative_to(out))] = re.sub(rb'"(\w+_)?seconds": [0-9.]+', b"", text)
    assert len(found) == 10 + 2 + 3
    return found


def start(pool: Path, out: Path, *more: str, env: Mapping[str, str] | None = None) -> warm.Process:
    given = {name: value for name, value in (env or os.environ).items() if not name.startswith(warm._READ_EARLY)}
    given |= warm._AT_START
    arguments = ["loto", "--pool", str(pool), "--out", str(out), *OPTIONS, *more]
    process = warm.start(MAIN, *arguments, env=given, imports=warm.TRAINING)
    assert isinstance(process, warm.Process)
    return process


def worker_at(out: Path, cell: str, process: warm.Process) -> int:
    """Return the process that trains a cell's network, once it does."""
    lock = out / "pretrain" / cell / ".lock"
    until_s = time.monotonic() + 240
    while time.monotonic() < until_s:
        assert process.poll() is None, process.communicate()
        for link in Path("/proc").glob("[0-9]*/fd/*"):
            try:
                if link.readlink() == lock:
                    return int(link.parts[2])
            except OSError:
                continue
        time.sleep(0.01)
    raise AssertionError(f"nobody trains {cell}")


TRAINING = "c/lr0.01-tau1-warmup0/seed-0"


def with_a_worker_killed(pool: Path, out: Path, *more: str, env: Mapping[str, str] | None = None) -> str:
    process = start(pool, out, "--workers", "2", *more, env=env)
    os.kill(worker_at(out, TRAINING, process), signal.SIGKILL)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert said.count("it is tried once more") == 1
    assert "[10/10] " in said
    return said


@two_cores
def test_workers_here_leave_the_files_of_one_process_though_one_is_killed(
    pool: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    said = with_a_worker_killed(pool, tmp_path / "run")
    assert "its worker died (SIGKILL); it is tried once more" in said
    assert files(tmp_path / "run") == alone
    assert not list((tmp_path / "run/locks").glob("*.run"))


@two_cores
@pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra `ray`")
def test_a_ray_cluster_leaves_the_files_of_one_process_though_a_worker_is_killed(
    pool: Path, alone: dict[str, bytes], tmp_path: Path, ray_folder: Path
) -> None:
    environment = {**os.environ, "RAY_TMPDIR": str(ray_folder), "HOME": str(ray_folder)}
    with_a_worker_killed(pool, tmp_path / "run", "--scheduler", "ray", env=environment)
    assert files(tmp_path / "run") == alone
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [command for command in commands if str(ray_folder).encode() in command], "the cluster is left running"
    assert not list(ray_folder.rglob("usage_stats.json"))


@two_cores
def test_ctrl_c_lets_workers_save_their_trainings_and_leaves_the_tables(pool: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(pool, out, "--workers", "2", "--iterations", "100000")
    worker_at(out, TRAINING, process)
    metrics = out / "pretrain" / TRAINING / "metrics.jsonl"
    while not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 130, said
    assert said.splitlines()[-2:] == [
        "error: stopped; 0 of 10 cells are done",
        "hint: give the same command again: it goes on from there",
    ]
    assert (out / "pretrain" / TRAINING / "state.safetensors").is_file()
    assert "**Not finished: " in (out / "table.md").read_text()
    assert not list(out.glob("locks/*.run"))


class OnPaper:
    """A crew that computes nothing: of a cell it tells what it is given to tell, each time the next."""

    def __init__(self, out: Path, tells: Mapping[str, list[Told]], size: int = 2) -> None:
        self.size, self.out, self.tells = size, out, tells
        self.begun: list[str] = []
        self.at: dict[int, Cell] = {}
        self.closed = False

    def start(self, worker: int, cell: Cell) -> None:
        assert worker not in self.at
        self.at[worker] = cell
        self.begun.append(cell.name)

    def ended(self, timeout_s: float) -> Iterator[tuple[int, Told]]:
        for worker, cell in list(self.at.items()):
            del self.at[worker]
            tells = self.tells.get(cell.name) or [Done("here", 1.0)]
            told = tells.pop(0) if len(tells) > 1 else tells[0]
            if isinstance(told, Done):
                write_json(self.out / "cells" / f"{cell.name}.json", {"score": 0.5})
            yield worker, told

    def close(self) -> None:
        self.closed = True


PRETRAIN = "pretrain/c/mtl/lr0.01-tau1-warmup0/seed-0"


def run_on_paper(
    pool: Path, out: Path, tells: Mapping[str, list[Told]], config: ProtocolConfig = CONFIG
) -> tuple[OnPaper, list[str]]:
    crew, said = OnPaper(out, tells), list[str]()
    try:
        run_by_many(Protocol(load_pool(pool), config, out), lambda mark: crew, said.append)
    except MtdpError as error:
        said.append(f"{type(error).__name__}: {error.message}")
    assert crew.closed
    return crew, said


def test_trainings_begin_first_and_what_needs_one_waits_for_it(pool: Path, tmp_path: Path) -> None:
    crew, _ = run_on_paper(pool, tmp_path / "run", {})
    assert [name.split("/")[0] for name in crew.begun] == ["pretrain"] * 2 + ["probe"] * 8
    long = replace(CONFIG, finetune=("c",), finetune_lrs=(1e-3,), finetune_epochs=1000)
    begun = [name.split("/")[0] for name in run_on_paper(pool, tmp_path / "1", {}, long)[0].begun]
    assert begun[:4] == ["pretrain"] * 2 + ["finetune"] * 2, "others wait for trainings; then the largest is first"
    crew, _ = run_on_paper(pool, tmp_path / "2", {PRETRAIN: ["died", Done("here", 1.0)]})
    assert crew.begun.index("probe/c/mtl/seed-0") > crew.begun.index(PRETRAIN, 1)
    seeds = [name[-1] for name in run_on_paper(pool, tmp_path / "3", {}, replace(CONFIG, seeds=2))[0].begun]
    assert seeds == sorted(seeds), "the first seed is whole before the second begins"


def test_a_cell_is_computed_once_and_a_second_run_begins_none(pool: Path, tmp_path: Path) -> None:
    first, _ = run_on_paper(pool, tmp_path / "run", {})
    assert len(first.begun) == len(set(first.begun)) == 10
    assert run_on_paper(pool, tmp_path / "run", {})[0].begun == []


def test_a_cell_that_ends_two_workers_fails_alone_with_what_needs_it(pool: Path, tmp_path: Path) -> None:
    crew, said = run_on_paper(pool, tmp_path / "run", {PRETRAIN: ["died (SIGKILL)"]})
    assert crew.begun.count(PRETRAIN) == 2
    assert said[-1] == f"CellsFailed: {PRETRAIN}: its worker died (SIGKILL), twice (2 of 10 cells are not done)"
    assert len(list((tmp_path / "run/cells").rglob("*.json"))) == 8


def test_an_error_of_one_cell_leaves_the_others_to_be_done(pool: Path, tmp_path: Path) -> None:
    crew, said = run_on_paper(pool, tmp_path / "run", {"probe/d/start/seed-0": [TaskError("x.png is damaged")]})
    assert len(crew.begun) == 10
    assert said[-1] == "CellsFailed: x.png is damaged (1 of 10 cells are not done)"


def test_what_would_fail_for_every_cell_ends_the_run(pool: Path, tmp_path: Path) -> None:
    crew, said = run_on_paper(pool, tmp_path / "run", {PRETRAIN: [UsageError("n7 does not see OUT")]})
    assert len(crew.begun) == 2
    assert said[-1] == "UsageError: n7 does not see OUT"


def test_a_cell_that_another_run_computes_is_waited_for(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtdp.protocol.many.WAIT_S", 0.0)
    crew, said = run_on_paper(pool, tmp_path / "run", {PRETRAIN: [None, None, Done("here", 0.0)]})
    assert crew.begun.count(PRETRAIN) == 3
    assert said.count(f"another run computes {PRETRAIN}") == 1
    assert said[-1].startswith("[10/10]")


def test_a_worker_in_another_folder_or_of_another_version_computes_nothing(pool: Path, tmp_path: Path) -> None:
    protocol = Protocol(load_pool(pool), CONFIG, tmp_path / "run")
    mark = tmp_path / "run/locks/1.run"
    blind, other = attempt(Given(protocol, mark, 1), protocol.cells()[0]), Given(protocol, mark, 1, version="0.0.0")
    assert isinstance(blind, UsageError)
    assert f"does not see {tmp_path / 'run'}, the run's --out" in blind.message
    old = attempt(other, protocol.cells()[0])
    assert isinstance(old, UsageError)
    assert "the run was started with 0.0.0" in old.message
    assert not (tmp_path / "run").exists()


def test_a_lock_that_another_process_holds_is_no_result(pool: Path, tmp_path: Path) -> None:
    import fcntl

    protocol = Protocol(load_pool(pool), CONFIG, tmp_path / "run")
    cell = protocol.cells()[0]
    (tmp_path / "run/locks").mkdir(parents=True)
    with (tmp_path / "run/locks" / f"{cell.name.replace('/', ' ')}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert not compute_cell(protocol, cell)


def test_a_disk_without_locks_is_said(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*arguments: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("mtdp.run_state.fcntl.flock", none)
    protocol = Protocol(load_pool(pool), CONFIG, tmp_path / "run")
    with pytest.raises(UsageError, match="cannot be locked: Function not implemented"):
        run_protocol(protocol)


def test_workers_share_the_cores_and_their_number_of_threads_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from mtdp.protocol.processes import core_groups, gpu_of
    from mtdp.protocol.ray import share

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [threads_each(8, 3), threads_each(1, 2)] == [2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads_each(8, 2) == 1
    groups = core_groups([0, 1, 2, 3, 6], 2)
    assert sorted(core for group in groups for core in group) == [0, 1, 2, 3, 6]
    assert share([8, 8, 8], 2) == 8, "a worker is on one machine"
    assert share([16, 4, 4], 3) == 5
    assert share([2], 4) == 1
    assert [gpu_of(worker, 2, "4,7") for worker in range(3)] == ["4", "7", "4"]


def test_options_that_do_not_go_together_are_wrong_usage(pool: Path, tmp_path: Path) -> None:
    from mtdp.cli_protocol import check_workers

    assert not check_workers("local", None, None)
    assert not check_workers("local", None, 1)
    assert check_workers("ray", None, None)
    assert check_workers("ray", "head:6379", 500), "its cores are elsewhere"
    with pytest.raises(UsageError, match="the scheduler is not ray"):
        check_workers("local", "auto", None)
    with pytest.raises(UsageError, match="more than the"):
        check_workers("local", None, 5000)


def test_a_cluster_of_other_versions_or_whose_head_stays_away_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mtdp.protocol import ray

    said = (
        "Version mismatch: The cluster was started with:\n  Ray: 2.9.0\nThis process was started with:\n  Ray: 2.60.0"
    )
    assert ray._first_line(RuntimeError(said)).endswith("with: Ray: 2.9.0 This process was started with: Ray: 2.60.0")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        head = ray._Head(f"127.0.0.1:{one.getsockname()[1]}")
        now_s = time.monotonic()
        head.look(now_s)
    for later_s in (1, 20):  # not looked at so soon; another one may take its place
        head.look(now_s + later_s)
    assert not head.gone
    with pytest.raises(UsageError, match=r"^the Ray cluster is gone: nobody listens at 127\.0\.0\.1:\d+$"):
        head.look(now_s + ray._GONE_S + 1)
