"""Processes of the exporter that are forked from one that has imported its libraries, and not begun from nothing.

Each export starts three or more. They are processes of their own all the same: one that dies, dies alone.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

_LIBRARIES = (
    "mtdp_export.engines",
    "mtdp_export.precision",
    "mtdp_export.variants",
    "mtdp_export.verify",
    "mtdp_runtime.backends.onnxruntime",
    "mtdp_runtime.backends.openvino",
    "engine_libraries",
)


class Warm:
    """What `isolated` uses of a context of multiprocessing."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(_LIBRARIES))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
            forkserver.ensure_running()

    def Pipe(self, duplex: bool) -> tuple[Any, Any]:
        return self._context.Pipe(duplex)

    def Process(self, target: Callable[..., None], args: tuple[Any, ...]) -> ForkServerProcess:
        return self._context.Process(target=_begin, args=(target, dict(os.environ), *args))


def _begin(
    target: Callable[..., None], environment: dict[str, str], answer: Connection, parent: int, *rest: Any
) -> None:
    """Call `isolated`'s own target. The parent is the server, which ends with the tests."""
    os.environ.clear()
    os.environ.update(environment)
    target(answer, os.getppid(), *rest)
