"""Makes a bundle's variants and decides which of them go into it. Runs in a process of its own: it runs engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mtdp_export.errors import ExportError, ParityFailure
from mtdp_export.int8 import LARGEST_PROBE_LOSS, Probe, probe_int8, time_int8, write_int8
from mtdp_export.model_store import load_light
from mtdp_export.parity import CannotRun, Comparison, Row, require
from mtdp_export.precision import first_divergence, write_typed
from mtdp_export.rounding import in_fp32
from mtdp_export.typed import LowType
from mtdp_export.verify import replay
from mtdp_runtime.bundle import load_bundle
from mtdp_runtime.bundle.golden import load_golden
from mtdp_runtime.bundle.manifest import Parity

# Whose figures stand for a variant, where they are there: the graph as typed, and ONNX Runtime.
_REFERENCES: Final = frozenset({"", "onnxruntime", "onnxruntime-cuda", "onnxruntime-tensorrt"})


@dataclass(frozen=True, slots=True)
class Made:
    """A variant that lies in the folder, unproven."""

    precision: str
    fp32_kernels: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True)
class Proof:
    """What the engines here say of the variants."""

    rows: list[Row]
    parities: dict[str, tuple[Parity, tuple[Parity, ...]]]  # of those that passed: the reference's, and each engine's
    refused: list[ExportError]
    notes: list[str]


def model_file(precision: str) -> str:
    """Return the name of a variant's file in a bundle."""
    return f"model.{precision}.onnx"


def make_variant(
    base: Path,
    precision: str,
    folder: Path,
    tiles: NDArray[np.uint8],
    expected: Mapping[str, NDArray[np.float32]],
    least_cosine: float | None = None,
    least_tokens: float | None = None,
) -> Made:
    """Write a variant of the fp32 graph `base` into the folder.

    Args:
        base: the fp32 graph.
        precision: fp16, bf16 or int8.
        folder: of the bundle.
        tiles: uint8[N, P, P, 3]: the golden ones, or for int8 those to calibrate on.
        expected: what torch gives for the golden ones.
        least_cosine: that fp16 and bf16 must have; the precision's own where None.
        least_tokens: the same of their patch tokens.

    Raises:
        ParityFailure: no choice of fp32 layers brings it near enough.
        ExportError: the precision cannot be had for this graph.
    """
    out = folder / model_file(precision)
    if precision == "int8":
        write_int8(base, out, tiles)
        return Made(precision, note=f"int8: calibrated on {len(tiles)} tiles")
    low: LowType = "fp16" if precision == "fp16" else "bf16"
    typed = write_typed(base, low, out, tiles, expected, least_cosine, least_tokens)
    note = f"{precision}: {typed.kernels - typed.fp32_kernels} of {typed.kernels} kernels in {precision}"
    return Made(precision, typed.fp32_kernels, note + (f"; in fp32: {typed.kept}" if typed.kept else ""))


def prove(folder: Path, probe_task: Path | None) -> Proof:
    """Run every variant on every engine here, and say which pass.

    An engine that refuses a variant proves nothing either way: that is a row, and the others decide.

    Raises:
        ExportError: the fp32 graph does not pass, or nothing runs it: nothing of this bundle can be trusted.
    """
    rows = replay(folder, ())
    proof = Proof(rows, {}, [], [])
    for variant in load_bundle(folder).manifest.variants:
        precision = variant.precision
        ran = [row for row in rows if row.precision == precision and not isinstance(row, CannotRun)]
        try:
            wanted = [require(row) for row in ran if row.required]
            if not wanted:
                what = f"{precision}: no engine here runs it{_refusals(rows, precision)}"
                raise ExportError(what, "mtdp-doctor says what is missing.")
            probe = _judge_int8(folder, probe_task, proof.notes) if precision == "int8" and probe_task else None
        except ExportError as error:
            if precision == "fp32":
                raise
            proof.refused.append(_with_place(error, folder, precision) if isinstance(error, ParityFailure) else error)
            continue
        compared = [row for row in ran if isinstance(row, Comparison)]
        engines = tuple(row.parity for row in compared if row.library)
        reference = wanted[0].parity
        for row in wanted:
            if row.library in _REFERENCES:
                reference = row.parity
                break
        if probe is not None:
            reference = replace(reference, probe_score=probe.int8, probe_score_fp32=probe.fp32)
        proof.parities[precision] = (reference, engines)
    return proof


def _refusals(rows: Sequence[Row], precision: str) -> str:
    here = [row for row in rows if isinstance(row, CannotRun) and row.precision == precision]
    reasons = [f"{row.backend}: {row.reason}" for row in here]
    return f" ({'; '.join(reasons)})" if reasons else ""


def _judge_int8(folder: Path, task: Path, notes: list[str]) -> Probe:
    speed = time_int8(folder)
    notes.append(str(speed))
    if speed.times_as_fast <= 1:
        raise ExportError(f"int8: not written: it is not the fastest here: {speed}", "Export without --precision int8.")
    probe = probe_int8(folder, speed.engine, task)
    notes.append(str(probe))
    if probe.fp32 - probe.int8 > LARGEST_PROBE_LOSS:
        raise ExportError(
            f"int8: not written: {probe}; {LARGEST_PROBE_LOSS} less is allowed",
            "Calibrate on tissue like the task's, or export without --precision int8.",
        )
    return probe


def _with_place(error: ExportError, folder: Path, precision: str) -> ParityFailure:
    """Add where it left the path."""
    tiles, _ = load_golden(folder / "golden.npz")
    if not (folder / model_file("fp32")).is_file():
        return ParityFailure(str(error), error.hint)
    reference, variant = (load_light(folder / model_file(p)) for p in ("fp32", precision))
    if precision != "int8":
        variant = in_fp32(variant)
    where = first_divergence(reference, variant, tiles, precision, folder)
    return ParityFailure(f"{error}; {where}", error.hint)
