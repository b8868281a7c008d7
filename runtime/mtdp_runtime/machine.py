"""What this machine is: the cores that this process may use, what its CPU can, and who ends with whom."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
from pathlib import Path
from typing import Final

_QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


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


def fast_bf16_units(cpuinfo: str) -> str:
    """Name what makes bf16 faster than fp32 on this CPU; empty where nothing does.

    Vector instructions (avx512_bf16) double the rate on AMD's CPUs. On Intel's they were slower than fp32, without AMX.
    Measured: benchmarks/RESULTS.md.
    """
    words = set(cpuinfo.split())
    if "amx_bf16" in words:
        return "AMX matrix units"
    return "AMD's vector units" if {"avx512_bf16", "AuthenticAMD"} <= words else ""


def cpuinfo() -> str:
    """Return what Linux says of the CPUs; empty elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def this_cpu(cpuinfo: str) -> str:
    """Return the lines that name the CPU and say what it can, each once; two of one name may differ in the latter."""
    kinds = ("model name", "cpu part", "flags", "features")
    return "\n".join(sorted({line for line in cpuinfo.splitlines() if line.lower().startswith(kinds)}))


def die_with(parent: int) -> None:
    """Ask the kernel to end this process with its parent, however that dies; where it is dead already, end now."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
