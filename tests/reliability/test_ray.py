"""A real Ray cluster of two actors on this machine: the files of a run without it, whatever happens to an actor."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from crew import OPTIONS, content, run_and_disturb, survives
from mtdp_runtime.cohort import ray
from mtdp_runtime.cohort.head import GONE_S, Head
from mtdp_runtime.cohort.ray import share, why_unfit
from mtdp_runtime.errors import BackendError
from mtdp_runtime.version import __version__
from support import extract, one_error, slide_lines

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra `ray`"),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two actors need two cores"),
]
RAY = ("--scheduler", "ray")


@pytest.fixture
def head(ray_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A cluster that runs already, of this machine alone, and takes who has its token."""
    (tmp_path / "token").write_text(secrets.token_hex(32))
    monkeypatch.setenv("HOME", str(ray_folder))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    code = "from ray.scripts.scripts import main; main()"
    options = f"--head --block --node-ip-address 127.0.0.1 --port {port} --num-cpus 2 --disable-usage-stats"
    command = [sys.executable, "-c", code, "start", *options.split(), "--include-dashboard", "false"]
    command += ["--temp-dir", str(ray_folder), "--object-store-memory", str(100 << 20)]
    with (tmp_path / "head.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        until_s = time.monotonic() + 60
        while "Ray runtime started" not in (tmp_path / "head.log").read_text():
            assert process.poll() is None, (tmp_path / "head.log").read_text()
            assert time.monotonic() < until_s
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def test_a_cluster_that_runs_already_is_joined_with_its_token_and_left_running(
    head: str, slides: Path, tiny_bundle: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out, host, port = tmp_path / "o", *head.split(":")
    arguments = (slides, "--model", tiny_bundle, *OPTIONS, *RAY, "--ray-address", head, "--workers", 2)
    result = extract(*arguments, "--out", out)
    assert result.returncode == 0, result.stderr
    assert content(out) == whole
    assert len({line["pid"] for line in slide_lines(out)}) == 2
    socket.create_connection((host, int(port)), 5).close()
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    token.write_text(secrets.token_hex(32))
    begun_s = time.monotonic()
    refused = one_error(extract(*arguments, "--out", tmp_path / "other"))
    assert refused == f"error: Ray cannot be had at {head}: it wants a token, and not this one"
    assert time.monotonic() - begun_s < 15, "Ray alone would try for 20 s, and take its start for them"


def test_an_actor_that_dies_or_hangs_costs_its_slide_one_more_try(
    slides: Path,
    tiny_bundle: Path,
    whole: dict[str, str],
    tmp_path: Path,
    ray_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cluster is started and stopped by the command; it reports its use to nobody and serves no dashboard."""
    monkeypatch.setenv("RAY_TMPDIR", str(ray_folder))
    monkeypatch.setenv("HOME", str(ray_folder))  # it keeps a token there
    survives(run_and_disturb, slides, tiny_bundle, whole, tmp_path / "o", *RAY, "--workers", 2)
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [command for command in commands if str(ray_folder).encode() in command]
    assert list(ray_folder.rglob("gcs_server.out")), "Ray was there"
    assert not list(ray_folder.rglob("usage_stats.json"))
    assert "http address" not in "".join(path.read_text() for path in ray_folder.rglob("dashboard.log")).lower()


def test_where_nobody_listens_there_is_no_cluster(
    slides: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as one:  # bound, and it does not listen
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"
        options = (slides, "--model", tiny_bundle, "--out", tmp_path / "o", *OPTIONS, *RAY)
        refused = extract(*options, "--ray-address", address)
        assert refused.returncode == 2
        assert one_error(refused) == f"error: Ray cannot be had at {address}: Connection refused"
        assert "there is no port " in one_error(extract(*options, "--ray-address", f"127.0.0.1:{'9' * 20}"))
        one.listen()
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert "no authentication token" in one_error(extract(*options, "--ray-address", address)).lower()


def test_a_machine_that_has_another_mtdp_or_does_not_see_the_folder_does_no_slide(tmp_path: Path) -> None:
    (tmp_path / "seen").touch()
    assert why_unfit(__version__, tmp_path / "seen", [tmp_path]) is None
    other, blind = why_unfit("0.0.0", None, []), why_unfit(__version__, tmp_path / "elsewhere/run", [])
    poor = why_unfit(__version__, tmp_path / "seen", [tmp_path, tmp_path / "model"])
    assert other is not None
    assert str(other).endswith(f"has mtdp {__version__}, and the run was started with 0.0.0")
    assert blind is not None
    assert str(blind).endswith(f"does not see {tmp_path / 'elsewhere'} of this run")
    assert str(poor).endswith(f"does not see {tmp_path / 'model'} of this run")


def test_a_cluster_whose_head_stays_away_ends_the_run_in_a_line() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        head = Head(f"127.0.0.1:{one.getsockname()[1]}")
        now_s = time.monotonic()
        head.look(now_s)
    for later_s in (1, 10, 20):  # not looked at so soon; away; another one may take its place
        head.look(now_s + later_s)
    assert not head.there
    assert not head.gone
    with pytest.raises(BackendError, match=r"^the Ray cluster is gone: nobody listens at 127\.0\.0\.1:\d+$"):
        head.look(now_s + GONE_S + 1)


def test_what_ray_says_of_a_machine_that_is_gone_is_not_among_the_results(
    capfd: pytest.CaptureFixture[str],
) -> None:
    worker = ray._import_ray(joins=False)._private.worker
    said, stopped = {"job_id": None, "error_message": "The node has been marked dead"}, threading.Event()

    def poll() -> tuple[None, dict[str, object]]:
        stopped.set()
        return None, said

    told = SimpleNamespace(subscribe=lambda: None, poll=poll)
    job = SimpleNamespace(binary=lambda: b"")
    worker.listen_error_messages(SimpleNamespace(gcs_error_subscriber=told, current_job_id=job), stopped)
    assert stopped.is_set()
    assert capfd.readouterr() == ("", "")


def test_why_versions_do_not_go_together_is_said_in_one_line() -> None:
    said = (
        "Version mismatch: The cluster was started with:\n    Ray: 2.9.0\n    Python: 3.10.1\nThis process was started"
    )
    assert ray._in_a_line(RuntimeError(f"{said} with:\n    Ray: 2.60.0\n")).endswith(
        "with: Ray: 2.9.0 Python: 3.10.1 This process was started with: Ray: 2.60.0"
    )
    assert ray._in_a_line(ValueError("first\nsecond")) == "first"


def test_a_worker_asks_for_no_more_cores_than_a_machine_has() -> None:
    assert share([8, 8, 8], 2) == 8
    assert share([16, 4, 4], 3) == 5
    assert share([2, 2], 8) == 1


def test_what_cannot_be_is_said_in_a_line(slides: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    options = (slides, "--model", tiny_bundle, "--out", tmp_path / "o", *OPTIONS)
    assert one_error(extract(*options, "--ray-address", "auto")) == "error: --ray-address: the scheduler is not ray"
    assert "Ray gives each worker its GPU" in one_error(extract(*options, *RAY, "--devices", "0"))
