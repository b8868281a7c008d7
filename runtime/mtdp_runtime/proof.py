"""Whether an engine, on this machine, computes what the network did: its golden tiles, run again."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.backends import Backend
from mtdp_runtime.bundle import Bundle
from mtdp_runtime.errors import BundleInvalid

# The smallest cosine between an engine's features and torch's that a precision may have, over all golden tiles.
MIN_COSINE: Final = {"fp32": 0.999999, "fp16": 0.9999, "bf16": 0.9999, "int8": 0.99}
_MOST_GOLDEN_BYTES: Final = 1 << 30
TILES: Final = "tiles"
FEATURES: Final = "features"


def load_golden(path: Path) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.float32]]]:
    """Read golden.npz: the tiles, and by name the outputs that torch gave for them.

    Raises:
        BundleInvalid: it is no such file.
    """
    try:
        # An array's header says its shape before its data are read: what it promises must be in the file.
        with zipfile.ZipFile(path) as members:
            promised_bytes = sum(member.file_size for member in members.infolist())
        if promised_bytes > _MOST_GOLDEN_BYTES:
            raise ValueError(f"{promised_bytes} bytes when unpacked")
        with np.load(path, allow_pickle=False) as archive:
            arrays: dict[str, Any] = {name: archive[name] for name in archive.files}
        tiles = arrays.pop(TILES)
    except (OSError, ValueError, KeyError, EOFError, MemoryError, zlib.error, zipfile.BadZipFile) as error:
        raise BundleInvalid(f"{path}: not golden tiles: {error}", "Copy or export the bundle again.") from error
    if FEATURES not in arrays or len(arrays[FEATURES]) != len(tiles) or not len(tiles):
        raise BundleInvalid(f"{path}: golden tiles without their features", "Copy or export the bundle again.")
    return tiles, arrays


def run_backend(backend: Backend, tiles: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    """Return the outputs for all tiles by name, float32[N, ...]; the last batch is padded with zeros."""
    parts: dict[str, list[NDArray[np.float32]]] = {}
    for start in range(0, len(tiles), backend.batch):
        rows = tiles[start : start + backend.batch]
        batch = np.zeros((backend.batch, *tiles.shape[1:]), np.uint8)
        batch[: len(rows)] = rows
        for name, values in backend.result(backend.submit(batch)).items():
            parts.setdefault(name, []).append(values[: len(rows)])
    return {name: np.concatenate(values) for name, values in parts.items()}


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return float64[N], row by row; two rows of zeros are equal."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    equal_zeros = (np.abs(x).max(axis=1) == 0) & (np.abs(y).max(axis=1) == 0)
    result: NDArray[np.float64] = np.where(
        equal_zeros, 1.0, np.einsum("ij,ij->i", x, y) / np.where(norms > 0, norms, 1)
    )
    return result


def smallest_cosine(backend: Backend, bundle: Bundle) -> float:
    """Replay the bundle's golden tiles.

    Raises:
        BundleError: golden.npz is not what was exported.
    """
    tiles, expected = load_golden(bundle.checked(bundle.manifest.golden))
    return float(cosines(run_backend(backend, tiles)[FEATURES], expected[FEATURES]).min())
