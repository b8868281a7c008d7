"""The exported graph: uint8 tiles in, features and task probabilities out.

tiles uint8[batch, P, P, 3] -> Cast, Transpose, resize and cut, normalise, backbone, pool -> features float32[batch, D]
                                                      -> linear, softmax  -> probabilities_<task> float32[batch, C]
                                     without pooling  -> tokens float32[batch, T, D], where they are asked for
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import onnx
import onnx_ir
import onnxscript.optimizer
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from mtdp.multitask import MultiTaskNet
from mtdp_export.errors import ExportError
from mtdp_export.fold import fold_constants
from mtdp_export.model_store import is_apart, load_light
from mtdp_export.onnx_file import LARGEST_BYTES
from mtdp_export.pixels import Pixels, Prepared
from mtdp_export.tokens import GOLDEN_TILES, features_and_tokens
from mtdp_export.typed import inner_graphs
from mtdp_runtime.bundle.golden import FEATURES, TOKENS

OPSET: Final = 20
INPUT: Final = "tiles"
_STAYS_INSIDE: Final = 1024  # bytes of a tensor: shapes and the like, which shape inference reads
WeightsStorage = Literal["fp32", "fp16"]


class Deployed(nn.Module):
    """A network as it is deployed: everything from the pixels on."""

    def __init__(self, network: MultiTaskNet, pixels: Pixels, tokens: bool = False) -> None:
        super().__init__()
        self.pixels = Prepared(pixels)
        self.network = network
        self.tokens = tokens  # those of the patches are given, too

    def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features, *tokens = self.encoded(self.pixels(tiles))
        return (features, *(torch.softmax(head(features), dim=1) for head in self.network.heads.values()), *tokens)

    def encoded(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the features, and the tokens where they are asked for."""
        if self.tokens:
            return features_and_tokens(self.network.backbone, pixels)
        return (self.network.backbone(pixels),)

    @property
    def output_names(self) -> list[str]:
        heads = [f"probabilities_{name}" for name in self.network.task_names]
        return [FEATURES, *heads, *([TOKENS] if self.tokens else [])]


def reference_outputs(model: Deployed, tiles: NDArray[np.uint8], batch: int = 8) -> dict[str, NDArray[np.float32]]:
    """What torch computes in fp32, by output name: float32[N, ...]; tokens of the first `GOLDEN_TILES` alone.

    Raises:
        ExportError: it is not finite: nothing can be compared with it.
    """
    parts: list[tuple[torch.Tensor, ...]] = []
    with torch.no_grad():
        for start in range(0, len(tiles), batch):
            given = model(torch.from_numpy(tiles[start : start + batch]))
            parts.append(_with_few_tokens(given, start) if model.tokens else given)
    columns = zip(*parts, strict=True)
    outputs = {
        name: torch.cat(column).float().numpy() for name, column in zip(model.output_names, columns, strict=True)
    }
    for name, values in outputs.items():
        bad = int((~np.isfinite(values)).any(axis=tuple(range(1, values.ndim))).sum())
        if bad:
            raise ExportError(
                f"the network's own {name} are not finite on {bad} of {len(values)} golden tiles",
                "Nothing was written. Its weights are damaged, or its training diverged.",
            )
    return outputs


def _with_few_tokens(given: tuple[torch.Tensor, ...], start: int) -> tuple[torch.Tensor, ...]:
    return (*given[:-1], given[-1][: max(0, GOLDEN_TILES - start)])


def autocast_outputs(
    model: Deployed, tiles: NDArray[np.uint8], precision: str, batch: int = 8
) -> dict[str, NDArray[np.float32]] | None:
    """What torch's own autocast computes on this machine, as `reference_outputs`, no heads; None where torch cannot.

    The pixels are prepared in fp32, as everybody does outside of it.
    """
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    parts = []
    try:
        with torch.no_grad():
            for start in range(0, len(tiles), batch):
                pixels = model.pixels(torch.from_numpy(tiles[start : start + batch]))
                with torch.autocast("cpu", dtype=kind):
                    given = model.encoded(pixels)
                parts.append(_with_few_tokens(given, start) if model.tokens else given)
    except RuntimeError:  # an operation that it does not have in this type on a CPU
        return None
    names, columns = (FEATURES, TOKENS), zip(*parts, strict=True)
    outputs = {name: torch.cat(column).float().numpy() for name, column in zip(names, columns, strict=False)}
    return outputs if all(np.isfinite(values).all() for values in outputs.values()) else None


def round_weights_to_fp16(network: nn.Module) -> None:
    """Round the kernels to fp16 values, so that torch computes with what the file will hold.

    Vectors (biases, batch-norm) stay: they weigh nothing and may lie outside fp16's range.

    Raises:
        ExportError: so may a kernel.
    """
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point() and tensor.dim() > 1:
                rounded = tensor.half().float()
                if torch.isinf(rounded).any():
                    raise ExportError(f"--weights-storage fp16: {name} is beyond fp16", "Leave --weights-storage out.")
                tensor.copy_(rounded)


