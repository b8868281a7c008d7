"""What the exporter refuses.

    ExportError            the bundle was not written (exit code 1)
    ├── ExportUsageError   the options are wrong (exit code 2)
    ├── Stalled            a step took too long and was ended (exit code 2)
    └── ParityFailure      the exported model does not compute what torch does

Errors of the training core (MtdpError) and of the runtime (RuntimeFailure) pass through as they are.
"""

from __future__ import annotations


class ExportError(Exception):
    """One line of what happened; `hint` is the next thing to do."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ExportUsageError(ExportError):
    """The options are wrong; nothing was started."""

    exit_code = 2


class Stalled(ExportError):
    """A step took longer than --stall-limit, as it may with a hostile file, and was ended."""

    exit_code = 2


class ParityFailure(ExportError):
    """A variant is further from torch than its precision allows; it was not written."""
