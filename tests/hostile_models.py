"""Models that a stranger made: valid by every rule, and busy for ever."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mtdp_runtime.bundle import file_ref, write_manifest
from support import make_manifest, write_tiny_bundle

STEPS = 2**62


def _endless(given: str, out: str) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
    """A Loop of 2^62 steps from `given` to `out`, and its constants."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["still"]), helper.make_node("Sin", ["x"], ["y"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
        ],
    )
    constants = [
        numpy_helper.from_array(np.array(STEPS, np.int64), "steps"),
        numpy_helper.from_array(np.array(True), "true"),
    ]
    return helper.make_node("Loop", ["steps", "true", given], [out], body=body), constants


def endless_onnx(path: Path, of_constants: bool = False) -> Path:
    """Write float[N, 3, 32, 32] -> float[N, 3]; `of_constants`: what loops could be computed before any image is."""
    loop, constants = _endless("zeros" if of_constants else "means", "looped")
    nodes = [helper.make_node("ReduceMean", ["x", "axes"], ["means"], keepdims=0), loop]
    nodes.append(helper.make_node("Add", ["means", "looped"], ["features"]))
    constants.append(numpy_helper.from_array(np.array([2, 3], np.int64), "axes"))
    constants.append(numpy_helper.from_array(np.zeros(3, np.float32), "zeros"))
    graph = helper.make_graph(
        nodes,
        "endless",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 32, 32])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 3])],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def endless_bundle(folder: Path) -> Path:
    """Write the tiny bundle with a loop before its output, every digest right."""
    write_tiny_bundle(folder)
    file = folder / "model.fp32.onnx"
    model = onnx.load(file)
    model.graph.node[-1].output[0] = "flat"
    loop, constants = _endless("flat", "features")
    model.graph.node.append(loop)
    model.graph.initializer.extend(constants)
    onnx.save(model, file)
    write_manifest(folder, make_manifest(file_ref(folder, file.name), file_ref(folder, "golden.npz")))
    return folder
