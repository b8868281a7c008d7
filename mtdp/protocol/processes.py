"""Workers as processes of this machine, one for each cell: each worker has its own cores, and its own GPU if it can."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Final

import torch

from mtdp.protocol.cells import Cell
from mtdp.protocol.crew import Given, Told, attempt

_GRACE_S: Final = 60.0  # from a signal to the end of what hangs
_PR_SET_PDEATHSIG: Final = 1


class Processes:
    """A crew of `crew.Crew`. What all need is imported once, by a server that forks them."""

    def __init__(self, given: Given, workers: int) -> None:
        self.size = workers
        self._given = given
        self._cores = core_groups(sorted(os.sched_getaffinity(0)), workers)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["mtdp.protocol.processes"])
        self._running: dict[int, tuple[BaseProcess, Connection]] = {}

    def start(self, worker: int, cell: Cell) -> None:
        ours, theirs = self._context.Pipe(duplex=False)
        gpu = gpu_of(worker, torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        arguments = (theirs, self._given, cell, self._cores[worker], gpu)
        process = self._context.Process(target=_compute, args=arguments, name=cell.name)
        process.start()
        theirs.close()
        self._running[worker] = process, ours

    def ended(self, timeout_s: float) -> Iterator[tuple[int, Told]]:
        by_pipe = {pipe: worker for worker, (_, pipe) in self._running.items()}
        for pipe in wait(list(by_pipe), timeout_s):
            assert isinstance(pipe, Connection)
            worker = by_pipe[pipe]
            process, _ = self._running.pop(worker)
            told: Told
            try:
                told = pipe.recv()
            except (EOFError, OSError):
                process.join()
                code = process.exitcode or 0
                told = f"died ({signal.Signals(-code).name})" if code < 0 else f"ended (exit code {code})"
            pipe.close()
            process.join()
            yield worker, told

    def close(self) -> None:
        for process, _ in self._running.values():
            process.terminate()
        give_up_s = time.monotonic() + _GRACE_S
        for process, pipe in self._running.values():
            process.join(max(0.0, give_up_s - time.monotonic()))
            process.kill()
            process.join()
            pipe.close()
        self._running.clear()


def _compute(tells: Connection, given: Given, cell: Cell, cores: Sequence[int], gpu: str) -> None:
    """Be a worker process for one cell."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _leave)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # a run that was killed leaves nobody at work
    os.sched_setaffinity(0, cores)
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    tells.send(attempt(given, cell))


def _leave(signum: int, frame: FrameType | None) -> None:
    os._exit(128 + signum)


def core_groups(cores: Sequence[int], parts: int) -> list[Sequence[int]]:
    """Split cores into groups of like size.

    >>> core_groups([0, 1, 2, 3, 4], 2)
    [[0, 1], [2, 3, 4]]
    """
    return [cores[len(cores) * i // parts : len(cores) * (i + 1) // parts] for i in range(parts)]


def gpu_of(worker: int, count: int, visible: str) -> str:
    """Return the GPU of a worker as CUDA_VISIBLE_DEVICES names it; workers take turns where there are fewer.

    >>> gpu_of(1, 2, ""), gpu_of(2, 2, "4,7"), gpu_of(1, 0, "")
    ('1', '4', '')
    """
    return (visible.split(",") if visible else [str(one) for one in range(count)])[worker % count] if count else ""
