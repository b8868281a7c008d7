"""The low-precision variants of a graph, and which of its nodes a measurement keeps in fp32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from mtdp_export.attention import attention
from mtdp_export.errors import ExportError, ParityFailure
from mtdp_export.memory import give_back
from mtdp_export.model_store import load_light, save_model
from mtdp_export.rounding import in_fp32, run
from mtdp_export.typed import KERNELS, LowType, float_values, kernel_names, low_types, to_low_type
from mtdp_runtime.bundle.golden import FEATURES, TOKENS
from mtdp_runtime.bundle.manifest import DATA_SUFFIX
from mtdp_runtime.bundle.tolerance import MIN_COSINE, cosines, tokens_cosine

# Of the distance to torch that a precision is allowed, the part that rounding may take; engines sum in other orders.
_SHARE: Final = 0.5
_VALUES_AT_ONCE: Final = 16  # intermediate maps are large: this many are kept at a time
_NEAR_FP16S_END: Final = 65504.0 / 2  # another tile may reach twice what the golden ones do
_LARGEST: Final = {"most": "ReduceMax", "least": "ReduceMin", "total": "ReduceL1"}
_OF_A_SUM: Final = frozenset({"Add", "Mul", "Sub"})


@dataclass(frozen=True, slots=True)
class TypedVariant:
    """What was written, and what it took."""

    low: LowType
    fp32_kernels: int  # that stay in fp32
    kernels: int
    cosine_min: float  # of its roundings alone, sums in fp32
    kept: str  # which nodes stay in fp32, in words; empty: none but those that always do


def write_typed(
    model_file: Path,
    low: LowType,
    out: Path,
    tiles: NDArray[np.uint8],
    expected: Mapping[str, NDArray[np.float32]],
    least_cosine: float | None = None,
    least_tokens: float | None = None,
) -> TypedVariant:
    """Write the typed variant with as little in fp32 as the tiles allow.

    What errs in a convolutional network are its first kernels: a rounding there runs through all the others; in a
    DenseNet-121 the stem alone makes four fifths of the distance. So the first 0, 1, 2, 4, ... kernels stay in fp32,
    as many as it takes, and half of them at most. In a transformer it is the separate rounding of biases and of
    LayerScale (an engine that fuses them rounds once), then of the scores, then of what they weigh. In fp16, a kernel
    whose operands come near the end of the type on these tiles stays in fp32.

    Args:
        model_file: the fp32 graph; its weights may lie in a file beside it.
        low: type of the variant.
        out: file to write.
        tiles: uint8[N, P, P, 3], real tissue where possible.
        expected: what torch gives for them.
        least_cosine: that the variant must have on any engine; the precision's own where None.
        least_tokens: the same of its patch tokens, where `expected` has them.

    Raises:
        ParityFailure: whatever stays in fp32, it is too far from torch, or a weight does not fit into the type.
        ExportError: nothing in the graph would compute in the type.
    """
    model, folder = load_light(model_file), model_file.parent
    kernels = kernel_names(model)
    if not kernels:
        raise ExportError(
            f"--precision {low}: no convolution and no matrix product of this graph can compute in {low}",
            f"Export without --precision {low}.",
        )
    bars = (MIN_COSINE[low] if one is None else one for one in (least_cosine, least_tokens))
    allowed, of_tokens = (_SHARE * (1 - bar) for bar in bars)
    overflowing = near_the_end_of_fp16(model, tiles, folder) if low == "fp16" else frozenset[str]()
    give_back()  # what ONNX Runtime held of the fp32 graph
    tried: list[str] = []
    for said, nodes in plans(model, kernels):
        wide = nodes | overflowing
        # Of a network of more than 2 GB no graph holds the weights: what runs is the file, which has them beside it.
        save_model(to_low_type(model, low, wide, folder), folder, out)
        give_back()
        outputs = run(in_fp32(load_light(out)), tiles, folder=out.parent)
        cosine, tokens = _nearness(outputs, expected)
        if 1 - cosine <= allowed and 1 - tokens <= of_tokens:
            kept = [said] if said else []
            kept += [f"{len(overflowing)} nodes that come near the end of fp16"] if overflowing else []
            return TypedVariant(low, len(wide & set(kernels)), len(kernels), cosine, " and ".join(kept))
        shown = f"{cosine:.6f} (tokens {tokens:.6f})" if TOKENS in expected else f"{cosine:.6f}"
        tried.append(f"{shown} with {said or 'none'}")
    save_model(to_low_type(model, low, (), folder), folder, out)
    where = first_divergence(model, in_fp32(load_light(out)), tiles, low, folder, out.parent)
    for written in (out, out.with_name(out.name + DATA_SUFFIX)):
        written.unlink(missing_ok=True)
    raise ParityFailure(
        f"{low}: too far from torch: smallest cosine {', '.join(tried)} of {len(kernels)} kernels in fp32, "
        f"{1 - allowed:.6f} is wanted; {where}",
        f"Export without --precision {low}.",
    )


def _nearness(
    outputs: Mapping[str, NDArray[np.float32]], expected: Mapping[str, NDArray[np.float32]]
) -> tuple[float, float]:
    """Return the smallest cosine of the features, and of the tokens, 1 where there are none; NaN where not finite."""
    got = outputs[FEATURES]
    cosine = float(cosines(got, expected[FEATURES]).min()) if np.isfinite(got).all() else float("nan")
    if TOKENS not in expected:
        return cosine, 1.0
    tokens = outputs[TOKENS][: len(expected[TOKENS])]
    return cosine, tokens_cosine(tokens, expected[TOKENS]) if np.isfinite(tokens).all() else float("nan")


def plans(model: onnx.ModelProto, kernels: Sequence[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """Yield what may stay in fp32, least first: in words, and the names of the nodes."""
    found = attention(model)
    always: frozenset[str] = frozenset()
    said = ""
    if found.mixes:
        yield "", always
        steps = (("biases and scales", _sums(model)), ("scores", found.scores), ("what they weigh", found.mixes))
        for what, nodes in steps:
            always |= frozenset(nodes)
            said = f"{said}, {what}" if said else what
            yield said, always
    wide = 1 if found.mixes else 0
    while wide <= len(kernels) // 2:
        first = f"the first {wide}" if wide else ""
        yield ", ".join(part for part in (said, first) if part), always | frozenset(kernels[:wide])
        wide = max(1, 2 * wide)


def _sums(model: onnx.ModelProto) -> frozenset[str]:
    """Nodes that add or multiply by constants: biases, LayerScale, the scaling of queries and keys."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return frozenset(n.name for n in model.graph.node if n.op_type in _OF_A_SUM and constants & set(n.input))


