"""What can go wrong, for the person who reads it.

MtdpError               anything below: one line of what happened, and a hint
|- UsageError           an option or a path as typed cannot be used            (exit 2)
|- TaskError            a task folder, manifest or pool is not as it should be (exit 1)
|  `- PoolError         ... the pool file itself, so nothing could start         (exit 2)
|- ImageUnreadable      an image file cannot be decoded                        (exit 1)
|- WeightsError         weights cannot be had or do not fit                    (exit 2)
|- CheckpointError      a checkpoint cannot be read, or is of another run      (exit 2)
|- TrainingDiverged     the loss, or what the network gives, is not finite     (exit 1)
|- OutOfMemory          the memory of the GPU or of the machine is too small    (exit 1)
|- CellsFailed          cells of a protocol failed; the others are done         (exit 1)
`- Interrupted          a signal stopped the run; its state is on disk         (exit 128 + signal)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

LIST_ITEM: Final = "\n  "  # before each thing of a message that names several
LOWER_RATE: Final = "it diverged in its last steps: train it at a lower learning rate"


def or_overflow(hint: str, precision: str) -> str:
    """The hint on values that are not finite: in fp16, a sound network may have them, too."""
    if precision != "fp16":
        return hint
    return f"{hint}; or use --precision fp32, since in fp16 what is above 65504 is not finite"


class MtdpError(Exception):
    """One line of what happened; `hint` is the next thing to do."""

    exit_code: int = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(MtdpError):
    """An option or a path, as typed, cannot be used."""

    exit_code = 2


class TaskError(MtdpError):
    """A task folder, a manifest or a pool file is not as it should be."""


class PoolError(TaskError):
    """A pool file is not as it should be."""

    exit_code = 2


class ImageUnreadable(MtdpError):
    """An image file cannot be decoded."""


class WeightsError(MtdpError):
    """Weights cannot be had, or do not fit the architecture."""

    exit_code = 2


class CheckpointError(MtdpError):
    """A checkpoint cannot be read, or belongs to another run."""

    exit_code = 2


class TrainingDiverged(MtdpError):
    """The loss, or what the trained network gives, is no longer a finite number."""


class OutOfMemory(MtdpError):
    """The memory of the GPU or of the machine does not suffice."""


class CellsFailed(MtdpError):
    """Cells of a protocol could not be computed; the others are done."""


class Interrupted(MtdpError):
    """A signal stopped the run after its state was saved."""

    def __init__(self, signum: int, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.signum = signum
        self.exit_code = 128 + signum


@contextmanager
def system_said(hint: str) -> Iterator[None]:
    """Turn what the system refuses of a task's files into a line that names the file.

    Raises:
        TaskError: the body raised an `OSError`.
    """
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        raise TaskError(f"{where}{error.strerror or error}", hint) from error
