"""How many cores this process may use, and the options that say so."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Final

from mtdp_runtime.errors import UsageError

AUTO: Final = "auto"
_QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")


def usable_cores(quota: Path = _QUOTA) -> int:
    """Return the cores that the system lets this process run on, or the container's share of them where that is less.

    Args:
        quota: the control group's file: microseconds of CPU in a period, or `max`, and the period (Linux, cgroup v2).
    """
    cores = len(os.sched_getaffinity(0))
    try:
        share, period = quota.read_text("ascii").split()
        return cores if share == "max" else max(1, min(cores, math.ceil(int(share) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):
        return cores


def auto_batch(threads: int) -> int:
    """Return how many tiles a CPU takes at a time: two a thread, from 4 to 16.

    The rate hardly depends on it (benchmarks/RESULTS.md), but where it is small the first rows come sooner, and a slide
    of three tiles costs less. It follows from the threads alone, and is not tuned: the last digits of a feature depend
    on the company that its tile had, and the same command should give the same bytes.
    """
    return max(4, min(16, 2 * threads))


def count_or_auto(option: str, text: str) -> int | None:
    """Return the number that an option says; None for `auto`.

    Raises:
        UsageError: it is neither.
    """
    if text == AUTO:
        return None
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise UsageError(f"{option} {text!r}: not a number", hint=f"A whole number from 1 on, or {AUTO}.")
    return int(text)
