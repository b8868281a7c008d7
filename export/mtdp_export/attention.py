"""Where attention is in a graph: the two products around a Softmax."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

# What may stand between a product and the Softmax: scaling, a mask, a change of type or shape.
_BETWEEN = frozenset({"Add", "Cast", "Div", "Identity", "Mul", "Reshape", "Sub", "Where"})


@dataclass(frozen=True, slots=True)
class Attention:
    """Names of matrix products."""

    scores: tuple[str, ...]  # Q K^T
    mixes: tuple[str, ...]  # the weights of the tokens, and V


def attention(model: onnx.ModelProto) -> Attention:
    """Find the products of attention; none in a convolutional network."""
    producer = {name: node for node in model.graph.node for name in node.output}
    softmax = {name for node in model.graph.node if node.op_type == "Softmax" for name in node.output}
    scores: dict[str, None] = {}
    mixes: dict[str, None] = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and any(_reaches(name, softmax, producer) for name in node.input):
            mixes[node.name] = None
        if node.op_type == "Softmax":
            todo = list(node.input)
            while todo:
                found = producer.get(todo.pop())
                if found is not None and found.op_type == "MatMul":
                    scores[found.name] = None
                elif found is not None and found.op_type in _BETWEEN:
                    todo += found.input
    scores = {name: None for name in scores if mixes}
    return Attention(tuple(scores), tuple(mixes))


def _reaches(name: str, wanted: set[str], producer: dict[str, onnx.NodeProto]) -> bool:
    """Whether a value is a wanted one, but for its type and shape."""
    while name not in wanted:
        node = producer.get(name)
        if node is None or node.op_type not in ("Cast", "Identity", "Reshape"):
            return False
        name = node.input[0]
    return True
