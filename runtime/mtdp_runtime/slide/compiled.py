"""The averaging in C, where this installation has it: `average.c`, which gives the very numbers of `resample`.

It is called without the lock of the interpreter. Where it cannot be used, a reason is said, and NumPy averages.
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.slide.cells import Cells

SOURCE: Final = Path(__file__).with_name("average.c")
LIBRARY: Final = Path(__file__).with_name("libmtdp_average.so")

_own = threading.local()


class Compiled(NamedTuple):
    """The function of a library that was loaded."""

    average: Any  # as `average.c` declares it
    level: int  # of the processor: 1 with AVX2

    @property
    def name(self) -> str:
        """For a person."""
        return "compiled, AVX2" if self.level else "compiled, without AVX2"


@cache
def compiled() -> Compiled | str:
    """Return what averages, or why it is not there; looked for once in a process."""
    return load(LIBRARY)


def described() -> str:
    """Say what averages, for a person."""
    found = compiled()
    return f"by NumPy, which takes several times as long: {found}" if isinstance(found, str) else found.name


def load(library: Path) -> Compiled | str:
    """Load a library that was built from the source beside this file; return why it cannot be used otherwise."""
    if not library.exists():
        return f"{library.name} is missing: install again where there is a C compiler"
    try:
        loaded = ctypes.CDLL(str(library))
        stated = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(loaded, "mtdp_average_source")))
        average, level = loaded.mtdp_average, loaded.mtdp_average_level
    except (OSError, ValueError, AttributeError) as error:  # another processor's, a damaged one
        return f"{library.name} cannot be loaded: {error}"
    if stated.decode("ascii", "replace") != hashlib.sha256(SOURCE.read_bytes()).hexdigest():
        return f"{library.name} was built from another version: install again"
    pointer, whole = ctypes.c_void_p, ctypes.c_long
    axis = (pointer, pointer, pointer, whole)
    average.restype = None
    average.argtypes = (ctypes.c_int, pointer, whole, whole, pointer, whole, whole, whole, *axis, *axis, pointer)
    return Compiled(average, int(level()))


class _Axis(NamedTuple):
    """Cells as the library takes them; the numbers are addresses, and the arrays keep what lies there."""

    arguments: tuple[int, int, int, int]  # first, weights, factors, taps
    arrays: tuple[NDArray[np.int32], NDArray[np.int16], NDArray[np.float32]]


@lru_cache(maxsize=256)
def _down(of: Cells) -> _Axis:
    return _axis(of.first, of.weights, of.down_factors())


@lru_cache(maxsize=256)
def _across(of: Cells) -> _Axis:
    """Return weights as int16[taps / 2, out_px, 4, 2], factors as float32[out_px, 4]: for each channel, and none."""
    out_px, taps = of.weights.shape
    pairs = of.weights.reshape(out_px, taps // 2, 1, 2).transpose(1, 0, 2, 3)
    return _axis(of.first, np.repeat(pairs, 4, axis=2), np.repeat(of.across_factors(), 4))


def _axis(first: NDArray[np.int32], weights: NDArray[np.int16], factors: NDArray[np.float32]) -> _Axis:
    arrays = (np.ascontiguousarray(first), np.ascontiguousarray(weights), np.ascontiguousarray(factors))
    taps = weights.shape[1] if weights.ndim == 2 else 2 * weights.shape[0]
    return _Axis((arrays[0].ctypes.data, arrays[1].ctypes.data, arrays[2].ctypes.data, taps), arrays)


def average(library: Compiled, out: NDArray[np.uint8], source: NDArray[np.uint8], down: Cells, across: Cells) -> None:
    """Fill out, uint8[H, W, 3], from source, uint8[h, w, 3]: pixels lie side by side in both, lines anywhere."""
    assert source.strides[1:] == (3, 1) == out.strides[1:]
    (height, width), source_width = out.shape[:2], source.shape[1]
    needed = 2 * (3 * source_width + 8) + 3 * width + 8
    memory: NDArray[np.uint8] | None = getattr(_own, "memory", None)
    if memory is None or memory.size < needed:
        memory = _own.memory = np.empty(needed, np.uint8)
    rows, columns = _down(down), _across(across)
    library.average(
        library.level,
        source.ctypes.data,
        source.strides[0],
        source_width,
        out.ctypes.data,
        out.strides[0],
        height,
        width,
        *rows.arguments,
        *columns.arguments,
        memory.ctypes.data,
    )
