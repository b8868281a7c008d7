"""Whether an engine, on this machine, computes what the network did: its golden tiles, run again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.backends import Backend
from mtdp_runtime.bundle import Bundle
from mtdp_runtime.bundle.golden import FEATURES, golden_of, shown
from mtdp_runtime.bundle.tolerance import MAX_PROBABILITY_ERROR, MIN_COSINE, cosines, length_error, max_length_error
from mtdp_runtime.errors import BundleInvalid


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
            got = shown(outputs[name]) if name in outputs else "nothing"
            raise BundleInvalid(
                f"{bundle.path}: the model gives {got} as {name}, {shown(wanted)} is stated", "Export it again."
            )
    errors = [float(np.abs(outputs[name] - wanted).max()) for name, wanted in expected.items() if name != FEATURES]
    # NumPy's max keeps a NaN, Python's may lose it.
    features, reference = outputs[FEATURES], expected[FEATURES]
    return Replayed(
        float(cosines(features, reference).min()), float(np.max([0.0, *errors])), length_error(features, reference)
    )
