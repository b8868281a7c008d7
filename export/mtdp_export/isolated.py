"""Runs what loads an engine or a foreign file in a process of its own: a crash or a hang there is an error here.

What hangs in native code hears no signal and no exception; only another process can end it.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, Final, ParamSpec, TypeVar

from mtdp_export.errors import ExportError, Stalled
from mtdp_runtime.machine import die_with

P = ParamSpec("P")
R = TypeVar("R")

_TICK_S: Final = 1.0
_BEAT: Final = "beat"
_OWN_FAULT: Final = (
    "An inference engine failed inside its own code: update or remove it, or run it alone to see its message."
)
_OUT_OF_MEMORY: Final = (
    "Most often the system ends a process so when memory runs out: give it more, and close what else takes it."
)
_parents: list[Connection] = []  # of a process that was started here: where it says that it goes on


def isolated(what: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function in a fresh process and return what it returns; its exceptions are raised here.

    Args:
        what: names the work in the message, for example "the parity check".
        function: a function of a module; arguments and result can be pickled.
        args: its arguments.
        kwargs: its arguments.

    Raises:
        ExportError: the process died.
    """
    return limited(what, math.inf, function, *args, **kwargs)


def limited(what: str, limit_s: float, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Do as `isolated`, and end the process once it has been silent for `limit_s`.

    The time runs from its first `goes_on`, since a busy machine may take long to import libraries.

    Raises:
        Stalled: it was ended.
        ExportError: the process died.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    # No daemon: such a process might not start others. It ends with this one all the same.
    process = context.Process(target=_call, args=(theirs, os.getpid(), function, args, kwargs))
    process.start()
    theirs.close()
    failure: BaseException | None
    try:
        value, failure = _answer(ours, what, limit_s)
    except EOFError:
        process.join()
        raise ExportError(
            f"{what} crashed: {_death(process.exitcode)}",
            _OUT_OF_MEMORY if process.exitcode == -signal.SIGKILL else _OWN_FAULT,
        ) from None
    except BaseException:
        process.kill()  # nobody waits for its answer any more
        raise
    finally:
        ours.close()
        process.join(5)
        process.kill()  # its answer is here
        process.join()
    if failure is not None:
        raise failure
    result: R = value
    return result


def goes_on() -> None:
    """Say that the work in this process goes on; nothing where no other waits for it."""
    for parent in _parents:
        parent.send(_BEAT)


def _answer(pipe: Connection, what: str, limit_s: float) -> tuple[Any, BaseException | None]:
    silent_s, ticked_s, begun = 0.0, time.monotonic(), False
    while True:
        heard = pipe.poll(min(_TICK_S, limit_s))
        now = time.monotonic()
        # Time in which this process did not run either (it was stopped, or the machine slept) is no silence.
        silent_s, ticked_s = silent_s + min(now - ticked_s, 2 * _TICK_S), now
        if heard:
            said = pipe.recv()
            if said != _BEAT:
                answer: tuple[Any, BaseException | None] = said
                return answer
            silent_s, begun = 0.0, True
            goes_on()
        elif begun and silent_s >= limit_s:
            raise Stalled(
                f"{what}: one step took more than {limit_s:g} s, and was ended",
                "Take models from people you trust; a large one may need a longer --stall-limit, or 0 for none.",
            )


def _call(
    answer: Connection, parent: int, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):  # the parent hears them, too, and ends this process
        signal.signal(signum, signal.SIG_IGN)
    die_with(parent)
    _parents.append(answer)
    result: tuple[Any, Exception | None]
    try:
        result = (function(*args, **kwargs), None)
    except Exception as error:
        result = (None, _portable(error))
    answer.send(result)
    answer.close()


def _portable(error: Exception) -> Exception:
    """Return the error; one that the other process could not make again becomes one that says the same."""
    try:
        copy.copy(error)  # by the same protocol
        ForkingPickler.dumps(error)
    except Exception:  # whatever its class does in between
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return ExportError(f"{type(error).__name__}: {first}" if first else type(error).__name__)
    return error


def _death(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"it ended with exit code {exit_code} and no answer"
