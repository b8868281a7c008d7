"""A feature extractor of one's own, brought as an ONNX file, with its preprocessing declared.

    tiles uint8[batch, P, P, 3] -> Cast, Transpose, scale and shift -> the file's graph -> features float32[batch, D]

The reference of such a model is the file as it came, run by ONNX Runtime in fp32 on tiles that numpy prepared: one tile
at a time, so that a graph whose rows depend on each other is found.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx.compose
import onnxscript.optimizer
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from mtdp.preprocess import Preprocessing
from mtdp_export.encoder import TOKEN_FEATURES
from mtdp_export.errors import ExportError, ExportUsageError
from mtdp_export.fold import fold_constants
from mtdp_export.golden import synthetic_tiles
from mtdp_export.graph import INPUT, finish_graph
from mtdp_export.isolated import goes_on
from mtdp_export.model_store import is_apart, mapped, session_in_memory
from mtdp_export.onnx_file import (
    Layout,
    check_operations,
    feature_output,
    first_line,
    image_input,
    layout_and_side,
    load_onnx,
)
from mtdp_export.pixels import Pixels, Stated, Triple, arranged, resize_matrix
from mtdp_export.tokens import GOLDEN_TILES, grid_of
from mtdp_export.typed import COLUMNS, ROWS, inner_graphs, name_nodes, nested_nodes
from mtdp_runtime.bundle.golden import FEATURES, TOKENS
from mtdp_runtime.bundle.manifest import Tokens
from mtdp_runtime.bundle.tolerance import MIN_COSINE, cosines

_PREFIX: Final = "net/"
_REDUCE_TAKES_AXES: Final = 18  # the opset from which the axes of a ReduceMean are an input


@dataclass(frozen=True, slots=True)
class Declared:
    """What the user says of the file; None is taken from the graph where it states it, and asked for where not."""

    mean: Triple | None = None
    std: Triple | None = None
    input_range: int = 1  # the network takes pixels of 0..1, or of 0..255; mean and std are on that scale
    layout: Layout | None = None
    tile_px: int | None = None
    output: str | None = None
    licence: str = ""
    interpolation: str | None = None
    resize_px: int | None = None
    crop_px: int | None = None
    pool: str | None = None  # of tokens [N, T, D]: cls, mean, cls+mean
    prefix_tokens: int = 1  # before those of the patches
    tokens: bool = False  # those of the patches are an output, too; with `pool` alone

    @property
    def input_px(self) -> int | None:
        """What the network is given, as far as it is said."""
        return self.crop_px or self.resize_px or self.tile_px

    @property
    def stated(self) -> Stated:
        return Stated(self.mean, self.std, self.interpolation, self.tile_px, self.resize_px, self.crop_px)


@dataclass(frozen=True, slots=True)
class OnnxSource:
    """An ONNX file that passed every check, its weights inside, its other outputs gone."""

    model: onnx.ModelProto
    arch: str
    pixels: Pixels
    layout: Layout
    takes_uint8: bool  # preprocessing of its own is inside
    features_dim: int
    origin: str
    licence: str
    digest: str  # of the weights as numbers

    @property
    def preprocessing(self) -> Preprocessing:
        return self.pixels.preprocessing

    feature: str = ""
    encoder: str = ""
    published: str = ""
    mpp: float | None = None
    licence_text: str = ""
    tokens: Tokens | None = None  # of the patches: the second output
    folder: Path | None = None  # of the files in which its weights lie, where they are more than 2 GB

    @property
    def checkpoint(self) -> None:
        return None

    @property
    def class_names(self) -> dict[str, tuple[str, ...]]:
        return {}


def open_onnx(path: Path, declared: Declared) -> OnnxSource:
    """Read and check a file.

    Raises:
        ExportUsageError: something must be declared, or what was declared does not fit the graph.
        ExportError: the file cannot be used: its opset is too old, its batch is fixed, it has operations of its own...
    """
    declared.stated.check(declared.input_range)
    model, folder = load_onnx(path)
    check_operations(model, path)
    tensor = image_input(model, path)
    output = feature_output(model, path, declared.output, pooled=declared.pool is not None)
    kind = tensor.type.tensor_type.elem_type
    if kind not in (TensorProto.FLOAT, TensorProto.UINT8):
        raise ExportError(
            f"{path}: its input is {TensorProto.DataType.Name(kind).lower()}", "export it with a float32 or uint8 input"
        )
    layout, side = layout_and_side(tensor, path, declared.layout, declared.input_px)
    takes_uint8 = kind == TensorProto.UINT8
    outputs = [output]
    if declared.pool is not None:
        outputs = _pool(model, output, declared.pool, declared.prefix_tokens, declared.tokens)
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    del model.graph.value_info[:]
    onnxscript.optimizer.remove_unused_nodes(model)
    digest = _digest(model, folder)
    producer = f"{model.producer_name} {model.producer_version}".strip() or "a program that it does not name"
    source = OnnxSource(
        model=model,
        arch=f"onnx:{path.stem}",
        pixels=_pixels(side, takes_uint8, declared),
        layout=layout,
        takes_uint8=takes_uint8,
        features_dim=0,
        origin=f"brought as {path.name} (output {declared.output or output.name}, made by {producer})",
        licence=declared.licence or "not stated by who exported the bundle",
        digest=digest,
        feature=declared.pool or "",
        folder=folder,
    )
    given = original_outputs(source, synthetic_tiles(source.pixels.tile_px)[:4])
    grid = grid_of(given[TOKENS].shape, source.arch) if declared.tokens else None
    return replace(source, features_dim=given[FEATURES].shape[1], tokens=grid)


def _pool(
    model: onnx.ModelProto, tokens: onnx.ValueInfoProto, pool: str, prefix: int, keep: bool
) -> list[onnx.ValueInfoProto]:
    """Append what makes one vector of the tokens [N, T, D]; return the new output, and to `keep` them those of patches.

    Raises:
        ExportUsageError: there is no such way, or no tokens that it could take.
    """
    if pool not in TOKEN_FEATURES:
        raise ExportUsageError(f"--pool {pool}: unknown", f"one of {', '.join(TOKEN_FEATURES)}")
    count = tokens.type.tensor_type.shape.dim[1].dim_value
    if prefix < 0 or (pool != "mean" and prefix < 1) or 0 < count <= prefix:
        raise ExportUsageError(
            f"--prefix-tokens {prefix}: not with --pool {pool}" + (f" of {count} tokens" if count else ""),
            "1 for a class token, 5 for one and 4 registers, 0 (with mean) where all are of patches",
        )
    graph, parts = model.graph, []
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    pre = "pool/"
    while any(name.startswith(pre) for name in taken):
        pre += "+"
    ends = np.array([1, prefix, np.iinfo(np.int64).max], np.int64)
    constants = {f"{pre}{name}": values for name, values in zip("123", ends.reshape(3, 1), strict=True)}
    constants[f"{pre}zero"], constants[f"{pre}axis"] = np.array([0], np.int64), np.array([1], np.int64)
    graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in constants.items())
    if pool != "mean":
        inputs = [tokens.name, f"{pre}zero", f"{pre}1", f"{pre}axis"]
        graph.node.append(helper.make_node("Slice", inputs, [f"{pre}first"]))
        graph.node.append(helper.make_node("Squeeze", [f"{pre}first", f"{pre}axis"], [f"{pre}cls"]))
        parts.append(f"{pre}cls")
    if pool != "cls" or keep:
        inputs = [tokens.name, f"{pre}2", f"{pre}3", f"{pre}axis"]
        graph.node.append(helper.make_node("Slice", inputs, [f"{pre}patches"]))
    if pool != "cls":
        opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        new = opset >= _REDUCE_TAKES_AXES
        axes: dict[str, Any] = {} if new else {"axes": [1]}
        of = [f"{pre}patches", *([f"{pre}axis"] if new else [])]
        graph.node.append(helper.make_node("ReduceMean", of, [f"{pre}mean"], keepdims=0, **axes))
        parts.append(f"{pre}mean")
    last = parts[0]
    if len(parts) == 2:
        last = f"{pre}both"
        graph.node.append(helper.make_node("Concat", parts, [last], axis=1))
    outputs = [helper.make_tensor_value_info(last, TensorProto.FLOAT, ["batch", None])]
    if keep:
        outputs.append(helper.make_tensor_value_info(f"{pre}patches", TensorProto.FLOAT, ["batch", None, None]))
    return outputs


def original_outputs(source: OnnxSource, tiles: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    """What the file computes, one tile at a time: {"features": float32[N, D]}, and the first tiles' patch tokens.

    Raises:
        ExportError: ONNX Runtime refuses it, it gives no vector for each tile, or a batch gives other rows than tiles
            one by one.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = session_in_memory(source.model, source.folder, options)
    except Exception as error:  # its errors share no base class of their own
        raise ExportError(f"{source.arch}: ONNX Runtime refuses it: {first_line(error)}") from error
    pixels = _prepared(source, tiles)
    rows, tokens = [], []
    for i in range(len(pixels)):
        features, *patches = _run(session, pixels[i : i + 1], source.arch)
        rows.append(features)
        tokens += patches if i < GOLDEN_TILES else []
        goes_on()
    single = np.concatenate(rows)
    together, *_ = _run(session, pixels, source.arch)
    if not all(np.isfinite(values).all() for values in (single, *tokens)):
        raise ExportError(f"{source.arch}: its features are not finite", "check --mean, --std and --input-range")
    if together.shape != single.shape or cosines(together, single).min() < MIN_COSINE["fp32"]:
        raise ExportError(
            f"{source.arch}: a tile's features depend on the other tiles of its batch",
            "it was exported in training mode, or with a fixed batch inside: call model.eval() and export it again",
        )
    return {FEATURES: single, **({TOKENS: np.concatenate(tokens)} if tokens else {})}


