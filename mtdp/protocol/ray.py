"""Workers as tasks of a Ray cluster: Ray Core alone, and only a cell and what became of it pass through it.

Every machine must see the pool, its images, the weights to start from and the run's folder under the same paths. This
file alone knows Ray.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from mtdp.devices import usable_cores
from mtdp.errors import UsageError
from mtdp.protocol.cells import Cell
from mtdp.protocol.crew import Given, Told, attempt, threads_each

_STORE_BYTES: Final = 200 << 20  # Ray would take a third of the memory; of a pool only the names pass through it
_REACH_S: Final = 5.0
_LOOK_EVERY_S: Final = 5.0
_GONE_S: Final = 40.0  # without its head: a new one may take its place, and Ray ends this process after 60
_GRACE_S: Final = 60.0  # from a signal to the end of what hangs


class RayCrew:
    """A crew of `crew.Crew`. Ray repeats no task (max_retries 0): the driver counts the tries of a cell."""

    def __init__(self, given: Callable[[int], Given], workers: int | None, address: str | None) -> None:
        """Join the cluster at an address, or start one on this machine.

        Args:
            given: what workers need, by the threads of each.
            workers: how many; None: one for each GPU or machine of a cluster that is joined, else one.
            address: of the cluster.

        Raises:
            UsageError: Ray is not installed, or there is no such cluster.
        """
        self._ray = ray = _import_ray(joins=address is not None)
        handlers = [(signum, signal.getsignal(signum)) for signum in (signal.SIGINT, signal.SIGTERM)]
        try:
            _look_for(address)
            with _unheard() if address is not None else contextlib.nullcontext():
                ray.init(
                    address=address or "local",
                    include_dashboard=False if address is None else None,
                    num_cpus=usable_cores() if address is None else None,
                    object_store_memory=_STORE_BYTES if address is None else None,
                    log_to_driver=False,
                    logging_level="error",
                )
        except (ray.exceptions.RayError, ValueError, RuntimeError, OSError) as error:
            raise UsageError(
                f"Ray cannot be had{f' at {address}' if address else ''}: {_first_line(error)}",
                "--ray-address auto joins the cluster of this machine; left out, one is started here. "
                "A token comes from RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH.",
            ) from error
        finally:
            for signum, handler in handlers:  # Ray sets its own
                signal.signal(signum, handler)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        self.size = workers or (1 if address is None else gpus or len(nodes))
        each = share([int(node.get("CPU", 0)) for node in nodes], self.size)
        # A GPU's memory is one cell's: more workers than GPUs wait for each other.
        self._task = ray.remote(_compute).options(num_cpus=each, num_gpus=1 if gpus else 0, max_retries=0)
        self._given = ray.put(given(threads_each(each, 1)))
        self._at: dict[int, Any] = {}
        self._head = _Head(None if address is None else ray.get_runtime_context().gcs_address)

    def start(self, worker: int, cell: Cell) -> None:
        self._at[worker] = self._task.remote(self._given, cell)

    def ended(self, timeout_s: float) -> Iterator[tuple[int, Told]]:
        """Yield what workers told that have ended.

        Raises:
            UsageError: the cluster is gone.
        """
        if not self._at:
            return
        self._head.look(time.monotonic())
        by_answer = {answer: worker for worker, answer in self._at.items()}
        self._ray.wait(list(by_answer), num_returns=1, timeout=timeout_s)
        ready, _ = self._ray.wait(list(by_answer), num_returns=len(by_answer), timeout=0)
        for answer in ready:
            worker = by_answer[answer]
            del self._at[worker]
            told: Told
            try:
                told = self._ray.get(answer)
            except self._ray.exceptions.RayTaskError as error:  # nothing of ours raises: mtdp is not what is here
                told = UsageError(
                    f"a worker cannot begin: {_first_line(getattr(error, 'cause', None) or error)}",
                    "install the same mtdp on all machines",
                )
            except self._ray.exceptions.RayError as error:
                name = type(error).__name__  # its text runs over many lines
                told = "ran out of memory" if "OutOfMemory" in name else f"died ({name})"
            yield worker, told

    def close(self) -> None:
        left = [] if self._head.gone else list(self._at.values())
        for answer in left:
            self._ray.cancel(answer, force=False)  # as SIGINT would
        if left:
            self._ray.wait(left, num_returns=len(left), timeout=_GRACE_S)
        self._ray.shutdown()


class _Head:
    """The cluster's head, as far as it can be reached; None: one that dies with us."""

    def __init__(self, address: str | None) -> None:
        self.gone = False
        self._address, self._seen_s, self._looked_s = address, time.monotonic(), 0.0

    def look(self, now_s: float) -> None:
        """Look now and then whether it is there.

        Raises:
            UsageError: it has not been for long.
        """
        if self._address is None or now_s < self._looked_s + _LOOK_EVERY_S:
            return
        self._looked_s = now_s
        try:
            _look_for(self._address)
        except OSError:
            self.gone = now_s - self._seen_s > _GONE_S
        else:
            self._seen_s = now_s
        if self.gone:
            raise UsageError(
                f"the Ray cluster is gone: nobody listens at {self._address}",
                "start it again; the same command goes on",
            )


def _compute(given: Given, cell: Cell) -> Told:
    return attempt(given, cell)


def share(cores: Sequence[int], workers: int) -> int:
    """Return the most cores for each of so many workers, on machines that have so many.

    >>> share([8, 8, 8], 2), share([16, 4, 4], 3), share([2], 4)
    (8, 5, 1)
    """
    return max((each for each in range(1, max(cores) + 1) if sum(n // each for n in cores) >= workers), default=1)


def _look_for(address: str | None) -> None:
    """Make sure that somebody listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = (address or "").rpartition(":")
    if "/" in host or not (host and port.isdecimal()):
        return  # auto, and what else Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH_S).close()
    except (OverflowError, ValueError):
        raise OSError(f"there is no port {port}") from None


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


def _first_line(error: BaseException) -> str:
    if "uthenticat" in str(error.__cause__):  # Unauthenticated, or AuthenticationError
        return "it wants a token, and not this one"
    said = getattr(error, "strerror", None) or str(error)
    first = (said.strip().splitlines() or [type(error).__name__])[0]
    return " ".join(said.split()) if first.endswith(":") else first  # of two versions, say, that do not go together


def _import_ray(joins: bool) -> Any:
    # Before the import: Ray reads them then. Neither it nor a cluster that it starts reports its use to anybody.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if joins:  # a cluster that is there answers at once, or refuses the token: Ray would try that twenty times
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")
    try:
        import ray
    except ImportError as error:
        raise UsageError("--scheduler ray: Ray is not installed", "pip install 'mtdp[ray]'") from error
    # It prints what becomes of machines on stdout, among our results, and has no option against that.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    return ray
