"""How far an engine's numbers may be from the reference's, by precision, and how that is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.bundle.manifest import Autocast, Manifest

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
# As near as torch's autocast, which is what people run. A quarter more, because the smallest of a few cosines differs
# by that much between engines that round alike, in other places. Below FLOOR nothing is taken for the network.
_TIMES_AUTOCAST: Final = 1.25
_FLOOR: Final = 0.999


def least_cosine(manifest: Manifest, precision: str) -> float:
    """Return the smallest cosine to the reference that a bundle's features may have at a precision.

    That of MIN_COSINE; where torch's own autocast, which is what people run, is further from fp32 than that allows,
    its distance and a quarter (see docs/bundle.md).
    """
    return least_cosine_of(precision, manifest.autocast)


def least_cosine_of(precision: str, autocast: Sequence[Autocast]) -> float:
    """Return the same by what was measured of autocast."""
    return _least(precision, [one.cosine_min for one in autocast if one.precision == precision])


def least_tokens_cosine(precision: str, autocast: Sequence[Autocast]) -> float:
    """Return the smallest `tokens_cosine` that a bundle may have at a precision: by the same rule, of its tokens."""
    measured = [one.tokens_cosine_min for one in autocast if one.precision == precision]
    return _least(precision, [cosine for cosine in measured if cosine is not None])


def _least(precision: str, autocast: Sequence[float]) -> float:
    as_far = [1 - _TIMES_AUTOCAST * (1 - cosine) for cosine in autocast[:1]]
    return min([MIN_COSINE[precision], *(max(_FLOOR, cosine) for cosine in as_far)])


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


def tokens_cosine(tokens: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Return the smallest of the tiles' mean cosines, of patch tokens float32[N, T, D]; NaN where one is not finite."""
    return float(np.min([cosines(*pair).mean() for pair in zip(tokens, wanted, strict=True)]))


def tokens_length_error(tokens: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Return by how much a tile's tokens are too long or too short in the mean, relative; NaN as above."""
    got, reference = (np.linalg.norm(rows.astype(np.float64), axis=2) for rows in (tokens, wanted))
    return float((np.abs(got - reference) / np.where(reference > 0, reference, 1)).mean(axis=1).max())
