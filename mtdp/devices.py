"""The device to train on, its precision and what fp16 needs beside it, and memory that is kept."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import torch

from mtdp.errors import OutOfMemory, UsageError

PRECISIONS: Final = ("auto", "fp32", "bf16", "fp16")
_FP16_TENSOR_CORES: Final = (7, 0)  # compute capability of Volta, the first with them
_M_MMAP_MAX: Final = -4
_M_TRIM_THRESHOLD: Final = -1
_M_TOP_PAD: Final = -2


def best_device() -> torch.device:
    """Return the first GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_precision(precision: str, device: torch.device) -> str:
    """fp32, bf16 or fp16; `auto` takes bf16 where the device computes faster in it.

    On a GPU that would only emulate bf16 (Volta, Turing), `auto` takes fp16; on a CPU it never does.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r} is unknown", f"one of {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        return "fp16" if torch.cuda.get_device_capability(device) >= _FP16_TENSOR_CORES else "fp32"
    return "bf16" if has_fast_bf16(_cpuinfo()) else "fp32"


def usable_cores() -> int:
    """The cores that this process may run on, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context in which a forward pass runs at this precision."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.float16 if precision == "fp16" else torch.bfloat16)


def gradient_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """What multiplies the loss, so that small gradients do not vanish in fp16, and divides the gradients again.

    Of any other precision it is switched off: it hands on the loss itself, and its step is the optimiser's own.
    """
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def take_step(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    """Divide the gradients by the scale, and step.

    In fp16, gradients that are not finite mean that the scale was too large: there is no step, which leaves weights and
    momentum alone, and the scale is halved. It is doubled after 2000 steps without that. Call it last, after all that
    changes gradients, so that what is found finite is what is applied; and after they were averaged over processes, so
    that all find the same.
    """
    scaler.step(optimizer)
    scaler.update()


def gradients_overflow(scaler: torch.amp.GradScaler) -> bool:
    """Whether the gradients were not finite even where the loss was not multiplied any more.

    Such a run would go on for ever without a step. Reading this waits for the GPU.
    """
    return scaler.get_scale() < 1.0


def keep_freed_memory() -> None:
    """Tell the C library to keep large blocks instead of handing each back to the system.

    A training step allocates gigabytes anew; without this, clearing their pages takes as long as the computing.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TOP_PAD, 2**28)


@contextlib.contextmanager
def out_of_memory_said(what: str, hint: str) -> Iterator[None]:
    """Turn an allocation that fails, on the GPU or the CPU, into a line that names the option which helps.

    Raises:
        OutOfMemory: the body ran out of memory.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(f"{what}: out of memory ({_first_line(error)})", hint) from error
    except RuntimeError as error:  # PyTorch's allocator of the CPU has no class of its own for it
        if "DefaultCPUAllocator" not in str(error) and "can't allocate memory" not in str(error):
            raise
        raise OutOfMemory(f"{what}: out of memory ({_first_line(error)})", hint) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no more is known"])[0][:160]


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