def export_graph(
    model: Deployed, metadata: Mapping[str, str], weights_storage: WeightsStorage = "fp32"
) -> onnx.ModelProto:
    """Trace a model to ONNX, with a dynamic batch and everything after the pixels inside, its weights in memory.

    Args:
        model: in eval mode.
        metadata: goes into the file's properties.
        weights_storage: fp16 stores the weights in half the bytes and casts them back in the graph; engines fold that
            when they load it. The caller rounds the weights of the torch model first (`round_weights_to_fp16`).

    Raises:
        ExportError: the file would be larger than one can be, or torch cannot trace the network.
    """
    _check_size(model, weights_storage)
    graph: onnx.ModelProto = _traced(model, weights_storage).model_proto
    fold_constants(graph)
    if weights_storage == "fp16":
        _store_as_fp16(graph)
    finish_graph(graph, metadata)
    return graph


def export_light(model: Deployed, metadata: Mapping[str, str], folder: Path) -> onnx.ModelProto:
    """Do the same, and leave the weights in a file of the folder: a network of any size, in little memory.

    Raises:
        ExportError: torch cannot trace the network.
    """
    program = _traced(model, "fp32")
    path = folder / "traced.onnx"
    onnx_ir.save(program.model, path, external_data="traced.weights", size_threshold_bytes=_STAYS_INSIDE)
    for value in program.model.graph.initializers.values():
        value.const_value = None  # torch's exporter keeps these values for good; not the weights with them
    del program
    light = load_light(path)
    fold_constants(light, folder)
    finish_graph(light, metadata)
    return light


def _traced(model: Deployed, weights_storage: WeightsStorage) -> Any:
    side = model.pixels.pixels.tile_px
    example = torch.zeros(2, side, side, 3, dtype=torch.uint8)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter warns of its own deprecations
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=model.output_names,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                optimize=False,
                verbose=False,
            )
            assert program is not None
            # With fp16 storage the kernels must reach the file as they are: folding batch-norm into them gives products
            # that are no fp16 values. Engines fold when they load the graph, so nothing is lost.
            if weights_storage == "fp32":
                program.optimize()
            else:
                onnxscript.optimizer.fold_constants(program.model)
                onnxscript.optimizer.remove_unused_nodes(program.model)
    except torch.onnx.OnnxExporterError as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ExportError(f"torch {torch.__version__} cannot export this network to ONNX: {reason}") from error
    return program


def _check_size(model: nn.Module, weights_storage: WeightsStorage) -> None:
    halves = weights_storage == "fp16"
    weights = model.state_dict().values()
    size_bytes = sum(w.numel() * (2 if halves and w.dim() > 1 else w.element_size()) for w in weights)
    if size_bytes > LARGEST_BYTES:
        raise ExportError(
            f"{size_bytes / 1e9:.1f} GB of weights; one ONNX file holds at most 2.1 GB",
            "Leave --weights-storage out: then they lie in a file of their own; --precision fp16 takes half of that.",
        )


def finish_graph(graph: onnx.ModelProto, metadata: Mapping[str, str]) -> None:
    """Take the traces of the machine out, sign, and check, in place."""
    without_traces(graph)
    graph.producer_name = "mtdp"
    graph.producer_version = metadata.get("mtdp_version", "")
    del graph.metadata_props[:]
    helper.set_model_props(graph, dict(sorted(metadata.items())))
    if not any(is_apart(tensor) for tensor in graph.graph.initializer):  # else it is checked as it lies on the disk
        onnx.checker.check_model(graph, full_check=True)


def without_traces(model: onnx.ModelProto) -> None:
    """Remove what exporters note of the source files: paths of this machine, and nothing that is computed."""
    model.doc_string = ""
    del model.functions[:], model.training_info[:]
    _without_traces(model.graph)


def _without_traces(graph: onnx.GraphProto) -> None:
    tensors = [*graph.initializer]
    for node in graph.node:
        _forget(node)
        for attribute in node.attribute:
            attribute.doc_string = ""
            tensors += [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]
        for _, inner in inner_graphs(node):
            _without_traces(inner)
    for noted in (graph, *tensors, *graph.value_info, *graph.input, *graph.output):
        _forget(noted)


def _forget(noted: Any) -> None:
    noted.doc_string = ""
    del noted.metadata_props[:]


def _store_as_fp16(model: onnx.ModelProto) -> None:
    """Replace each fp32 kernel by an fp16 one and a Cast to fp32 under its old name."""
    casts = []
    kept = []
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or array.ndim < 2 or (array.astype(np.float16) != array).any():
            kept.append(tensor)
            continue
        kept.append(numpy_helper.from_array(array.astype(np.float16), f"{tensor.name}.fp16"))
        casts.append(helper.make_node("Cast", [f"{tensor.name}.fp16"], [tensor.name], to=TensorProto.FLOAT))
    nodes = list(model.graph.node)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    del model.graph.node[:]
    # The input's own Cast stays the first node: TensorRT wants it there.
    model.graph.node.extend([nodes[0], *casts, *nodes[1:]])
