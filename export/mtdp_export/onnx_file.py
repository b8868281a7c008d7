"""What an ONNX file must be to become a bundle: image in, vector out, standard operations in fp32, a free batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import onnx
import onnx.inliner
from onnx import TensorProto

from mtdp_export.errors import ExportError, ExportUsageError
from mtdp_export.model_store import load_light, size_bytes, take_small_inside
from mtdp_export.typed import nested_nodes
from mtdp_export.weights_file import refuse_failed_download

MIN_OPSET: Final = 13  # the first in which Cast, Softmax and the quantisers mean what they mean today
LARGEST_BYTES: Final = 2**31 - 1  # of a protocol buffer, so of a graph in one file
_QUANTISED: Final = frozenset(
    {"QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "ConvInteger", "MatMulInteger"}
)
Layout = Literal["nchw", "nhwc"]
_CHANNELS: Final[dict[Layout, int]] = {"nchw": 1, "nhwc": 3}


def load_onnx(path: Path) -> tuple[onnx.ModelProto, Path | None]:
    """Read a file with its weights, functions inlined; return it, and the folder of weights that are left in files.

    They are where they are more than 2 GB: then only what is small is read.

    Raises:
        ExportUsageError: there is no such file, or it is of torch.
        ExportError: it is damaged, its weights are missing, or its opset is another day's.
        WeightsError: it is what a failed download leaves.
    """
    if not path.is_file():
        raise ExportUsageError(f"--onnx {path}: no such file", "check the path")
    with path.open("rb") as stream:
        start = stream.read(256)
    refuse_failed_download(path, start, "an ONNX file")
    if start.startswith((b"PK", b"\x80\x02")):
        raise ExportUsageError(f"--onnx {path}: it is of torch, and no ONNX file", "give weights by --weights")
    try:
        model, folder = load_light(path), None
        if size_bytes(model) > LARGEST_BYTES:
            onnx.checker.check_model(str(path))  # also that every file is there, and in the folder
            folder = path.parent
            take_small_inside(model, folder)
        else:
            onnx.load_external_data_for_model(model, str(path.parent))
            onnx.checker.check_model(model)
        model = onnx.inliner.inline_local_functions(model)
    except FileNotFoundError as error:
        raise ExportError(
            f"{path}: its weights are in another file, which is missing: {error.filename or first_line(error)}",
            "copy that file beside it",
        ) from error
    except Exception as error:  # of protobuf, of the checker, of external data: they share no base class
        if "not regular file" in str(error):
            what = "its weights are in another file, which is missing, or a link"
            raise ExportError(f"{path}: {what}: {first_line(error)}", "copy that file itself beside it") from error
        raise ExportError(f"{path}: not a usable ONNX file: {first_line(error)}", "export it again") from error
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    newest = onnx.defs.onnx_opset_version()
    if not MIN_OPSET <= opset <= newest:
        raise ExportError(
            f"{path}: opset {opset}; {MIN_OPSET} to {newest} can be exported",
            "export it again, or use onnx.version_converter.convert_version(model, 20)",
        )
    return model, folder


def check_operations(model: onnx.ModelProto, path: Path) -> None:
    """See that a graph is of standard operations that compute in fp32, and drop the other operator sets.

    Raises:
        ExportError: it is not.
    """
    foreign = sorted(
        {f"{node.domain}::{node.op_type}" for node in all_nodes(model.graph) if node.domain not in ("", "ai.onnx")}
    )
    if foreign:
        hint = "export the plain graph, before an optimiser or a plug-in put its own operations in"
        raise ExportError(f"{path}: operations outside the ONNX standard: {', '.join(foreign[:5])}", hint)
    quantised = sorted({node.op_type for node in all_nodes(model.graph)} & _QUANTISED)
    inferred = onnx.shape_inference.infer_shapes(model)
    halves = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    computed = {name for node in model.graph.node for name in node.output}
    typed = any(v.name in computed and v.type.tensor_type.elem_type in halves for v in inferred.graph.value_info)
    if quantised or typed:
        what = quantised[0] if quantised else "float16 values"
        raise ExportError(f"{path}: it computes with less than fp32 ({what})", "bring the fp32 model")
    del model.opset_import[:]
    model.opset_import.append(next(o for o in inferred.opset_import if o.domain in ("", "ai.onnx")))


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield every node, those of graphs inside nodes included."""
    for node in graph.node:
        yield node
        yield from nested_nodes(node)


