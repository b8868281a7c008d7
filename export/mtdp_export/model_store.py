"""Graphs whose weights may be larger than a protocol buffer can be, written and read a tensor at a time.

A graph is "light" where its large tensors are references into a file beside it (ONNX's external data). What is to
become a bundle's file is written from it in a stream: in one file, or, beyond 2 GB, with its weights in `<file>.data`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mtdp_runtime.bundle.manifest import DATA_SUFFIX

LARGEST_INSIDE: Final = 2**31 - 2**24  # bytes of weights in one file: the rest of the graph has its place, too
DATA_DIGEST: Final = "data_sha256"  # a property of a graph whose weights lie apart: so its own digest covers them
_ALIGNED: Final = 64
_SMALL: Final = 1024  # bytes: shapes and the like stay in the graph, where shape inference reads them
_BLOCK: Final = 1 << 24


def load_light(path: Path) -> onnx.ModelProto:
    """Read a graph; tensors that lie in a file beside it stay there."""
    model: onnx.ModelProto = onnx.load(path, load_external_data=False)
    return model


def is_apart(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor's numbers lie in a file."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def array_of(tensor: onnx.TensorProto, folder: Path | None) -> NDArray[Any]:
    """Return a tensor's numbers, wherever they lie; `folder` is that of the graph's file."""
    if not is_apart(tensor):
        return numpy_helper.to_array(tensor)
    alone = TensorProto()
    alone.CopyFrom(tensor)
    alone.ClearField("external_data")
    alone.data_location = TensorProto.DEFAULT
    alone.raw_data = bytes(_raw(tensor, folder))
    return numpy_helper.to_array(alone)


def inside(tensor: onnx.TensorProto, folder: Path | None) -> onnx.TensorProto:
    """Return a copy of a tensor with its numbers in it."""
    copy = TensorProto()
    copy.CopyFrom(tensor)
    if is_apart(tensor):
        copy.ClearField("external_data")
        copy.data_location = TensorProto.DEFAULT
        copy.raw_data = bytes(_raw(tensor, folder))
    return copy


def take_small_inside(model: onnx.ModelProto, folder: Path) -> None:
    """Bring shapes and the like into a graph, in place; what they are is read where nothing is computed.

    Raises:
        ValueError: a file has not what the graph says of it.
    """
    for tensor in model.graph.initializer:
        if is_apart(tensor):
            content = _raw(tensor, folder)
            if len(content) != _length(tensor):
                raise ValueError(f"tensor {tensor.name} has {len(content)} bytes of {_length(tensor)}")
            if len(content) < _SMALL:
                tensor.CopyFrom(inside(tensor, folder))


def session_in_memory(model: onnx.ModelProto, folder: Path | None, options: Any) -> Any:
    """Return an ONNX Runtime session of a graph as `session_of`; nothing is written into `folder`, a stranger's."""
    import onnxruntime

    apart = [tensor for tensor in model.graph.initializer if is_apart(tensor)]
    if apart:
        arrays = [mapped(tensor, folder) for tensor in apart]
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays]
        options.add_external_initializers([tensor.name for tensor in apart], values)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def mapped(tensor: onnx.TensorProto, folder: Path | None) -> NDArray[Any]:
    """Return the numbers of a tensor of a file without reading them yet."""
    kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.frombuffer(_raw(tensor, folder), kind).reshape(tuple(tensor.dims))


def size_bytes(model: onnx.ModelProto) -> int:
    """Return what the weights of a graph take, wherever they lie."""
    return sum(_length(tensor) for tensor in model.graph.initializer)


def save_model(
    model: onnx.ModelProto, folder: Path | None, path: Path, most_inside: int = LARGEST_INSIDE
) -> Path | None:
    """Write a graph as a bundle's file; return the file of its weights where they lie apart.

    Equal graphs give equal bytes.

    Args:
        model: its tensors may lie in files of `folder`, or in it.
        folder: of those files.
        path: to write.
        most_inside: bytes of weights; with more of them they lie apart.
    """
    if size_bytes(model) <= most_inside:
        with path.open("wb") as out:
            _write_inside(model, folder, out)
        return None
    data = path.with_name(path.name + DATA_SUFFIX)
    light = _without_weights(model)
    digest = hashlib.sha256()
    with data.open("wb") as out:
        at = 0
        for tensor in model.graph.initializer:
            if _length(tensor) < _SMALL:
                light.graph.initializer.append(inside(tensor, folder))
                continue
            padding = -at % _ALIGNED
            content = _raw(tensor, folder)
            for part in (b"\0" * padding, content):
                out.write(part)
                digest.update(part)
            light.graph.initializer.append(_reference(tensor, data.name, at + padding, len(content)))
            at += padding + len(content)
    properties = {entry.key: entry.value for entry in light.metadata_props} | {DATA_DIGEST: digest.hexdigest()}
    del light.metadata_props[:]
    helper.set_model_props(light, dict(sorted(properties.items())))
    path.write_bytes(light.SerializeToString(deterministic=True))
    return data