def wrap_onnx(source: OnnxSource, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """Return the bundle's graph: the preprocessing, then the file's own nodes; each node has a name of its own."""
    model = onnx.compose.add_prefix(copy.deepcopy(source.model), _PREFIX)
    inner, rank4 = model.graph.input[0].name, len(model.graph.output[0].type.tensor_type.shape.dim) == 4
    side, nchw = source.pixels.tile_px, source.layout == "nchw"
    before = _from_uint8(model.graph, inner, nchw) if source.takes_uint8 else _prepare(source, model.graph, inner)
    last = model.graph.output[0].name
    after = [helper.make_node("Flatten" if rank4 else "Identity", [last], [FEATURES])]
    if source.tokens is not None:
        after.append(helper.make_node("Identity", [model.graph.output[1].name], [TOKENS]))
    nodes = [*before, *model.graph.node, *after]
    del model.graph.node[:], model.graph.input[:], model.graph.output[:]
    model.graph.node.extend(nodes)
    fold_constants(model, source.folder)
    name_nodes(model)
    model.graph.name = "mtdp"
    model.graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["batch", side, side, 3]))
    model.graph.output.append(
        helper.make_tensor_value_info(FEATURES, TensorProto.FLOAT, ["batch", source.features_dim])
    )
    if source.tokens is not None:
        count, dim = source.tokens.count, source.tokens.dim
        model.graph.output.append(helper.make_tensor_value_info(TOKENS, TensorProto.FLOAT, ["batch", count, dim]))
    finish_graph(model, metadata)
    return model


