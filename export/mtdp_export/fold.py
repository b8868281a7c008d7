"""What a graph computes from constants alone, computed once.

Engines fold such nodes themselves, each in its own way, or not at all: an antialiased Resize of a table of positions is
wrong in OpenVINO's CPU plugin, which ignores the antialiasing, and TensorRT-RTX refuses the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mtdp_export.model_store import inside
from mtdp_export.typed import inner_graphs, nested_nodes

# They give other values each time, or say where a constant's bytes lie: nothing to compute.
_NOT_CONSTANT: Final = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)


def fold_constants(model: onnx.ModelProto, folder: Path | None = None) -> int:
    """Replace each node that depends on constants alone by what it gives, in place; return how many there were.

    Computed by ONNX Runtime, without its optimisations. Weights that are stored in fp16 keep their Cast. `folder` is
    that of the files in which the graph's tensors lie, where they do.
    """
    nodes = constant_nodes(model)
    if not nodes:
        return 0
    gone = {id(node) for node in nodes}
    kept = [node for node in model.graph.node if id(node) not in gone]
    used = {name for node in kept for name in _read(node)} | {value.name for value in model.graph.output}
    made = [name for node in nodes for name in node.output if name in used]
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    values = _computed(model, nodes, made, tensors, folder)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    still = [tensor for name, tensor in tensors.items() if name in used]
    still += [numpy_helper.from_array(values[name], name) for name in made]
    del model.graph.initializer[:]
    model.graph.initializer.extend(still)
    return len(nodes)


def constant_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the nodes that depend on constants alone, in the graph's order."""
    constant = {tensor.name for tensor in model.graph.initializer}
    halves = {t.name for t in model.graph.initializer if t.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16)}
    found = []
    for node in model.graph.node:
        widens = node.op_type == "Cast" and set(node.input) <= halves
        if node.op_type in _NOT_CONSTANT or node.domain not in ("", "ai.onnx") or widens:
            continue
        if all(name in constant for name in _read(node) if name):
            constant.update(node.output)
            found.append(node)
    return found


def _read(node: onnx.NodeProto) -> list[str]:
    """What a node reads, the graphs inside it included, whatever is their own."""
    read = list(node.input)
    if any(True for _ in inner_graphs(node)):
        own = {name for inner in nested_nodes(node) for name in inner.output}
        own |= {tensor.name for _, graph in inner_graphs(node) for tensor in graph.initializer}
        own |= {value.name for _, graph in inner_graphs(node) for value in graph.input}
        read += [name for inner in nested_nodes(node) for name in inner.input if name not in own]
    return read


def _computed(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    wanted: Sequence[str],
    tensors: dict[str, onnx.TensorProto],
    folder: Path | None,
) -> dict[str, NDArray[Any]]:
    """Run the nodes that each wanted value needs, one value at a time: the weights of all at once are many."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    producer = {name: node for node in nodes for name in node.output}
    values: dict[str, NDArray[Any]] = {}
    for name in wanted:
        needed, todo = dict[int, onnx.NodeProto](), [name]
        while todo:
            node = producer.get(todo.pop())
            if node is not None and id(node) not in needed:
                needed[id(node)] = node
                todo += _read(node)
        part = [node for node in nodes if id(node) in needed]
        read = {each for node in part for each in _read(node)}
        given = [inside(tensors[each], folder) for each in sorted(read) if each in tensors]
        graph = helper.make_graph(part, "constants", [], [onnx.ValueInfoProto(name=name)], given)
        alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
        session = onnxruntime.InferenceSession(alone.SerializeToString(), options, providers=["CPUExecutionProvider"])
        values[name] = np.asarray(session.run([name], {})[0])
    return values
