"""Whether an engine, on this machine, computes what the network did: its golden tiles, run again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.backends import Backend
from mtdp_runtime.bundle import Bundle
from mtdp_runtime.bundle.golden import FEATURES, TOKENS, golden_of, shown
from mtdp_runtime.bundle.tolerance import (
    MAX_PROBABILITY_ERROR,
    MIN_COSINE,
    cosines,
    least_cosine,
    least_tokens_cosine,
    length_error,
    max_length_error,
    tokens_cosine,
    tokens_length_error,
)
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
    tokens_cosine: float = 1.0  # as `tolerance.tokens_cosine`; 1 where no tokens are asked for
    tokens_length_error: float = 0.0

    def shortfall(self, precision: str, least: float | None = None, least_of_tokens: float | None = None) -> str:
        """Say what this precision lacks, to follow the engine's name; empty where it passes.

        `least` is the smallest cosine that the bundle may have at it (`least_cosine`), `least_of_tokens` that of its
        tokens; the precision's own where None. `lacks` takes both from the bundle.
        """
        least, of_tokens = (MIN_COSINE[precision] if one is None else one for one in (least, least_of_tokens))
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
        if not self.tokens_cosine >= of_tokens:
            return f"has a cosine of {self.tokens_cosine:.6f} to its golden tokens here, {of_tokens:.6g} is required"
        if not self.tokens_length_error <= max_length_error(of_tokens):
            longest = max_length_error(of_tokens)
            return f"has tokens that are {self.tokens_length_error:.3g} too long or too short, {longest:.3g} is allowed"
        return ""


def lacks(found: Replayed, bundle: Bundle, precision: str) -> str:
    """Return the shortfall by the bundle's own bars: its measure of torch's autocast is among them."""
    stated = bundle.manifest
    return found.shortfall(precision, least_cosine(stated, precision), least_tokens_cosine(precision, stated.autocast))


def replay(backend: Backend, bundle: Bundle) -> Replayed:
    """Run the bundle's golden tiles and compare every output.

    Raises:
        BundleError: golden.npz is not what was exported, or the model lacks an output that bundle.json states.
    """
    tiles, expected = golden_of(bundle)
    outputs = run_backend(backend, tiles)
    if TOKENS in expected and TOKENS in outputs:
        outputs[TOKENS] = outputs[TOKENS][: len(expected[TOKENS])]
    for name, wanted in expected.items():
        if name not in outputs or outputs[name].shape != wanted.shape:
            got = shown(outputs[name]) if name in outputs else "nothing"
            raise BundleInvalid(
                f"{bundle.path}: the model gives {got} as {name}, {shown(wanted)} is stated", "Export it again."
            )
    heads = [name for name in expected if name not in (FEATURES, TOKENS)]
    errors = [float(np.abs(outputs[name] - expected[name]).max()) for name in heads]
    # NumPy's max keeps a NaN, Python's may lose it.
    features, reference = outputs[FEATURES], expected[FEATURES]
    found = Replayed(
        float(cosines(features, reference).min()), float(np.max([0.0, *errors])), length_error(features, reference)
    )
    if TOKENS not in expected:
        return found
    tokens = outputs[TOKENS], expected[TOKENS]
    return replace(found, tokens_cosine=tokens_cosine(*tokens), tokens_length_error=tokens_length_error(*tokens))