def _prepare(source: OnnxSource, graph: onnx.GraphProto, inner: str) -> list[onnx.NodeProto]:
    """Return the nodes from the tiles to the input of a file that takes float pixels; their constants go into it."""
    pixels, nchw = source.pixels, source.layout == "nchw"
    side = pixels.preprocessing.image_px
    constants: dict[str, NDArray[Any]] = {}
    nodes = [helper.make_node("Cast", [INPUT], ["pixels"], to=TensorProto.FLOAT)]
    now, planes = "pixels", pixels.tile_px != side or pixels.resize_px != side
    if nchw or planes:
        nodes.append(_transpose(now, "planes"))
        now = "planes"
    if pixels.resize_px != pixels.tile_px:
        matrix = resize_matrix(pixels.tile_px, pixels.resize_px, pixels.preprocessing.interpolation)
        rows = matrix[pixels.margin_px : pixels.margin_px + side].astype(np.float32)
        constants |= {ROWS: rows, COLUMNS: np.ascontiguousarray(rows.T)}
        nodes += [
            helper.make_node("MatMul", [now, COLUMNS], ["pixels.wide"]),
            *_grey_levels("pixels.wide", "pixels.narrow", constants),
            helper.make_node("MatMul", [ROWS, "pixels.narrow"], ["pixels.high"]),
            *_grey_levels("pixels.high", "pixels.resized", constants),
        ]
        now = "pixels.resized"
    elif planes:
        first = pixels.margin_px
        bounds = {"first": [first, first], "end": [first + side, first + side], "axes": [2, 3]}
        constants |= {f"pixels.{name}": np.array(values, np.int64) for name, values in bounds.items()}
        nodes.append(helper.make_node("Slice", [now, *(f"pixels.{name}" for name in bounds)], ["pixels.centre"]))
        now = "pixels.centre"
    if planes and not nchw:
        nodes.append(helper.make_node("Transpose", [now], ["pixels.nhwc"], perm=[0, 2, 3, 1]))
        now = "pixels.nhwc"
    scale, shift = _scale_and_shift(source)
    constants |= {n: v.reshape((1, 3, 1, 1) if nchw else (1, 1, 1, 3)) for n, v in (("scale", scale), ("shift", shift))}
    nodes.append(helper.make_node("Mul", [now, "scale"], ["scaled"]))
    nodes.append(helper.make_node("Add", ["scaled", "shift"], [inner]))
    graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in constants.items())
    return nodes