def session_of(model: onnx.ModelProto, folder: Path | None, options: Any) -> Any:
    """Return an ONNX Runtime session of a graph, whose weights may lie in files of `folder`."""
    import onnxruntime

    providers = ["CPUExecutionProvider"]
    if not any(is_apart(tensor) for tensor in model.graph.initializer):
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
    assert folder is not None
    # ONNX Runtime looks for the weights beside the graph's own file, and nowhere else: not where a link leads to.
    model, home = _beside_its_weights(model, folder)
    path = home / f".graph.{os.getpid()}.onnx"
    try:
        path.write_bytes(model.SerializeToString())
        return onnxruntime.InferenceSession(path, options, providers=providers)
    finally:
        path.unlink(missing_ok=True)


def _beside_its_weights(model: onnx.ModelProto, folder: Path) -> tuple[onnx.ModelProto, Path]:
    """Return the graph with its files named as they are behind links (the hub's cache has them), and their folder."""
    entries = [e for t in model.graph.initializer if is_apart(t) for e in t.external_data if e.key == "location"]
    if not any((folder / name).is_symlink() for name in {entry.value for entry in entries}):
        return model, folder
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    homes = set[Path]()
    for tensor in copy.graph.initializer:
        for entry in tensor.external_data if is_apart(tensor) else ():
            if entry.key == "location":
                file = (folder / entry.value).resolve()
                entry.value = file.name
                homes.add(file.parent)
    return copy, homes.pop()


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    light = onnx.ModelProto()
    for descriptor, value in model.ListFields():
        if descriptor.name == "graph":
            for inner, content in value.ListFields():
                if inner.name != "initializer":
                    _put(light.graph, inner.name, content)
        else:
            _put(light, descriptor.name, value)
    return light


def _put(message: Any, name: str, value: Any) -> None:
    if hasattr(value, "extend"):
        getattr(message, name).extend(value)
    elif hasattr(value, "CopyFrom"):
        getattr(message, name).CopyFrom(value)
    else:
        setattr(message, name, value)


def _write_inside(model: onnx.ModelProto, folder: Path | None, out: BinaryIO) -> None:
    """Write the messages of onnx.proto one after the other; the order of fields is free in a protocol buffer."""
    light = _without_weights(model)
    graph = light.graph.SerializeToString(deterministic=True)
    light.ClearField("graph")
    out.write(light.SerializeToString(deterministic=True))
    heads = [(_head(tensor), _length(tensor)) for tensor in model.graph.initializer]
    bodies = [len(head) + len(_tag(9, 2)) + len(_varint(length)) + length for head, length in heads]
    whole = len(graph) + sum(len(_tag(5, 2)) + len(_varint(body)) + body for body in bodies)
    out.write(_tag(7, 2) + _varint(whole) + graph)  # Model.graph
    for tensor, (head, length), body in zip(model.graph.initializer, heads, bodies, strict=True):
        out.write(_tag(5, 2) + _varint(body) + head + _tag(9, 2) + _varint(length))  # Graph.initializer, raw_data
        content = _raw(tensor, folder)
        assert len(content) == length, tensor.name
        out.write(content)


def _head(tensor: onnx.TensorProto) -> bytes:
    head = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
    written: bytes = head.SerializeToString(deterministic=True)
    return written


def _reference(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> onnx.TensorProto:
    reference = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
    reference.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        reference.external_data.add(key=key, value=str(value))
    return reference


def _length(tensor: onnx.TensorProto) -> int:
    if tensor.HasField("raw_data") and not is_apart(tensor):
        return len(tensor.raw_data)
    count = int(np.prod(tensor.dims, dtype=np.int64))
    item: int = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return count * item


def _raw(tensor: onnx.TensorProto, folder: Path | None) -> memoryview:
    """The bytes of a tensor, little-endian; of a file they are mapped, not read."""
    if not is_apart(tensor):
        if tensor.HasField("raw_data"):
            return memoryview(tensor.raw_data)
        return memoryview(np.ascontiguousarray(numpy_helper.to_array(tensor)).tobytes())
    assert folder is not None
    where: Mapping[str, str] = {entry.key: entry.value for entry in tensor.external_data}
    length = _length(tensor)
    if not length:
        return memoryview(b"")
    offset = int(where.get("offset", 0))
    mapped = np.memmap(folder / where["location"], np.uint8, "r", offset, (length,))
    return memoryview(mapped)  # type: ignore[arg-type]  # it is a buffer


def _tag(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _varint(value: int) -> bytes:
    return bytes(_septets(value))


def _septets(value: int) -> Iterator[int]:
    while value > 0x7F:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value
