"""Workers that compute cells: what they are told, what they tell, and a worker's side of it.

A worker is a process here (`processes`) or a task of a cluster (`ray`); both only carry what is said. Results go to the
run's folder and nowhere else.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol as Form

import torch

import mtdp
from mtdp.errors import Interrupted, MtdpError, UsageError
from mtdp.protocol.cells import Cell
from mtdp.protocol.run import Protocol, compute_cell


@dataclass(frozen=True, slots=True)
class Given:
    """What a worker needs beside a cell: it is the same for all of a run."""

    protocol: Protocol
    mark: Path  # a file of the run's folder: who does not see it works in another folder of that name
    threads: int  # of each worker: sums are rounded by it, so it is the same for all
    folder: Path = Path()  # where relative paths are from
    version: str = mtdp.__version__


@dataclass(frozen=True, slots=True)
class Done:
    """A cell whose result is in the run's folder."""

    host: str
    seconds: float


# Done; None: another run has the cell; an error of the cell; a text: why the worker is gone.
Told = Done | None | MtdpError | str


class Crew(Form):
    """Workers, by number; each has one cell at a time."""

    size: int

    def start(self, worker: int, cell: Cell) -> None:
        """Let a worker that is free compute a cell."""
        ...

    def ended(self, timeout_s: float) -> Iterable[tuple[int, Told]]:
        """Return what became of cells: at least of one, or nothing after `timeout_s`."""
        ...

    def close(self) -> None:
        """End all workers; a training that is under way saves its state."""
        ...


def attempt(given: Given, cell: Cell) -> Told:
    """Compute a cell in this process, which does nothing else."""
    here = socket.gethostname()
    if given.version != mtdp.__version__:
        what = f"{here} has mtdp {mtdp.__version__}, and the run was started with {given.version}"
        return UsageError(what, "install the same version on all machines")
    with contextlib.suppress(OSError):  # only relative paths need it, and these are then missed
        os.chdir(given.folder)
    if not given.mark.is_file():
        return UsageError(
            f"{here} does not see {given.mark.parent.parent}, the run's --out",
            "the pool, its images, --init and --out must be on a folder that all machines share, at the same path",
        )
    use_threads(given.threads)
    start_s = time.monotonic()
    try:
        done = compute_cell(given.protocol, cell)
    except Interrupted as error:
        return f"was stopped ({error.message})"
    except MtdpError as error:
        return error
    except Exception as error:  # an exception of a library may not be one that can be sent
        return MtdpError(f"{cell.name}: {type(error).__name__}: {error}", "please report it")
    return Done(here, time.monotonic() - start_s) if done else None


def use_threads(count: int) -> None:
    """Compute with so many threads from now on, in PyTorch and in what scikit-learn and NumPy call."""
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(count)
    threadpool_limits(count)


def threads_each(cores: int, workers: int) -> int:
    """Return the threads of each worker; OMP_NUM_THREADS may say fewer, as it does for a run without workers."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    most = max(1, cores // workers)
    return min(most, int(said)) if said.isascii() and said.isdecimal() and int(said) else most
