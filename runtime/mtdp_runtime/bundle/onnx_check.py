"""What a model file may hold, looked up in its bytes before an engine sees it.

An ONNX model is data, but two things in it reach out of the file: tensors kept in other files (external data, whose
path an attacker may choose) and operators of other domains (which need a library of code). Neither is let through.
The walk follows the protocol-buffer wire format (protobuf.dev/programming-guides/encoding) through the messages of
onnx.proto3 that can hold either, skips all else by its length, and needs no ONNX library.

ONNX Runtime's own domain is let through by operator, not whole: among its operators are some whose meaning is "load
this" (EPContext and Snpe take compiled code of a device, PythonOp calls Python).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mtdp_runtime.errors import BundleInvalid

# The domains that engines implement themselves: ONNX's own, and ONNX Runtime's.
MICROSOFT: Final = "com.microsoft"
DOMAINS: Final = frozenset({"", "ai.onnx", "ai.onnx.ml", MICROSOFT})
# ONNX Runtime's operators that compute, and nothing else: what its optimisers fuse, and what its quantiser writes
# (onnxruntime, docs/ContribOperators.md).
MICROSOFT_OPERATORS: Final = frozenset(
    [
        "Attention",
        "BiasAdd",
        "BiasGelu",
        "BiasSoftmax",
        "BiasSplitGelu",
        "DequantizeLinear",
        "DynamicQuantizeMatMul",
        "EmbedLayerNormalization",
        "FastGelu",
        "FusedConv",
        "FusedGemm",
        "FusedMatMul",
        "FusedMatMulActivation",
        "GatedRelativePositionBias",
        "Gelu",
        "GridSample",
        "GroupNorm",
        "GroupQueryAttention",
        "Inverse",
        "MatMulInteger16",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "MaxpoolWithMask",
        "MultiHeadAttention",
        "NhwcConv",
        "NhwcFusedConv",
        "NhwcMaxPool",
        "PackedAttention",
        "PackedMultiHeadAttention",
        "Pad",
        "QAttention",
        "QGemm",
        "QLinearAdd",
        "QLinearAveragePool",
        "QLinearConcat",
        "QLinearConv",
        "QLinearGlobalAveragePool",
        "QLinearLeakyRelu",
        "QLinearMul",
        "QLinearReduceMean",
        "QLinearSigmoid",
        "QLinearSoftmax",
        "QLinearWhere",
        "QuantizeLinear",
        "QuickGelu",
        "RelativePositionBias",
        "RotaryEmbedding",
        "SkipGroupNorm",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "Trilu",
    ]
)
_DEEPEST: Final = 64
_MOST_FIELDS: Final = 20_000_000

# Message -> field number -> the message in it, by the numbers of onnx.proto3.
_INSIDE: Final[dict[str, dict[int, str]]] = {
    "Model": {7: "Graph", 8: "OperatorSet", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Function": {7: "Node", 9: "OperatorSet", 11: "Attribute"},
    "Tensor": {},
    "OperatorSet": {},
}
_DOMAIN_FIELD: Final = {"Node": 7, "OperatorSet": 1}
_OPERATOR_FIELD: Final = 4  # of a Node
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # of a Tensor
_ELSEWHERE: Final = {(_EXTERNAL_DATA, True), (_DATA_LOCATION, True)}


def check_model_file(path: Path, weights: Path | None = None) -> None:
    """Refuse a model that reaches out of its own file.

    Args:
        path: the model.
        weights: the one other file that it may read its tensors from, beside it.

    Raises:
        BundleInvalid: it names external data or an operator of another domain, or it is no ONNX model.
    """
    hint = "Export the model again with mtdp-export: it writes one file, of standard operators."
    graphs = 0
    # Of each node: a field that stands there twice counts as often as it stands, whichever a parser would take.
    operators: dict[int, set[str]] = {}
    microsofts: set[int] = set()
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for message, at, number, value in _walk(data):
                if message == "Tensor" and weights is None and (number, value != 0) in _ELSEWHERE:
                    raise BundleInvalid(f"{path}: a tensor of this model lies in another file", hint)
                if message == "Tensor" and weights is not None and number == _EXTERNAL_DATA:
                    assert isinstance(value, tuple)
                    _check_entry(_entry(data, *value), weights, hint)
                if number == _DOMAIN_FIELD.get(message) and isinstance(value, tuple):
                    domain = data[value[0] : value[1]].decode("utf-8", errors="replace")
                    if domain not in DOMAINS:
                        raise BundleInvalid(f"{path}: operators of the domain {domain!r} need code of their own", hint)
                    if domain == MICROSOFT and message == "Node":
                        microsofts.add(at)
                if message == "Node" and number == _OPERATOR_FIELD and isinstance(value, tuple):
                    name = data[value[0] : value[1]].decode("utf-8", errors="replace")
                    operators.setdefault(at, set()).add(name)
                graphs += message == "Model" and number == 7
    except (ValueError, IndexError) as error:
        raise BundleInvalid(f"{path}: not an ONNX model: {error}", hint) from error
    unknown = sorted(name for at in microsofts for name in operators.get(at, set()) - MICROSOFT_OPERATORS)
    if unknown:
        raise BundleInvalid(f"{path}: the operator {MICROSOFT}.{unknown[0]} may load code of its own", hint)
    if not graphs:
        raise BundleInvalid(f"{path}: not an ONNX model: there is no graph in it", hint)


def _walk(data: mmap.mmap) -> Iterator[tuple[str, int, int, int | tuple[int, int]]]:
    """Yield message, where it begins, field number, and a number or the (start, end) of bytes.

    For the messages of `_INSIDE` alone.
    """
    todo = [("Model", 0, len(data), 0)]
    fields = 0
    while todo:
        message, place, end, depth = todo.pop()
        at = place
        if depth > _DEEPEST:
            raise ValueError(f"messages nested more than {_DEEPEST} deep")
        while place < end:
            fields += 1
            if fields > _MOST_FIELDS:
                raise ValueError(f"more than {_MOST_FIELDS} fields")
            key, place = _varint(data, place, end)
            number, kind = key >> 3, key & 7
            if kind == 0:
                value, place = _varint(data, place, end)
                yield message, at, number, value
            elif kind == 2:
                length, place = _varint(data, place, end)
                if length > end - place:
                    raise ValueError(f"a field of {length} bytes where {end - place} are left")
                yield message, at, number, (place, place + length)
                inner = _INSIDE[message].get(number)
                if inner is not None:
                    todo.append((inner, place, place + length, depth + 1))
                place += length
            elif kind in (1, 5):
                place += 8 if kind == 1 else 4
            else:
                raise ValueError(f"wire type {kind} at byte {place}")
        if place != end:
            raise ValueError("it is cut")


def _entry(data: mmap.mmap, place: int, end: int) -> tuple[str, str]:
    """Read a StringStringEntryProto: key and value."""
    found = {1: "", 2: ""}
    while place < end:
        key, place = _varint(data, place, end)
        length, place = _varint(data, place, end)
        if key & 7 != 2 or key >> 3 not in found or length > end - place:
            raise ValueError("a tensor says in a strange way where it lies")
        found[key >> 3] = data[place : place + length].decode("utf-8", errors="replace")
        place += length
    return found[1], found[2]


def _check_entry(entry: tuple[str, str], weights: Path, hint: str) -> None:
    """See that what a tensor says of its place is inside the one file; engines check that it ends there, too."""
    key, value = entry
    inside = value == weights.name if key == "location" else value.isascii() and value.isdigit()
    if not inside or key not in ("location", "offset", "length"):
        raise BundleInvalid(f"{weights.parent}: a tensor lies at {key} {value!r}, not in {weights.name}", hint)
    if key != "location" and int(value) > weights.stat().st_size:
        raise BundleInvalid(f"{weights}: a tensor ends beyond it ({key} {value})", hint)


def _varint(data: mmap.mmap, place: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while place < end and shift < 64:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    raise ValueError(f"a number that does not end at byte {place}")