def image_input(model: onnx.ModelProto, path: Path) -> onnx.ValueInfoProto:
    """Return the one input that is no weight, and leave it alone among the inputs.

    Raises:
        ExportError: there are none or several.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs: list[onnx.ValueInfoProto] = [tensor for tensor in model.graph.input if tensor.name not in constants]
    if len(inputs) != 1:
        names = ", ".join(tensor.name for tensor in inputs) or "none"
        raise ExportError(
            f"{path}: one input is needed, the image; it has {len(inputs)} ({names})",
            "export the image encoder alone, with all else as constants",
        )
    del model.graph.input[:]
    model.graph.input.append(inputs[0])
    return inputs[0]


def feature_output(model: onnx.ModelProto, path: Path, name: str | None, pooled: bool = False) -> onnx.ValueInfoProto:
    """Return the output of that name, or the only one: a vector for each image, or tokens that will be pooled.

    Raises:
        ExportUsageError: there are several, or none of that name.
        ExportError: it is no float32 vector for each image.
    """
    outputs: dict[str, onnx.ValueInfoProto] = {output.name: output for output in model.graph.output}
    if name is None and len(outputs) > 1:
        raise ExportUsageError(
            f"{path}: several outputs: {', '.join(outputs)}", "name the features with --feature-output"
        )
    if name is not None and name not in outputs:
        raise ExportUsageError(f"--feature-output {name}: {path} gives {', '.join(outputs)}", "name one of these")
    output = outputs[name] if name is not None else next(iter(outputs.values()))
    kind = output.type.tensor_type.elem_type
    dims = output.type.tensor_type.shape.dim
    if pooled:
        if kind != TensorProto.FLOAT or len(dims) != 3:
            raise ExportUsageError(
                f"--pool: output {output.name} of {path} has {len(dims)} axes, tokens have 3: [batch, tokens, D]",
                "leave --pool out, or name another output with --feature-output",
            )
        return output
    vector = len(dims) == 2 or (len(dims) == 4 and all(dim.dim_value == 1 for dim in dims[2:]))
    if kind != TensorProto.FLOAT or not vector:
        shown = ", ".join(dim.dim_param or str(dim.dim_value or "?") for dim in dims)
        raise ExportError(
            f"{path}: output {output.name} is {TensorProto.DataType.Name(kind).lower()}[{shown}], not float[batch, D]",
            "add --pool cls, mean or cls+mean, or name another output with --feature-output"
            if len(dims) == 3
            else "pool it in the model, or name another output with --feature-output",
        )
    return output


def layout_and_side(
    tensor: onnx.ValueInfoProto, path: Path, layout: Layout | None, tile_px: int | None
) -> tuple[Layout, int]:
    """Return the layout and the side of the input: as the graph states them, else as declared.

    Raises:
        ExportUsageError: neither says it, or they differ.
        ExportError: it takes no square images in batches of any size.
    """
    dims = tensor.type.tensor_type.shape.dim
    if len(dims) != 4:
        raise ExportError(
            f"{path}: input {tensor.name} has {len(dims)} axes; images have 4", "export it with a batch axis"
        )
    if dims[0].dim_value > 0:
        raise ExportError(
            f"{path}: the batch axis of {tensor.name} is fixed to {dims[0].dim_value}",
            f"export it with a dynamic one: dynamic_axes={{'{tensor.name}': {{0: 'batch'}}}}",
        )
    stated: list[Layout] = [name for name, at in _CHANNELS.items() if dims[at].dim_value == 3]
    if layout is None and len(stated) != 1:
        raise ExportUsageError(
            f"{path}: its shape does not tell where the channels are", "add --input-layout nchw or nhwc"
        )
    found = layout or stated[0]
    if dims[_CHANNELS[found]].dim_value not in (0, 3):
        raise ExportUsageError(f"--input-layout {found}: {path} has no 3 channels there", "give the other layout")
    sides = {dim.dim_value for dim in (dims[2:4] if found == "nchw" else dims[1:3])}
    fixed = sides - {0}
    if len(fixed) > 1:
        shown = " x ".join(map(str, sorted(fixed)))
        raise ExportError(f"{path}: its input is not square ({shown})", "export it with a square one")
    side = next(iter(fixed), None)
    if side is None and tile_px is None:
        raise ExportUsageError(
            f"{path}: it takes images of any size", "add --tile-px, the size that it was trained for"
        )
    if side is not None and tile_px not in (None, side):
        raise ExportUsageError(
            f"{path} takes {side} px only, and would be given {tile_px}",
            f"leave --tile-px out, or add --resize {side} to have larger tiles resized in the graph",
        )
    return found, side or tile_px or 0


def first_line(error: BaseException) -> str:
    """Return what an error says first, or its class's name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