def _grey_levels(source: str, target: str, constants: dict[str, NDArray[Any]]) -> list[onnx.NodeProto]:
    """Return what rounds to whole grey levels, halves up, as Pillow does after each pass."""
    for name, value in (("half", 0.5), ("black", 0.0), ("white", 255.0)):
        constants[f"pixels.{name}"] = np.array(value, np.float32)
    return [
        helper.make_node("Add", [source, "pixels.half"], [f"{target}.half"]),
        helper.make_node("Floor", [f"{target}.half"], [f"{target}.whole"]),
        helper.make_node("Clip", [f"{target}.whole", "pixels.black", "pixels.white"], [target]),
    ]


def _pixels(side: int, takes_uint8: bool, declared: Declared) -> Pixels:
    """Express what was declared as mean and std on the scale 0..1."""
    if takes_uint8:
        if any(value is not None for value in (declared.mean, declared.std, declared.resize_px, declared.crop_px)):
            raise ExportUsageError(
                "--mean, --std, --resize and --crop: this model takes uint8 and prepares it by itself", "leave them out"
            )
        as_is = Preprocessing(side, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # the pixels, as they are
        return Pixels(as_is, side, side, "inside the ONNX file, which takes uint8")
    if declared.mean is None or declared.std is None:
        raise ExportUsageError(
            "--onnx needs the preprocessing that the model was trained with",
            "--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 are ImageNet's; --mean 0 0 0 --std 1 1 1 for none",
        )
    mean, std = (
        (a / declared.input_range, b / declared.input_range, c / declared.input_range)
        for a, b, c in (declared.mean, declared.std)
    )
    stated = replace(declared.stated, mean=mean, std=std, interpolation=declared.interpolation)
    resized = declared.tile_px or declared.resize_px or declared.crop_px
    return arranged(stated if resized else replace(stated, tile_px=side), Preprocessing(side), "bilinear, not stated")


def _scale_and_shift(source: OnnxSource) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    mean, std = np.array(source.preprocessing.mean), np.array(source.preprocessing.std)
    return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)


