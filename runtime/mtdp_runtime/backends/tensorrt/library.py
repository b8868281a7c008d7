"""The two engine libraries behind one small interface: import, version, log, and how each is installed."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final

from mtdp_runtime.bundle.engine_key import TENSORRT, TENSORRT_RTX
from mtdp_runtime.errors import BackendUnavailable

_INFO: Final = 3  # severities: 0 internal error, 1 error, 2 warning, 3 info, 4 verbose
_LEVELS: Final = ("internal error", "error", "warning", "info", "verbose")


@dataclass(frozen=True, slots=True)
class Library:
    """One of the libraries, installed or not."""

    name: str
    module: str
    packages: tuple[str, ...]  # distributions that bring the module
    install: str

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None

    @property
    def version(self) -> str:
        """Of the installed library, without importing it.

        Raises:
            BackendUnavailable: it is not installed.
        """
        for package in self.packages:
            try:
                return metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        if not self.installed:
            raise self.missing()
        return str(self.load().__version__)

    def missing(self, reason: str = "") -> BackendUnavailable:
        return BackendUnavailable(f"{self.name} is not installed{f' ({reason})' if reason else ''}", self.install)

    def load(self) -> Any:
        """Import the module.

        Raises:
            BackendUnavailable: it is not installed, or cannot be loaded.
        """
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError, RuntimeError) as error:  # its loader raises all three for a missing library
            raise self.missing(str(error).splitlines()[0] if str(error) else type(error).__name__) from error


# The module's own version is that of the wheel; the wheel's name carries the CUDA version that it is for.
LIBRARY: Final = {
    TENSORRT: Library(TENSORRT, "tensorrt", ("tensorrt", "tensorrt_cu13", "tensorrt_cu12"), "pip install 'mtdp[gpu]'"),
    TENSORRT_RTX: Library(
        TENSORRT_RTX,
        "tensorrt_rtx",
        ("tensorrt_rtx_cu13", "tensorrt_rtx_cu12", "tensorrt_rtx"),
        "pip install 'mtdp[rtx]'",
    ),
}


def says_out_of_memory(message: str) -> bool:
    """Whether an error is for want of memory; "illegal memory access" and the like are not."""
    text = message.lower()
    wants = ("out of memory", "outofmemory", "alloc", "insufficient memory", "memory is insufficient")
    return "illegal" not in text and any(words in text for words in wants)


class Log:
    """What the library says, from information upwards. `logger` is what it wants to be given."""

    def __init__(self, trt: Any) -> None:
        lines: list[tuple[int, str]] = []

        class Logger(trt.ILogger):  # type: ignore[misc]  # the base is known only when the library is
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity.value <= _INFO:
                    lines.append((severity.value, message))

        self._lines = lines
        self.logger = Logger()

    @property
    def text(self) -> str:
        return "".join(f"{_LEVELS[level]}: {message}\n" for level, message in self._lines)

    @property
    def last_error(self) -> str:
        """The last error in one line; empty if there was none."""
        errors = [message for level, message in self._lines if level <= 1]
        return " ".join(errors[-1].split()) if errors else ""
