"""Workers as actors of a Ray cluster: Ray Core alone, and only paths, plain values and outcomes pass through it.

An actor holds one worker (`member`) with its models for as long as it lives. Slides are read, and features written, by
the actor itself, so every machine must see the slides and the output folder under the same paths.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from mtdp_runtime.cohort.head import Head, look_for
from mtdp_runtime.cohort.job import Job
from mtdp_runtime.cohort.member import Given, work
from mtdp_runtime.errors import UsageError
from mtdp_runtime.store.run_log import RunMark
from mtdp_runtime.version import __version__

_STORE_BYTES: Final = 100 << 20  # Ray would take a third of the memory; nothing large passes through it
_KILL_S: Final = 10.0
_LEAVE_S: Final = 30.0
_PATIENT_S: Final = 30.0  # until it is said that a worker waits for a machine
_HEAR_S: Final = 0.5  # an actor that has nothing to tell answers after this


class _Desk:
    """The actor: a worker in a thread, and what it told since somebody last heard."""

    def __init__(self, version: str, folder: Path, sight: Path | None, job: Job, mark: RunMark) -> None:
        with contextlib.suppress(OSError):  # only relative paths need it, and these are then missed
            os.chdir(folder)
        self._given: queue.SimpleQueue[Given | None] = queue.SimpleQueue()
        from ray import get_runtime_context

        self._told: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._told.put(("place", (get_runtime_context().get_node_id(), os.getpid())))
        self._thread = threading.Thread(
            target=work, args=(job, mark, iter(self._given.get, None), lambda *told: self._told.put(told)), daemon=True
        )
        unfit = why_unfit(version, sight, [bundle.path for bundle in job.bundles])
        if unfit is None:
            self._thread.start()
        else:
            self._told.put(("broken", unfit))

    def give(self, given: Given) -> None:
        self._given.put(given)

    def heard(self) -> list[tuple[str, Any]]:
        """Return what was told, in order; wait a little where there is nothing."""
        told: list[tuple[str, Any]] = []
        with contextlib.suppress(queue.Empty):
            told.append(self._told.get(timeout=_HEAR_S))
            while True:
                told.append(self._told.get_nowait())
        return told

    def leave(self) -> None:
        """Let the worker close its engine, once its slide is done."""
        self._given.put(None)
        if self._thread.ident is not None:
            self._thread.join()


def why_unfit(version: str, sight: Path | None, models: Sequence[Path]) -> UsageError | None:
    """Return why no slide can be done on this machine: it has another mtdp, or lacks the run's folder or a model."""
    here = socket.gethostname()
    if version != __version__:
        return UsageError(
            f"{here} has mtdp {__version__}, and the run was started with {version}",
            hint="Install the same version on all machines.",
        )
    missing = [one for one in models if not one.exists()]
    if sight is not None and not sight.is_file():
        missing = [sight.parent]
    if missing:
        return UsageError(
            f"{here} does not see {missing[0]} of this run",
            hint="Slides, models and --out must be on a folder that all machines share, at the same path.",
        )
    return None


