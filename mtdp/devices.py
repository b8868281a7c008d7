"""The device to train on, its precision, and memory that is kept."""

import contextlib
import ctypes
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import torch

from mtdp.errors import UsageError

PRECISIONS: Final = ("auto", "fp32", "bf16")
_M_MMAP_MAX: Final = -4
_M_TRIM_THRESHOLD: Final = -1
_M_TOP_PAD: Final = -2


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_precision(precision: str, device: torch.device) -> str:
    """fp32 or bf16; `auto` takes bf16 where the device computes faster in it."""
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r} is unknown", f"one of {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if has_fast_bf16(_cpuinfo()) else "fp32"


def usable_cores() -> int:
    """The cores that this process may run on, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context in which a forward pass runs at this precision."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def keep_freed_memory() -> None:
    """Tells the C library to keep large blocks instead of handing each back to the system.

    A training step allocates gigabytes anew; without this, clearing their pages takes as long as the computing.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TOP_PAD, 2**28)


def has_fast_bf16(cpuinfo: str) -> bool:
    """Say whether a CPU trains faster in bf16: with AMX, or with AMD's vector instructions (Zen 4 and 5).

    Intel's vector instructions alone (avx512_bf16) were slower than fp32. Measured: benchmarks/RESULTS.md.
    """
    words = set(cpuinfo.split())
    return "amx_bf16" in words or {"avx512_bf16", "AuthenticAMD"} <= words


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
