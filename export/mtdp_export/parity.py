"""How closely an engine repeats the reference: torch in fp32, or the ONNX file that a model was brought as."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mtdp_export.errors import ParityFailure
from mtdp_runtime.backends import Backend
from mtdp_runtime.backends.proof import run_backend
from mtdp_runtime.bundle.golden import FEATURES, TOKENS
from mtdp_runtime.bundle.manifest import Autocast, Manifest, Parity
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

NEIGHBOURS: Final = 5
_FEWER_NEIGHBOURS: Final = 0.05  # than autocast keeps: one in twenty, a handful on so few tiles
_AUTOCAST: Final = "torch autocast"
_OF_TOKENS: Final = "  its tokens"  # a row of its own: of a tile the mean cosine, of the tiles the smallest
_FAILED: Final = {True: "FAIL", False: "too far from the reference; not the default here"}


@dataclass(frozen=True, slots=True)
class Comparison:
    """An engine's outputs against the reference's on the same tiles."""

    backend: str
    precision: str
    parity: Parity
    heads_max_abs_error: float | None  # of the probabilities; None without heads
    required: bool = True  # whether this machine would use it without being told to
    note: str = ""  # how the engine was loaded, such as why a bundle's own was not
    length_max_error: float = 0.0  # of a feature vector's length, relative to the reference's
    least_cosine: float | None = None  # that is required; the precision's own where None
    least_agreement: float = 0.0  # of nearest neighbours, where the cosine is below the precision's own bar
    library: str = ""  # the engine by the name that --backend takes; "" where the graph was computed as typed
    least_tokens_cosine: float | None = None  # as `least_cosine`, of the patch tokens
    tokens_length_error: float = 0.0  # of a tile's tokens in the mean, relative; the largest

    @property
    def passed(self) -> bool:
        """Whether cosine, length and probabilities are as near as the precision must be, and the patch tokens.

        Between the precision's own bar and what autocast allows, the nearest neighbours must be autocast's, too.
        """
        heads_pass = (self.heads_max_abs_error or 0.0) <= MAX_PROBABILITY_ERROR[self.precision]
        length_passes = self.length_max_error <= max_length_error(self.required_cosine)
        near = self.parity.cosine_min >= MIN_COSINE[self.precision]
        agreement = self.parity.knn_agreement
        alike = near or agreement is None or agreement >= self.least_agreement
        near_enough = alike and self.parity.cosine_min >= self.required_cosine
        return heads_pass and length_passes and near_enough and self.tokens_pass

    @property
    def tokens_pass(self) -> bool:
        """Whether the patch tokens are as near as the precision must be; where there are none, they are."""
        cosine, required = self.parity.tokens_cosine_min, self.required_tokens_cosine
        return cosine is None or (cosine >= required and self.tokens_length_error <= max_length_error(required))

    @property
    def required_tokens_cosine(self) -> float:
        return MIN_COSINE[self.precision] if self.least_tokens_cosine is None else self.least_tokens_cosine

    @property
    def required_cosine(self) -> float:
        return MIN_COSINE[self.precision] if self.least_cosine is None else self.least_cosine


@dataclass(frozen=True, slots=True)
class CannotRun:
    """A variant that an engine does not run here; required where it should have."""

    backend: str
    precision: str
    reason: str
    required: bool = False
    passed: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """A variant that an engine ran, and whose outputs are no numbers to compare."""

    backend: str
    precision: str
    reason: str
    required: bool = True
    note: str = ""
    passed: bool = False


Row = Comparison | CannotRun | Refused


def compare(backend: Backend, tiles: NDArray[np.uint8], expected: Mapping[str, NDArray[np.float32]]) -> Comparison:
    """Run the tiles and compare.

    Raises:
        ParityFailure: an output is missing, has another shape, or is not finite.
    """
    return compare_outputs(backend.name, backend.precision, run_backend(backend, tiles), expected)


def compare_outputs(
    engine: str,
    precision: str,
    outputs: Mapping[str, NDArray[np.float32]],
    expected: Mapping[str, NDArray[np.float32]],
) -> Comparison:
    """Compare outputs by name; of the tokens those of the first tiles, which the reference gives.

    Raises:
        ParityFailure: an output is missing, has another shape, or is not finite.
    """
    for name, wanted in expected.items():
        got = outputs.get(name)
        if name == TOKENS and got is not None:
            got = got[: len(wanted)]
        if got is None or got.shape != wanted.shape:
            shown = "missing" if got is None else f"of the shape {got.shape}"
            raise ParityFailure(f"output {name} is {shown}, the reference gives {wanted.shape}")
        if not np.isfinite(got).all():
            rows = int((~np.isfinite(got)).reshape(len(got), -1).any(axis=1).sum())
            raise ParityFailure(f"output {name} is not finite in {rows} of {len(got)} tiles")
    similar = cosines(outputs[FEATURES], expected[FEATURES])
    error = float(np.abs(outputs[FEATURES] - expected[FEATURES]).max())
    heads = [float(np.abs(outputs[n] - w).max()) for n, w in expected.items() if n not in (FEATURES, TOKENS)]
    parity = Parity(
        engine,
        len(expected[FEATURES]),
        float(similar.min()),
        float(similar.mean()),
        error,
        knn_agreement(outputs[FEATURES], expected[FEATURES]),
    )
    stretched = length_error(outputs[FEATURES], expected[FEATURES])
    found = Comparison(engine, precision, parity, max(heads, default=None), length_max_error=stretched)
    if TOKENS not in expected:
        return found
    tokens = outputs[TOKENS][: len(expected[TOKENS])], expected[TOKENS]
    parity = replace(parity, tokens_cosine_min=tokens_cosine(*tokens))
    return replace(found, parity=parity, tokens_length_error=tokens_length_error(*tokens))


def knn_agreement(features: NDArray[np.float32], wanted: NDArray[np.float32]) -> float | None:
    """Return the part of each row's nearest rows, by cosine, that are its nearest in `wanted` too; of 3 rows or more.

    The nearest 5, or as many as leave something out.
    """
    k = min(NEIGHBOURS, len(wanted) - 2)
    if k < 1:
        return None
    shared = [len(set(a) & set(b)) for a, b in zip(_nearest(features, k), _nearest(wanted, k), strict=True)]
    return float(np.mean(shared)) / k


def _nearest(features: NDArray[np.float32], k: int) -> list[list[int]]:
    rows = features.astype(np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    similar = rows @ rows.T
    np.fill_diagonal(similar, -2)
    nearest: list[list[int]] = np.argsort(-similar, axis=1, kind="stable")[:, :k].tolist()
    return nearest


def require(comparison: Comparison | Refused) -> Comparison:
    """Return the comparison if it passed.

    Raises:
        ParityFailure: it did not.
    """
    if isinstance(comparison, Refused):
        raise ParityFailure(
            f"{comparison.precision} on {comparison.backend}: {comparison.reason}",
            f"It was not written. Export without --precision {comparison.precision}."
            if comparison.precision != "fp32"
            else "Nothing was written. The exported graph does not compute what the network does.",
        )
    if not comparison.tokens_pass:
        required = comparison.required_tokens_cosine
        raise ParityFailure(
            f"{comparison.precision} on {comparison.backend}: mean cosine of a tile's tokens to the reference's "
            f"{comparison.parity.tokens_cosine_min:.7f}, {required:.6g} is required (their lengths are off by "
            f"{comparison.tokens_length_error:.3g}, {max_length_error(required):.3g} is allowed)",
            f"It was not written. Export without --tokens, or without --precision {comparison.precision}."
            if comparison.precision != "fp32"
            else "Nothing was written. The exported graph does not compute what the network does.",
        )
    if not comparison.passed:
        precision, parity = comparison.precision, comparison.parity
        longest = max_length_error(comparison.required_cosine)
        raise ParityFailure(
            f"{precision} on {comparison.backend}: smallest cosine to the reference "
            f"{parity.cosine_min:.7f}, {comparison.required_cosine:.6g} is required "
            f"(largest error {parity.max_abs_error:.3g}); largest error of a vector's length "
            f"{comparison.length_max_error:.3g}, {longest:.3g} is allowed; of a probability "
            f"{comparison.heads_max_abs_error or 0.0:.3g}, {MAX_PROBABILITY_ERROR[precision]:g} is allowed",
            "It was not written. "
            + (
                "Calibrate on tissue like what it will see, or export without --precision int8."
                if precision == "int8"
                else "The exported graph does not compute what the network does."
            ),
        )
    return comparison


def judged(comparison: Comparison, manifest: Manifest) -> Comparison:
    """Return the comparison with what the bundle's own measure of autocast requires of it."""
    agreements = [a.knn_agreement for a in manifest.autocast if a.precision == comparison.precision]
    agreement = next((value for value in agreements if value is not None), None)
    return replace(
        comparison,
        least_cosine=least_cosine(manifest, comparison.precision),
        least_agreement=0.0 if agreement is None else agreement - _FEWER_NEIGHBOURS,
        least_tokens_cosine=least_tokens_cosine(comparison.precision, manifest.autocast),
    )


