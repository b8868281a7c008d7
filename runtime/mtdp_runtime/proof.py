"""Whether an engine, on this machine, computes what the network did: its golden tiles, run again."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.backends import Backend
from mtdp_runtime.bundle import Bundle
from mtdp_runtime.errors import BundleInvalid
from mtdp_runtime.manifest import Autocast, Manifest

# The smallest cosine between an engine's features and torch's that a precision may have, over all golden tiles.
MIN_COSINE: Final = {"fp32": 0.999999, "fp16": 0.9999, "bf16": 0.9999, "int8": 0.99}
# A cosine is blind to length: a sum in place of a mean, or features scaled to 1, would pass. By as much as a precision
# may turn a vector it may stretch it.


def max_length_error(least_cosine: float) -> float:
    """Return by how much a vector may be stretched, relative to the reference's, where it may be turned so far."""
    return math.sqrt(2 * (1 - least_cosine))


MAX_LENGTH_ERROR: Final = {name: max_length_error(cosine) for name, cosine in MIN_COSINE.items()}
# The largest difference that a probability may have. A cosine says little of two or three numbers that sum to 1.
MAX_PROBABILITY_ERROR: Final = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.05, "int8": 0.1}
# An engine rounds elsewhere than torch's autocast does. Two roundings of its size, independent of each other, are twice
# as far (1 - cosine adds up where errors do not depend on each other). Below FLOOR nothing is taken for the network.
_TIMES_AUTOCAST: Final = 2.0
_FLOOR: Final = 0.999
_MOST_GOLDEN_BYTES: Final = 1 << 30
TILES: Final = "tiles"
FEATURES: Final = "features"


def least_cosine(manifest: Manifest, precision: str) -> float:
    """Return the smallest cosine to the reference that a bundle's features may have at a precision.

    That of MIN_COSINE; where torch's own autocast, which is what people run, is further from fp32 than that allows,
    twice its distance (see docs/bundle.md).
    """
    return least_cosine_of(precision, manifest.autocast)


def least_cosine_of(precision: str, autocast: Sequence[Autocast]) -> float:
    """Return the same by what was measured of autocast."""
    for measured in autocast:
        if measured.precision == precision:
            as_far = 1 - _TIMES_AUTOCAST * (1 - measured.cosine_min)
            return min(MIN_COSINE[precision], max(_FLOOR, as_far))
    return MIN_COSINE[precision]


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
    wrong = _wrong_arrays(tiles, arrays)
    if wrong:
        raise BundleInvalid(f"{path}: not golden tiles: {wrong}", "Copy or export the bundle again.")
    return tiles, arrays


def _wrong_arrays(tiles: NDArray[Any], outputs: Mapping[str, NDArray[Any]]) -> str:
    """Say what is wrong with the arrays of a golden.npz; empty if nothing is."""
    if tiles.dtype != np.uint8 or tiles.ndim != 4 or tiles.shape[3] != 3 or not tiles.size:
        return f"{TILES} is {_shown(tiles)}, not uint8[N, P, P, 3]"
    if FEATURES not in outputs:
        return f"it holds no {FEATURES}"
    for name, values in outputs.items():
        if values.dtype != np.float32 or values.ndim != 2 or len(values) != len(tiles) or not values.size:
            return f"{name} is {_shown(values)}, not float32[{len(tiles)}, ...]"
        if not np.isfinite(values).all():  # it would compare with nothing, and pass unseen
            return f"{name} is not finite"
    return ""


def _shown(array: NDArray[Any]) -> str:
    return f"{array.dtype}[{', '.join(map(str, array.shape))}]"


def golden_of(bundle: Bundle) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.float32]]]:
    """Read a bundle's golden tiles and what the reference gave for them, of the sizes that bundle.json states.

    Raises:
        BundleError: golden.npz is not what was exported, or not of this model.
    """
    manifest = bundle.manifest
    path = bundle.checked(manifest.golden)
    tiles, outputs = load_golden(path)
    side = (manifest.tile_px, manifest.tile_px, 3)
    wanted = {FEATURES: manifest.features_dim, **{head.output: len(head.class_names) for head in manifest.heads}}
    stored = {name: values.shape[1] for name, values in outputs.items()}
    if tiles.shape[1:] != side or stored != wanted:
        what = ", ".join(f"{name} of {width}" for name, width in stored.items())
        raise BundleInvalid(
            f"{path}: tiles of {' x '.join(map(str, tiles.shape[1:]))}, {what}; bundle.json states "
            f"{' x '.join(map(str, side))}, {', '.join(f'{name} of {width}' for name, width in wanted.items())}",
            "Copy or export the bundle again.",
        )
    return tiles, outputs


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


def length_error(features: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Return by how much a row's length is off at most, relative to the reference's; NaN where one is not finite."""
    got, reference = (np.linalg.norm(rows.astype(np.float64), axis=1) for rows in (features, wanted))
    return float((np.abs(got - reference) / np.where(reference > 0, reference, 1)).max())


@dataclass(frozen=True, slots=True)
class Replayed:
    """How an engine repeats the golden outputs here."""

    cosine: float  # the smallest of the features, over all tiles; NaN where one is not finite
    probability_error: float = 0.0  # the largest; 0 without heads
    length_error: float = 0.0  # the largest of a feature vector's, relative

    def shortfall(self, precision: str, least: float | None = None) -> str:
        """What this precision lacks, to follow the engine's name; empty where it passes.

        `least` is the smallest cosine that the bundle may have at it (`least_cosine`); the precision's own where None.
        """
        least = MIN_COSINE[precision] if least is None else least
        longest = max_length_error(least)
        if not self.cosine >= least:
            return f"has a cosine of {self.cosine:.6f} to its golden features here, {least:.6g} is required"
        if not self.length_error <= longest:
            return f"has features that are {self.length_error:.3g} too long or too short here, {longest:.3g} is allowed"
        if not self.probability_error <= MAX_PROBABILITY_ERROR[precision]:
            return (
                f"is off by {self.probability_error:.3g} in a probability of its golden tiles here, "
                f"{MAX_PROBABILITY_ERROR[precision]:g} is allowed"
            )
        return ""


def replay(backend: Backend, bundle: Bundle) -> Replayed:
    """Run the bundle's golden tiles and compare every output.

    Raises:
        BundleError: golden.npz is not what was exported, or the model lacks an output that bundle.json states.
    """
    tiles, expected = golden_of(bundle)
    outputs = run_backend(backend, tiles)
    for name, wanted in expected.items():
        if name not in outputs or outputs[name].shape != wanted.shape:
            got = _shown(outputs[name]) if name in outputs else "nothing"
            raise BundleInvalid(
                f"{bundle.path}: the model gives {got} as {name}, {_shown(wanted)} is stated", "Export it again."
            )
    errors = [float(np.abs(outputs[name] - wanted).max()) for name, wanted in expected.items() if name != FEATURES]
    # NumPy's max keeps a NaN, Python's may lose it.
    features, reference = outputs[FEATURES], expected[FEATURES]
    return Replayed(
        float(cosines(features, reference).min()), float(np.max([0.0, *errors])), length_error(features, reference)
    )