def _prepared(source: OnnxSource, tiles: NDArray[np.uint8]) -> NDArray[Any]:
    """What the file is given: uint8 or float32, NHWC or NCHW. Computed as declared, not as the graph does it."""
    pixels: NDArray[Any] = tiles
    if not source.takes_uint8:
        mean, std = np.array(source.preprocessing.mean), np.array(source.preprocessing.std)
        pixels = ((_cut(source.pixels, tiles) / 255.0 - mean) / std).astype(np.float32)
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)) if source.layout == "nchw" else pixels


def _cut(pixels: Pixels, tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The resize and the cut, by Pillow."""
    if pixels.resize_px != pixels.tile_px:
        how, side = Image.Resampling[pixels.preprocessing.interpolation.upper()], (pixels.resize_px, pixels.resize_px)
        tiles = np.stack([np.asarray(Image.fromarray(tile).resize(side, how)) for tile in tiles])
    first, end = pixels.margin_px, pixels.margin_px + pixels.preprocessing.image_px
    return tiles[:, first:end, first:end]


def _run(session: Any, pixels: NDArray[Any], name: str) -> list[NDArray[np.float32]]:
    """Return the features float32[N, D], and the patch tokens where they are an output."""
    try:
        features, *tokens = session.run(None, {session.get_inputs()[0].name: pixels})
    except Exception as error:  # its errors share no base class of their own
        hint = "the batch axis may be fixed inside the graph: export it again with a dynamic one"
        raise ExportError(f"{name}: fails on a batch of {len(pixels)}: {first_line(error)}", hint) from error
    return [features.reshape(len(features), -1), *tokens]


def _from_uint8(graph: onnx.GraphProto, inner: str, nchw: bool) -> list[onnx.NodeProto]:
    """Return what brings the tiles to the input of a file that takes uint8.

    TensorRT takes no operation but a Cast on uint8. So where the file casts its input to float first, that Cast comes
    before the Transpose, and its own become Identity.
    """
    consumers = [node for node in graph.node if inner in node.input]
    nested = any(inner in deep.input for node in graph.node for deep in nested_nodes(node))
    casts = [node for node in consumers if node.op_type == "Cast" and node.attribute[0].i == TensorProto.FLOAT]
    if nested or len(casts) != len(consumers):
        return [_transpose(INPUT, inner) if nchw else helper.make_node("Identity", [INPUT], [inner])]
    for node in casts:
        node.op_type = "Identity"
        del node.attribute[:]
    cast = helper.make_node("Cast", [INPUT], ["pixels" if nchw else inner], to=TensorProto.FLOAT)
    return [cast, *([_transpose("pixels", inner)] if nchw else [])]


def _transpose(source: str, target: str) -> onnx.NodeProto:
    return helper.make_node("Transpose", [source], [target], perm=[0, 3, 1, 2])


def _digest(model: onnx.ModelProto, folder: Path | None) -> str:
    """SHA-256 over all constants in the order of their names: name, dtype, shape, bytes."""
    digest = hashlib.sha256()
    for name, array in sorted(_constants(model.graph, folder).items()):
        digest.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _constants(graph: onnx.GraphProto, folder: Path | None, inside: str = "") -> dict[str, NDArray[Any]]:
    """Return initializers, and the tensors of Constant nodes, where some exporters put the weights, by name.

    Those of the graph inside an If or a Loop follow the name of what that node computes: two branches may use one name.
    """
    found = {
        f"{inside}{tensor.name}": mapped(tensor, folder) if is_apart(tensor) else numpy_helper.to_array(tensor)
        for tensor in graph.initializer
    }
    for node in graph.node:
        if node.op_type == "Constant":
            values = (attribute.t for attribute in node.attribute if attribute.name == "value")
            found |= {f"{inside}{node.output[0]}": numpy_helper.to_array(value) for value in values}
        for part, inner in inner_graphs(node):
            found |= _constants(inner, folder, f"{inside}{node.output[0]}/{part}/")
    return found
