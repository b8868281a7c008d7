"""What a typed graph computes, on any CPU: its sums in fp32, each low-precision value rounded where the graph rounds.

That is how matrix units work (low-precision operands, fp32 sums), and how a bf16 graph is judged where no engine has
bf16 convolutions: ONNX Runtime's CPU provider has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mtdp_export.model_store import session_of
from mtdp_export.typed import EXACT, nested_nodes
from mtdp_runtime.bundle.golden import TILES

_LOW: Final = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def in_fp32(typed: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph that computes in fp32 and rounds where the typed one has low-precision values.

    Every node and value keeps its name; a graph that is fp32 throughout comes back as it is.
    """
    inferred = onnx.shape_inference.infer_shapes(typed).graph
    low = {v.name: v.type.tensor_type.elem_type for v in inferred.value_info if v.type.tensor_type.elem_type in _LOW}
    model = onnx.ModelProto()
    model.CopyFrom(typed)
    nodes: list[onnx.NodeProto] = []
    widened: dict[str, onnx.NodeProto] = {}
    for tensor in model.graph.initializer:
        if tensor.data_type in _LOW:
            name = tensor.name
            tensor.name = f"{name}.stored"
            widened[name] = helper.make_node("Cast", [tensor.name], [name], f"{name}/widen", to=TensorProto.FLOAT)
    for node in typed.graph.node:
        read = [*node.input, *(name for inner in nested_nodes(node) for name in inner.input)]
        # Just before it is used: all of them in fp32 at once may be many gigabytes.
        nodes += [widened.pop(name) for name in dict.fromkeys(read) if name in widened]
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        rounds = {name: low[name] for name in node.output if name in low and node.op_type not in EXACT}
        if node.op_type == "Cast" and (node.input[0] in low or rounds):
            copy.op_type = "Identity"
            del copy.attribute[:]
        for position, name in enumerate(node.output):
            if name in rounds:
                copy.output[position] = f"{name}.sum"
        nodes.append(copy)
        for name, elem_type in rounds.items():
            nodes.append(helper.make_node("Cast", [f"{name}.sum"], [f"{name}.low"], f"{name}/round", to=elem_type))
            nodes.append(helper.make_node("Cast", [f"{name}.low"], [name], f"{name}/widen", to=TensorProto.FLOAT))
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *widened.values()])  # the last: outputs as they are stored
    del model.graph.value_info[:]
    return model


def run(
    model: onnx.ModelProto,
    tiles: NDArray[np.uint8],
    outputs: Sequence[str] = (),
    batch: int = 8,
    folder: Path | None = None,
) -> Mapping[str, NDArray[np.float32]]:
    """Run a graph as it stands, in ONNX Runtime with no optimisation (which could drop a rounding).

    Args:
        model: one that ONNX Runtime's CPU provider runs.
        tiles: uint8[N, P, P, 3].
        outputs: names of values to return; the graph's own outputs where empty.
        batch: tiles at a time.
        folder: of the files in which the graph's tensors lie, where they do.
    """
    import onnxruntime

    names = list(outputs) or [value.name for value in model.graph.output]
    own = {value.name for value in model.graph.output}
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    extended.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in own)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # As the nodes stand: otherwise what is only looked at waits until the end, and keeps its values in memory.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.log_severity_level = 3
    session = session_of(extended, folder, options)
    parts = [session.run(names, {TILES: tiles[i : i + batch]}) for i in range(0, len(tiles), batch)]
    return {name: np.concatenate(column) for name, column in zip(names, zip(*parts, strict=True), strict=True)}
