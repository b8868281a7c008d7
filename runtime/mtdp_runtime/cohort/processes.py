"""Workers as processes of this machine: each with its own group of cores, or its own GPU."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final

from mtdp_runtime.cohort.job import Job
from mtdp_runtime.cohort.member import Given
from mtdp_runtime.store.run_log import RunMark

_CODE: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from mtdp_runtime.cohort.member import main; main(*map(int, sys.argv[2:]))"
)
_GRACE_S: Final = 60.0  # from a signal to the end of what hangs
_CPUS: Final = Path("/sys/devices/system/cpu")


@dataclass(slots=True)
class _Process:
    process: subprocess.Popen[bytes]
    commands: Connection
    events: Connection


class Processes:
    """A crew of `pool.Crew`: a process for each worker."""

    def __init__(self, job: Job, mark: RunMark) -> None:
        self.size = job.workers
        self._job, self._mark = job, mark
        self._cores = core_groups(os.sched_getaffinity(0), job.workers)
        self._running: dict[int, _Process] = {}

    def start(self, worker: int) -> bool:
        """Start a worker on its own cores, before it loads a library that counts them."""
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        pipes = (str(theirs_in), str(theirs_out), str(os.getpid()))
        before = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, self._cores[worker])
            process = subprocess.Popen(  # noqa: S603  (ourselves)
                [sys.executable, "-c", _CODE, json.dumps(sys.path), *pipes],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a library prints there must not mix with what the command prints
                env=os.environ | self._environment(worker),
                pass_fds=(theirs_in, theirs_out),
            )
        finally:
            os.sched_setaffinity(0, before)
            os.close(theirs_in)
            os.close(theirs_out)
        started = _Process(process, Connection(ours_out, readable=False), Connection(ours_in, writable=False))
        self._running[worker] = started
        with contextlib.suppress(BrokenPipeError):  # it died at once: that is heard as an event
            started.commands.send((self._job, self._mark))
        return True

    def _environment(self, worker: int) -> Mapping[str, str]:
        if not self._job.devices:
            return {}
        visible = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
        device = self._job.devices[worker]
        return {"CUDA_VISIBLE_DEVICES": visible[device] if visible else str(device)}

    def give(self, worker: int, given: Given) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._running[worker].commands.send(given)

    def events(self, timeout_s: float) -> Iterator[tuple[int, str, Any]]:
        """Yield what workers told: at least one thing, or nothing after `timeout_s`."""
        by_pipe = {one.events: worker for worker, one in self._running.items()}
        for pipe in wait(list(by_pipe), timeout_s):
            worker = by_pipe[pipe]  # type: ignore[index]
            try:
                while self._running[worker].events.poll():
                    yield worker, *self._running[worker].events.recv()
            except (EOFError, OSError):
                yield worker, "lost", self._why(worker)

    def _why(self, worker: int) -> str:
        code = self._running[worker].process.wait()
        self._forget(worker)
        return f"died ({signal.Signals(-code).name})" if code < 0 else f"ended (exit code {code})"

    def end(self, worker: int) -> None:
        """End a worker that hangs."""
        self._running[worker].process.kill()
        self._running[worker].process.wait()
        self._forget(worker)

    def _forget(self, worker: int) -> None:
        gone = self._running.pop(worker)
        gone.commands.close()
        gone.events.close()

    def close(self, stopped: bool) -> None:
        """End all workers: `stopped` ones are asked to put their slides in order, the others have none."""
        for one in self._running.values():
            one.commands.close()
            if stopped:
                one.process.terminate()
        give_up_s = time.monotonic() + _GRACE_S
        for one in self._running.values():
            one.events.close()
            try:
                one.process.wait(max(0.0, give_up_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                one.process.kill()
                one.process.wait()
        self._running.clear()


def core_groups(cores: set[int], parts: int, cpus: Path = _CPUS) -> list[set[int]]:
    """Split cores into groups of like size: neighbours stay together, and so do the two threads of one core.

    >>> core_groups({0, 1, 2, 3, 4}, 2, Path("/nowhere"))
    [{0, 1, 2}, {3, 4}]
    """
    ordered = sorted(
        cores, key=lambda cpu: (_number(cpus, cpu, "physical_package_id"), _number(cpus, cpu, "core_id"), cpu)
    )
    groups = [set(ordered[len(ordered) * i // parts : len(ordered) * (i + 1) // parts]) for i in range(parts)]
    return sorted((group or set(cores) for group in groups), key=lambda group: -len(group))


def _number(cpus: Path, cpu: int, what: str) -> int:
    try:
        return int((cpus / f"cpu{cpu}" / "topology" / what).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0
