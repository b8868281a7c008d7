"""A graph in fp16 or bf16: the types are in the graph, since TensorRT 11 takes a precision from nowhere else.

Kernels (convolutions, matrix products) and what lies between them compute in the low type. In fp32 stay: everything
up to the first kernel (cast, resize and normalisation of the pixels); normalisations, softmax and what sums or divides;
what follows the last kernel (pooling); whatever is computed from the features (heads); and the nodes that the caller
names, because a measurement says so (`precision`). Inputs and outputs keep their types.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final, Literal

import numpy as np
import onnx
import onnx.version_converter
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mtdp_export.errors import ExportError, ParityFailure
from mtdp_export.model_store import LARGEST_INSIDE, array_of, is_apart, size_bytes
from mtdp_runtime.bundle.golden import FEATURES

LowType = Literal["fp16", "bf16"]
ONNX_TYPE: Final = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
KERNELS: Final = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})
# They give values that they were given.
EXACT: Final = frozenset(
    [
        "Clip",
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "Identity",
        "MaxPool",
        "Pad",
        "Relu",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    ]
)
# They compute in the widest type that reaches them: moving rounds nothing, and a sum of roundings is to be no worse.
_FOLLOWS: Final = EXACT | {"Add", "LeakyRelu", "Mul", "Sub"}
# Names of the matrices that resize (`pixels`, by its buffers' names): what multiplies by them is not the network's.
COLUMNS: Final = "pixels.columns"
ROWS: Final = "pixels.rows"
_RESIZES: Final = frozenset({COLUMNS, ROWS})
_OPSET_OF_BF16: Final = 22
_ONLY_TYPES_SINCE: Final = 20  # later ones, to 22, add types to the operations that torch's exporter writes
_MAX_FP16: Final = 65504.0


def to_low_type(
    model: onnx.ModelProto, low: LowType, fp32_nodes: Collection[str] = (), folder: Path | None = None
) -> onnx.ModelProto:
    """Return a strongly typed copy of an fp32 graph.

    Args:
        model: computes in fp32; every node has a name.
        low: the type of the kernels.
        fp32_nodes: names of kernels and sums that stay in fp32 all the same.
        folder: of the files in which the graph's tensors lie, where they do.

    Raises:
        ParityFailure: a weight does not fit into fp16.
        ExportError: a graph inside a node (If, Loop) reads a low value.
    """
    typed = onnx.ModelProto()
    typed.CopyFrom(_with_bf16_operators(model) if low == "bf16" else model)
    name_nodes(typed)  # the conversion adds nodes without names
    types = low_types(typed, low, fp32_nodes)
    _Rewriter(typed, low, types, folder).rewrite()
    del typed.graph.value_info[:]
    if not any(is_apart(tensor) for tensor in typed.graph.initializer) and size_bytes(typed) <= LARGEST_INSIDE:
        onnx.checker.check_model(typed, full_check=True)
    return typed


def name_nodes(model: onnx.ModelProto) -> None:
    """Give every node without a name, or with another one's, a name of its own, in place."""
    given = {node.name for node in model.graph.node}
    seen: set[str] = set()
    for number, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            name = f"{number}:{node.name or node.op_type}"
            while name in given:
                name += "+"
            node.name = name
            given.add(name)
        seen.add(node.name)