def near_the_end_of_fp16(model: onnx.ModelProto, tiles: NDArray[np.uint8], folder: Path) -> frozenset[str]:
    """Return the nodes of an fp32 graph that would compute in fp16, and whose values on the tiles come near its end."""
    types, floats = low_types(model, "fp16", ()), float_values(model)
    floats -= {tensor.name for tensor in model.graph.initializer}
    among = [node for node in model.graph.node if types[node.name] == "fp16"]
    values = {node.name: [v for v in (*node.input, *node.output) if v in floats] for node in among}
    names = list(dict.fromkeys(value for of_node in values.values() for value in of_node))
    got = run(_with_largest(model, names), tiles, [f"{name}.{of}" for name in names for of in _LARGEST], folder=folder)
    large = {name for name in names if not _fits(*(got[f"{name}.{of}"] for of in _LARGEST))}
    return frozenset(name for name, of_node in values.items() if large & set(of_node))


def _with_largest(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Reduce values inside the graph, each where it is made: one run sees them all, and no map is kept for it.

    A maximum passes over what is no number; a sum does not.
    """
    wanted = set(names)
    made = {value for node in model.graph.node for value in node.output}
    nodes = [reduction for name in names if name not in made for reduction in _reductions(name)]
    for node in model.graph.node:
        nodes.append(node)
        nodes += [reduction for name in node.output if name in wanted for reduction in _reductions(name)]
    seen = onnx.ModelProto()
    seen.CopyFrom(model)
    del seen.graph.node[:]
    seen.graph.node.extend(nodes)
    return seen


def _reductions(name: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node(operator, [name], [f"{name}.{of}"], f"{name}.{of}", keepdims=1)
        for of, operator in _LARGEST.items()
    ]


def _fits(most: NDArray[np.float32], least: NDArray[np.float32], total: NDArray[np.float32]) -> bool:
    ends = max(float(most.max()), -float(least.min()))
    return bool(np.isfinite(total).all()) and ends < _NEAR_FP16S_END


def first_divergence(
    reference: onnx.ModelProto,
    variant: onnx.ModelProto,
    tiles: NDArray[np.uint8],
    precision: str,
    folder: Path | None = None,
    variant_folder: Path | None = None,
) -> str:
    """Say which layer leaves the path first: the first kernel or sum whose output is too far from the fp32 graph's.

    Args:
        reference: the fp32 graph.
        variant: runs in ONNX Runtime; has values of the same names.
        tiles: uint8[N, P, P, 3]; four of them are used.
        precision: says how far is too far.
        folder: of the files in which the graphs' tensors lie, where they do.
        variant_folder: of the variant's, where it is another.
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
        wanted = run(reference, some, names, folder=folder)
        got = run(variant, some, names, folder=variant_folder or folder)
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
