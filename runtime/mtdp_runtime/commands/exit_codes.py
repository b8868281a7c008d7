"""What the exit codes mean: one table for all commands."""

from __future__ import annotations

from typing import Final

DONE: Final = 0
FAILED: Final = 1
REFUSED: Final = 2
LEFT: Final = 3

MEANINGS: Final = {
    "0": "all is done",
    "1": "something failed (a slide, an engine's test, a check); all else is done",
    "2": "nothing could start or go on: a wrong option, model or folder, a full disk",
    "3": "nothing failed, but slides were left to another run that works on them",
    "130, 143": "stopped by SIGINT, SIGTERM; the same command continues",
}
HELP: Final = "Exit codes: " + "; ".join(f"{code}: {meaning}" for code, meaning in MEANINGS.items()) + "."


def of_run(failed: int, left: int) -> int:
    """Return the exit code of a run in which so many slides failed, and so many were left to another run.

    >>> of_run(0, 0), of_run(2, 1), of_run(0, 1)
    (0, 1, 3)
    """
    return FAILED if failed else LEFT if left else DONE
