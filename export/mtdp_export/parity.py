"""How closely an engine repeats the reference: torch in fp32, or the ONNX file that a model was brought as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mtdp_export.errors import ParityFailure
from mtdp_runtime.backends import Backend
from mtdp_runtime.bundle import Parity
from mtdp_runtime.proof import FEATURES, MIN_COSINE, cosines, run_backend

# The largest difference that a probability may have. A cosine says little of two or three numbers that sum to 1.
MAX_PROBABILITY_ERROR: Final = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.05, "int8": 0.1}


@dataclass(frozen=True, slots=True)
class Comparison:
    """An engine's outputs against the reference's on the same tiles."""

    backend: str
    precision: str
    parity: Parity
    heads_max_abs_error: float | None  # of the probabilities; None without heads
    required: bool = True  # whether this machine would use it without being told to

    @property
    def passed(self) -> bool:
        heads_pass = (self.heads_max_abs_error or 0.0) <= MAX_PROBABILITY_ERROR[self.precision]
        return heads_pass and self.parity.cosine_min >= MIN_COSINE[self.precision]


def compare(backend: Backend, tiles: NDArray[np.uint8], expected: Mapping[str, NDArray[np.float32]]) -> Comparison:
    """Run the tiles and compare.

    Raises:
        ParityFailure: an output is missing, has another shape, or is not finite.
    """
    outputs = run_backend(backend, tiles)
    for name, wanted in expected.items():
        got = outputs.get(name)
        if got is None or got.shape != wanted.shape or not np.isfinite(got).all():
            shown = "missing" if got is None else f"{got.shape}, finite: {bool(np.isfinite(got).all())}"
            raise ParityFailure(f"{backend.name}: output {name}: {shown}; the reference gives {wanted.shape}")
    similar = cosines(outputs[FEATURES], expected[FEATURES])
    error = float(np.abs(outputs[FEATURES] - expected[FEATURES]).max())
    heads = [float(np.abs(outputs[n] - w).max()) for n, w in expected.items() if n != FEATURES]
    parity = Parity(backend.name, len(tiles), float(similar.min()), float(similar.mean()), error)
    return Comparison(backend.name, backend.precision, parity, max(heads, default=None))


def require(comparison: Comparison) -> Comparison:
    """Return the comparison if it passed.

    Raises:
        ParityFailure: it did not.
    """
    if not comparison.passed:
        raise ParityFailure(
            f"{comparison.precision} on {comparison.backend}: smallest cosine to the reference "
            f"{comparison.parity.cosine_min:.7f}, {MIN_COSINE[comparison.precision]} is required "
            f"(largest error {comparison.parity.max_abs_error:.3g}); largest error of a probability "
            f"{comparison.heads_max_abs_error or 0.0:.3g}, {MAX_PROBABILITY_ERROR[comparison.precision]:g} is allowed",
            "The bundle was not written: the exported graph does not compute what the network does.",
        )
    return comparison


def table(comparisons: list[Comparison]) -> str:
    """Return the comparisons as lines for a terminal."""
    lines = [f"{'backend':<24}{'precision':<11}{'cosine min':<12}{'mean':<12}{'max error':<11}heads"]
    for c in comparisons:
        heads = "-" if c.heads_max_abs_error is None else f"{c.heads_max_abs_error:.1e}"
        lines.append(
            f"{c.backend:<24}{c.precision:<11}{c.parity.cosine_min:<12.8f}{c.parity.cosine_mean:<12.8f}"
            f"{c.parity.max_abs_error:<11.1e}{heads:<9}{_verdict(c)}"
        )
    return "\n".join(lines)


def _verdict(comparison: Comparison) -> str:
    if comparison.passed:
        return "pass"
    return "FAIL" if comparison.required else "too far from the reference; not the default here"