class RayCrew:
    """A crew of `pool.Crew`: an actor for each worker.

    Ray restarts no actor and repeats no call (max_restarts, max_task_retries 0): the pool knows which slide an actor
    was at, replaces the actor, and counts that slide's tries.
    """

    def __init__(self, job: Job, mark: RunMark, address: str | None) -> None:
        """Join the cluster at an address, or start one on this machine.

        Raises:
            UsageError: Ray is not installed, or there is no such cluster.
        """
        self._ray = ray = _import_ray(joins=address is not None)
        handlers = [(signum, signal.getsignal(signum)) for signum in (signal.SIGINT, signal.SIGTERM)]
        try:
            look_for(address)
            with _unheard() if address is not None else contextlib.nullcontext():
                ray.init(
                    address=address or "local",
                    include_dashboard=False if address is None else None,
                    num_cpus=job.threads if address is None else None,
                    object_store_memory=_STORE_BYTES if address is None else None,
                    log_to_driver=False,
                    logging_level="error",
                )
        except (ray.exceptions.RayError, ValueError, RuntimeError, OSError) as error:
            raise UsageError(
                f"Ray cannot be had{f' at {address}' if address else ''}: {_in_a_line(error)}",
                hint="--ray-address auto joins the cluster of this machine; left out, one is started here. "
                "A token comes from RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH.",
            ) from error
        finally:
            for signum, handler in handlers:  # Ray sets its own
                signal.signal(signum, handler)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = sum(int(node.get("GPU", 0)) for node in nodes) if address is not None else 0
        if address is None:
            self.size, each = job.workers, job.threads_each
        else:
            self.size = job.workers if job.workers > 1 else gpus or len(nodes)
            each = share([int(node.get("CPU", 0)) for node in nodes], self.size)
        self._sight = None if address is None else job.out.absolute() / f".mtdp-{secrets.token_hex(8)}.run"
        if self._sight is not None:
            self._sight.touch()
        self._job, self._mark, self._alone = replace(job, share=each), mark, address is None
        self._options = {"num_cpus": each, "num_gpus": 1 if gpus else 0, "max_restarts": 0, "max_task_retries": 0}
        self._actor_class = ray.remote(_Desk)
        self._actors: dict[int, Any] = {}
        self._asked: dict[int, Any] = {}  # the answers that are waited for
        self._places: dict[int, tuple[str, int]] = {}  # node and process
        self._head = Head(None if address is None else ray.get_runtime_context().gcs_address)
        self._patient_until_s = time.monotonic() + _PATIENT_S

    def start(self, worker: int) -> bool:
        # Two calls at a time: what it is given must not wait until it has told what it did.
        actor = self._actor_class.options(**self._options, max_concurrency=2).remote(
            __version__, Path.cwd(), self._sight, self._job, self._mark
        )
        self._actors[worker], self._asked[worker] = actor, actor.heard.remote()
        return self._alone

    def give(self, worker: int, given: Given) -> None:
        self._actors[worker].give.remote(given)

    def events(self, timeout_s: float) -> Iterator[tuple[int, str, Any]]:
        """Yield what actors told.

        Raises:
            BackendError: the cluster is gone.
        """
        self._head.look(time.monotonic())
        absent = sorted(self._actors.keys() - self._places.keys())
        if absent and self._head.there and time.monotonic() > self._patient_until_s:
            self._patient_until_s = math.inf
            cores, gpu = self._options["num_cpus"], " and a GPU" if self._options["num_gpus"] else ""
            what = f"{cores} core{'s' if cores > 1 else ''}{gpu}"
            yield absent[0], "say", f"no machine of the Ray cluster has {what} free: a worker waits for one"
        by_answer = {answer: worker for worker, answer in self._asked.items()}
        self._ray.wait(list(by_answer), num_returns=1, timeout=timeout_s)
        ready, _ = self._ray.wait(list(by_answer), num_returns=len(by_answer), timeout=0)
        for answer in ready:
            worker = by_answer[answer]
            try:
                told = self._ray.get(answer)
            except self._ray.exceptions.RayError as error:
                self._forget(worker)
                yield worker, "lost", f"died ({_why(error)})"
                continue
            self._asked[worker] = self._actors[worker].heard.remote()
            for kind, what in told:
                if kind == "place":
                    self._places[worker] = what
                    yield worker, "here", None
                else:
                    yield worker, kind, what

    def end(self, worker: int) -> None:
        self._ray.kill(self._actors[worker])
        if worker in self._places:  # Ray asks an actor to end itself, and one that is stopped does not hear it
            node, pid = self._places[worker]
            here = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
            kill = self._ray.remote(_kill).options(num_cpus=0, max_retries=0, scheduling_strategy=here)
            self._ray.wait([kill.remote(pid)], timeout=_KILL_S)
        self._forget(worker)

    def _forget(self, worker: int) -> None:
        del self._actors[worker], self._asked[worker]
        self._places.pop(worker, None)

    def close(self, stopped: bool) -> None:
        """End all actors; a killed one leaves its claim, which the next run sees to be dead."""
        if not self._head.gone:  # it is asked to end them
            if not stopped:
                self._ray.wait(
                    [actor.leave.remote() for actor in self._actors.values()],
                    num_returns=len(self._actors),
                    timeout=_LEAVE_S,
                )
            for actor in self._actors.values():
                self._ray.kill(actor)
        self._ray.shutdown()
        if self._sight is not None:
            self._sight.unlink(missing_ok=True)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _why(error: Exception) -> str:
    """Return the kind of an error of Ray: its text runs over many lines, of which the last says why none began."""
    if "creation task" in str(error):
        return str(error).strip().splitlines()[-1].strip()
    return "out of memory" if "OutOfMemory" in type(error).__name__ else type(error).__name__


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Keep off stderr what Ray's library warns of while it joins a cluster: it is said once, as an error of ours."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _in_a_line(error: BaseException) -> str:
    if "uthenticat" in str(error.__cause__):  # Unauthenticated, or AuthenticationError
        return "it wants a token, and not this one"
    said = getattr(error, "strerror", None) or str(error)
    first = (said.strip().splitlines() or [type(error).__name__])[0]
    return " ".join(said.split()) if first.endswith(":") else first  # of two versions, say, that do not go together


def share(cores: Sequence[int], workers: int) -> int:
    """Return the most cores for each of so many workers, of which each is on one of machines that have so many.

    >>> share([8, 8, 8], 2), share([16, 4, 4], 3), share([2], 4)
    (8, 5, 1)
    """
    return max((each for each in range(1, max(cores) + 1) if sum(n // each for n in cores) >= workers), default=1)


def _import_ray(joins: bool) -> Any:
    # Before the import: Ray reads them then. Neither it nor a cluster that it starts reports its use to anybody.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if joins:  # a cluster that is there answers at once, or refuses the token: Ray would try that twenty times
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise UsageError("--scheduler ray: Ray is not installed", hint="pip install 'mtdp[ray]'") from error
    # It prints what becomes of machines on stdout, among our results, and has no option against that.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    return ray
