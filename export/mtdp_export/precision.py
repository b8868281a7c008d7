"""The low-precision variants of a graph, and which of its layers a measurement keeps in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray

from mtdp_export.errors import ExportError, ParityFailure
from mtdp_export.rounding import in_fp32, run
from mtdp_export.typed import KERNELS, LowType, kernel_names, to_low_type
from mtdp_runtime.bundle.golden import FEATURES
from mtdp_runtime.bundle.tolerance import MIN_COSINE, cosines

# Of the distance to torch that a precision is allowed, the part that rounding may take; engines sum in other orders.
_SHARE: Final = 0.5
_VALUES_AT_ONCE: Final = 16  # intermediate maps are large: this many are kept at a time


@dataclass(frozen=True, slots=True)
class TypedVariant:
    """What was written, and what it took."""

    low: LowType
    fp32_kernels: int  # the first ones, which stay in fp32
    kernels: int
    cosine_min: float  # of its roundings alone, sums in fp32


def write_typed(
    model_file: Path, low: LowType, out: Path, tiles: NDArray[np.uint8], expected: Mapping[str, NDArray[np.float32]]
) -> TypedVariant:
    """Write the typed variant with as few fp32 kernels as the tiles allow.

    A rounding in the first kernels runs through all the others: in a DenseNet-121 the stem alone makes four fifths of
    the distance. So the first 0, 1, 2, 4, 8, ... kernels stay in fp32, as many as it takes, and half of them at most.

    Args:
        model_file: the fp32 graph.
        low: type of the variant.
        out: file to write.
        tiles: uint8[N, P, P, 3], real tissue where possible.
        expected: what torch gives for them.

    Raises:
        ParityFailure: even with half of the kernels in fp32 it is too far from torch, or a weight does not fit into
            the type.
        ExportError: nothing in the graph would compute in the type.
    """
    model = onnx.load(model_file)
    kernels = kernel_names(model)
    if not kernels:
        raise ExportError(
            f"--precision {low}: no convolution and no matrix product of this graph can compute in {low}",
            f"Export without --precision {low}.",
        )
    allowed = _SHARE * (1 - MIN_COSINE[low])
    tried: list[str] = []
    wide = 0
    while wide <= len(kernels) // 2:
        typed = to_low_type(model, low, kernels[:wide])
        got = run(in_fp32(typed), tiles)[FEATURES]
        cosine = float(cosines(got, expected[FEATURES]).min()) if np.isfinite(got).all() else float("nan")
        if 1 - cosine <= allowed:
            out.write_bytes(typed.SerializeToString(deterministic=True))
            return TypedVariant(low, wide, len(kernels), cosine)
        tried.append(f"{cosine:.6f} with {wide}")
        wide = max(1, 2 * wide)
    where = first_divergence(model, in_fp32(to_low_type(model, low)), tiles, low)
    raise ParityFailure(
        f"{low}: too far from torch: smallest cosine {', '.join(tried)} of {len(kernels)} kernels in fp32, "
        f"{1 - allowed:.6f} is wanted; {where}",
        f"Export without --precision {low}.",
    )


def first_divergence(
    reference: onnx.ModelProto, variant: onnx.ModelProto, tiles: NDArray[np.uint8], precision: str
) -> str:
    """Say which layer leaves the path first: the first kernel or sum whose output is too far from the fp32 graph's.

    Args:
        reference: the fp32 graph.
        variant: runs in ONNX Runtime; has values of the same names.
        tiles: uint8[N, P, P, 3]; four of them are used.
        precision: says how far is too far.
    """
    there = {name for node in variant.graph.node for name in node.output}
    steps = [
        (node, node.output[0])
        for node in reference.graph.node
        if node.op_type in KERNELS | {"Add", "BatchNormalization", "LayerNormalization"} and node.output[0] in there
    ]
    worst, worst_at = 2.0, ""
    some = tiles[:4]
    for start in range(0, len(steps), _VALUES_AT_ONCE):
        part = steps[start : start + _VALUES_AT_ONCE]
        names = [name for _, name in part]
        wanted, got = run(reference, some, names), run(variant, some, names)
        for node, name in part:
            with np.errstate(all="ignore"):
                flat = [values.reshape(len(some), -1).astype(np.float32) for values in (wanted[name], got[name])]
                cosine = float(cosines(flat[0], flat[1]).min())
            if not cosine >= MIN_COSINE[precision]:
                return f"the first layer that leaves the path is {_shown(node)}: cosine {cosine:.6f}"
            if cosine < worst:
                worst, worst_at = cosine, _shown(node)
    return f"no single layer is far off, the distance adds up; the farthest is {worst_at}: cosine {worst:.6f}"


def _shown(node: onnx.NodeProto) -> str:
    weights = [name for name in node.input[1:] if "." in name]
    return f"{node.op_type} {node.name}" + (f" ({weights[0]})" if weights else "")