def table(rows: Sequence[Row], yardsticks: Sequence[Autocast] = ()) -> str:
    """Return the rows as lines for a terminal, with what torch's autocast comes to on the same tiles."""
    width = max([len("backend"), *(len(row.backend) for row in rows)]) + 2
    width = max(width, len(_AUTOCAST) + 2) if yardsticks else width
    figures = f"{'cosine min':<12}{'mean':<12}{'max error':<11}{'length':<9}{f'{NEIGHBOURS}-NN':<7}{'heads':<9}"
    lines = [f"{'backend':<{width}}{'precision':<11}{figures}"]
    for row in rows:
        start = f"{row.backend:<{width}}{row.precision:<11}"
        if isinstance(row, CannotRun):
            lines.append(f"{start}not run: {row.reason}")
            continue
        if isinstance(row, Refused):
            lines.append(f"{start}refused: {row.reason}{'' if row.required else '; not the default here'}")
            continue
        p = row.parity
        heads = "-" if row.heads_max_abs_error is None else f"{row.heads_max_abs_error:.1e}"
        agreement = "-" if p.knn_agreement is None else f"{p.knn_agreement:.1%}"
        lines.append(
            f"{start}{p.cosine_min:<12.8f}{p.cosine_mean:<12.8f}{p.max_abs_error:<11.1e}"
            f"{row.length_max_error:<9.1e}{agreement:<7}{heads:<9}{_verdict(row)}"
        )
        if p.tokens_cosine_min is not None:
            verdict = "pass" if row.tokens_pass else _FAILED[row.required]
            figures = f"{p.tokens_cosine_min:<12.8f}{'-':<12}{'-':<11}{row.tokens_length_error:<9.1e}{'-':<7}{'-':<9}"
            lines.append(f"{_OF_TOKENS:<{width}}{row.precision:<11}{figures}{verdict}")
    for one in yardsticks:
        agreement = "-" if one.knn_agreement is None else f"{one.knn_agreement:.1%}"
        figures = f"{one.cosine_min:<12.8f}{one.cosine_mean:<12.8f}{'-':<11}{'-':<9}{agreement:<7}{'-':<9}"
        lines.append(f"{_AUTOCAST:<{width}}{one.precision:<11}{figures}what it is judged by")
        if one.tokens_cosine_min is not None:
            figures = f"{one.tokens_cosine_min:<12.8f}{'-':<12}{'-':<11}{'-':<9}{'-':<7}{'-':<9}"
            lines.append(f"{_OF_TOKENS:<{width}}{one.precision:<11}{figures}what they are judged by")
    for row in rows:
        if not isinstance(row, CannotRun) and row.note:
            lines.append(f"{row.backend} {row.precision}: {row.note}")
    return "\n".join(line.rstrip() for line in lines)


def golden_note(source: str) -> str:
    """Return what a table rests on, by the manifest's golden_source."""
    unproven = "; no real tissue was run: export with --calibration SLIDE|DIR" if source == "synthetic" else ""
    return f"golden tiles: {source or 'not stated where from'}{unproven}"


def _verdict(comparison: Comparison) -> str:
    if comparison.passed:
        return "pass"
    return _FAILED[comparison.required]
