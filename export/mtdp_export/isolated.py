"""Runs what loads an inference engine in a process of its own: a crash there is an error message here."""

from __future__ import annotations

import copy
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, ParamSpec, TypeVar

from mtdp_export.errors import ExportError

P = ParamSpec("P")
R = TypeVar("R")


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
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(theirs, function, args, kwargs), daemon=True)
    process.start()
    theirs.close()
    failure: BaseException | None
    try:
        value, failure = ours.recv()
    except EOFError:
        process.join()
        raise ExportError(
            f"{what} crashed: {_death(process.exitcode)}",
            "An inference engine failed inside its own code: update or remove it, or run it alone to see its message.",
        ) from None
    finally:
        ours.close()
        if process.is_alive():
            process.join(5)
            process.kill()  # its answer is here, or nobody waits for it any more
        process.join()
    if failure is not None:
        raise failure
    result: R = value
    return result


def _call(answer: Connection, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
