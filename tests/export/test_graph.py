"""The exported graph: pixels in, the same numbers as torch out, nothing of this machine in it."""

from __future__ import annotations

import getpass
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from numpy.typing import NDArray

from mtdp.backbones import _DenseNet
from mtdp.multitask import MultiTaskNet
from mtdp.preprocess import Preprocessing
from mtdp_export.golden import synthetic_tiles
from mtdp_export.graph import Deployed, export_graph, reference_outputs, round_weights_to_fp16
from mtdp_export.pixels import as_it_is

HERE = Path(__file__).resolve().parent
METADATA = {"name": "test", "mtdp_version": "0"}
PX = 64


@pytest.fixture(scope="module")
def model(small_network: MultiTaskNet) -> Deployed:
    return Deployed(small_network, as_it_is(Preprocessing(PX))).eval()


@pytest.fixture(scope="module")
def graph(model: Deployed) -> onnx.ModelProto:
    return export_graph(model, METADATA)


def run(graph: onnx.ModelProto, tiles: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: list[NDArray[np.float32]] = session.run(None, {"tiles": tiles})
    return outputs


def test_its_signature(graph: onnx.ModelProto) -> None:
    tiles = graph.graph.input[0]
    assert (tiles.name, tiles.type.tensor_type.elem_type) == ("tiles", onnx.TensorProto.UINT8)
    dims = tiles.type.tensor_type.shape.dim
    assert dims[0].dim_param
    assert [d.dim_value for d in dims[1:]] == [PX, PX, 3]
    assert [o.name for o in graph.graph.output] == ["features", "probabilities_lung", "probabilities_wbc-type"]


def test_the_first_node_casts_the_pixels(graph: onnx.ModelProto) -> None:
    # TensorRT takes uint8 nowhere but into a Cast.
    users = [node for node in graph.graph.node if "tiles" in node.input]
    assert [node.op_type for node in users] == ["Cast"]
    assert graph.graph.node[0].op_type == "Cast"


@pytest.mark.parametrize("batch", [1, 2, 7, 16])
def test_any_batch_gives_what_torch_gives(graph: onnx.ModelProto, model: Deployed, batch: int) -> None:
    tiles = synthetic_tiles(PX)[:batch]
    expected = reference_outputs(model, tiles)
    for (name, wanted), got in zip(expected.items(), run(graph, tiles), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5, err_msg=name)
    assert expected["probabilities_lung"].sum(axis=1) == pytest.approx(np.ones(batch), abs=1e-5)


def test_the_normalisation_is_the_papers(small_network: MultiTaskNet, model: Deployed) -> None:
    """(x / 255 - mean) / std with ImageNet's numbers, written out here once more."""
    tiles = synthetic_tiles(PX)[:3]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    plain = torch.from_numpy(((tiles / 255 - mean) / std).transpose(0, 3, 1, 2)).float()
    with torch.no_grad():
        wanted = small_network.backbone(plain).numpy()
    np.testing.assert_allclose(reference_outputs(model, tiles)["features"], wanted, rtol=1e-4, atol=1e-5)


def test_nothing_of_this_machine_is_in_the_file(graph: onnx.ModelProto) -> None:
    content = graph.SerializeToString()
    for trace in (str(HERE.parents[1]), os.path.dirname(torch.__file__), f"/home/{getpass.getuser()}", ".py"):  # noqa: PTH120
        assert trace.encode() not in content


def test_two_exports_are_the_same_bytes(model: Deployed, graph: onnx.ModelProto) -> None:
    again = export_graph(model, METADATA)
    assert again.SerializeToString(deterministic=True) == graph.SerializeToString(deterministic=True)


def test_fp16_storage_halves_the_file_and_changes_no_number() -> None:
    """Of a DenseNet, whose norms stand before its convolutions and fold into none: one of a tenth of its layers."""
    torch.manual_seed(1)
    small = torchvision.models.DenseNet(32, (2, 2, 2, 2), 64)
    network = MultiTaskNet(_DenseNet("densenet121", small, small.classifier.in_features), {}).eval()
    before = Deployed(network, as_it_is(Preprocessing(PX))).eval()
    tiles = synthetic_tiles(PX)[:4]
    unrounded = reference_outputs(before, tiles)["features"]
    round_weights_to_fp16(network)
    expected = reference_outputs(before, tiles)["features"]
    graph = export_graph(before, METADATA, "fp16")
    parameters = sum(tensor.numel() for tensor in small.features.parameters())
    assert len(graph.SerializeToString()) < 0.58 * 4 * parameters
    assert graph.graph.node[0].input == ["tiles"]
    np.testing.assert_allclose(run(graph, tiles)[0], expected, rtol=1e-3, atol=1e-4)
    assert 0 < np.abs(unrounded - expected).max() < 0.05