def inner_graphs(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    """Yield the graphs inside a node, each with what it is to it: `then_branch` of an If, `body` of a Loop."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.name, attribute.g
        yield from ((attribute.name, graph) for graph in attribute.graphs)


def nested_nodes(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of the graphs inside a node (If, Loop), at any depth."""
    for _, graph in inner_graphs(node):
        for inner in graph.node:
            yield inner
            yield from nested_nodes(inner)


def kernel_names(model: onnx.ModelProto) -> list[str]:
    """Return the names of the kernels that `to_low_type` would compute in a low type, in the graph's order."""
    types = low_types(model, "bf16", ())
    return [n.name for n in model.graph.node if n.op_type in KERNELS and types[n.name] == "bf16"]


def low_types(model: onnx.ModelProto, low: LowType, fp32_nodes: Collection[str]) -> dict[str, str]:
    """Return, by node name, the type in which it computes: `low` or fp32. Each node has a name of its own."""
    graph = model.graph
    # Types are kept by name: two nodes of one name would share a type, and the second kernel's would be lost.
    assert len({node.name for node in graph.node}) == len(graph.node), "nodes without names of their own"
    floats = float_values(model)
    producer = {name: node for node in graph.node for name in node.output}
    after_kernel: set[str] = set()
    from_features: set[str] = set()
    for node in graph.node:
        inputs = [producer[name] for name in node.input if name in producer]
        if (node.op_type in KERNELS and not _RESIZES & set(node.input)) or any(n.name in after_kernel for n in inputs):
            after_kernel.add(node.name)
        if FEATURES in node.input or any(n.name in from_features for n in inputs):
            from_features.add(node.name)
    tail = _tail(graph, producer, floats)
    types: dict[str, str] = {}
    for node in graph.node:
        wide = node.name not in after_kernel or node.name in from_features | tail or node.name in fp32_nodes
        sources = [types[producer[n].name] for n in node.input if n in producer and n in floats]
        kernel, follows = node.op_type in KERNELS, node.op_type in _FOLLOWS and "fp32" not in sources
        types[node.name] = low if not wide and (kernel or follows) else "fp32"
    return types


def float_values(model: onnx.ModelProto) -> set[str]:
    """Return the names of the float32 tensors."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    names = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    return names | {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}


def _tail(graph: onnx.GraphProto, producer: dict[str, onnx.NodeProto], floats: set[str]) -> set[str]:
    """What follows the last kernel or sum in a straight line, back from the features: the pooling."""
    tail: set[str] = set()
    weights = {tensor.name for tensor in graph.initializer}
    name = FEATURES
    while name in producer:
        node = producer[name]
        sources = [n for n in node.input if n in floats and n not in weights]
        if node.op_type in KERNELS or len(sources) != 1:
            break
        tail.add(node.name)
        name = sources[0]
    return tail


def _with_bf16_operators(model: onnx.ModelProto) -> onnx.ModelProto:
    """Below opset 22 the standard gives Conv and its like no bf16."""
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if opset >= _OPSET_OF_BF16:
        return model
    if any(is_apart(tensor) for tensor in model.graph.initializer):
        # The converter takes no tensors in files. From 20, ours, to 22 it would only write the number.
        assert opset >= _ONLY_TYPES_SINCE, opset
        newer = onnx.ModelProto()
        newer.CopyFrom(model)
        del newer.opset_import[:]
        newer.opset_import.append(onnx.helper.make_opsetid("", _OPSET_OF_BF16))
        return newer
    return onnx.version_converter.convert_version(model, _OPSET_OF_BF16)


class _Rewriter:
    """Puts a Cast wherever a value is wanted in another type than it has; one Cast a value and type."""

    def __init__(self, model: onnx.ModelProto, low: LowType, types: dict[str, str], folder: Path | None) -> None:
        self._folder = folder
        self._graph = model.graph
        self._low = low
        self._types = types
        self._floats = float_values(model)
        self._weights = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
        self._has: dict[str, str] = dict.fromkeys(self._floats, "fp32")
        self._made: dict[tuple[str, str], str] = {}
        self._names = {name for node in model.graph.node for name in node.output}
        self._names |= {tensor.name for tensor in model.graph.initializer}
        self._nodes: list[onnx.NodeProto] = []

    def rewrite(self) -> None:
        outputs = {value.name for value in self._graph.output}
        for node in self._graph.node:
            wanted = self._types[node.name]
            for position, name in enumerate(node.input):
                if name in self._floats and self._has[name] != wanted:
                    node.input[position] = self._in_type(name, wanted)
            made = [name for name in node.output if name in self._floats]
            self._nodes.append(node)
            if wanted == "fp32":
                continue
            for position, name in enumerate(node.output):
                if name in outputs and name in made:
                    node.output[position] = f"{name}.{wanted}"
                    self._nodes.append(helper.make_node("Cast", [f"{name}.{wanted}"], [name], f"{name}/Cast", to=1))
                elif name in made:
                    self._has[name] = wanted
        used = {name for node in self._nodes for name in node.input} | outputs | self._captured()
        weights = self._graph.initializer
        for position in reversed(range(len(weights))):
            if weights[position].name not in used:
                del weights[position]  # to build the list anew would copy gigabytes
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)

    def _captured(self) -> set[str]:
        """What the graphs inside nodes read: they are left as they are, so it must still be fp32."""
        captured: set[str] = set()
        for node in self._nodes:
            read = {name for inner in nested_nodes(node) for name in inner.input}
            low = sorted(name for name in read if self._has.get(name, "fp32") != "fp32")
            if low:
                raise ExportError(
                    f"--precision {self._low}: the {node.op_type} {node.name} has a graph inside that reads {low[0]}, "
                    f"which would be {self._low}",
                    f"Export without --precision {self._low}.",
                )
            captured |= read
        return captured

    def _in_type(self, name: str, wanted: str) -> str:
        if (name, wanted) in self._made:
            return self._made[name, wanted]
        new = f"{name}.{wanted}"
        while new in self._names:  # weights that are stored in fp16 are named like this already
            new += "+"
        self._names.add(new)
        self._made[name, wanted] = new
        if name in self._weights:
            self._graph.initializer.append(_rounded(self._weights[name], new, self._low, self._folder))
        else:
            self._nodes.append(helper.make_node("Cast", [name], [new], f"{new}/Cast", to=ONNX_TYPE[wanted]))
        return new


def _rounded(tensor: onnx.TensorProto, name: str, low: LowType, folder: Path | None) -> onnx.TensorProto:
    array = array_of(tensor, folder)
    if low == "bf16":
        bits = round_to_bf16(array).view(np.uint32) >> 16
        return helper.make_tensor(name, TensorProto.BFLOAT16, array.shape, bits.astype("<u2").tobytes(), raw=True)
    if array.size and float(np.abs(array).max()) > _MAX_FP16:
        raise ParityFailure(
            f"--precision fp16: the weight {tensor.name} holds {float(np.abs(array).max()):.3g}, fp16 ends at "
            f"{_MAX_FP16:g}",
            "Use --precision bf16, or fp32.",
        )
    return numpy_helper.from_array(array.astype(np.float16), name)


def round_to_bf16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return float32 of the same shape, each rounded to the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(values), rounded.view(np.float32), values)
