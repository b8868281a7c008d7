"""Checkpoints: whole or not there, and all that rebuilds the network inside."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mtdp.backbones import build_backbone
from mtdp.checkpoint import CheckpointInfo, current_versions, load_checkpoint, save_checkpoint, write_tensors
from mtdp.errors import CheckpointError, UsageError
from mtdp.multitask import MultiTaskNet
from mtdp.preprocess import Preprocessing
from mtdp.weights import WeightsOrigin

ORIGIN = WeightsOrigin("random", "random initialisation, seed 0", "none", None)


@pytest.fixture(scope="module")
def net() -> MultiTaskNet:
    torch.manual_seed(0)
    return MultiTaskNet(build_backbone("resnet18"), {"zebra": ("x", "y"), "ant": ("p", "q", "r")}).eval()


@pytest.fixture(scope="module")
def info(net: MultiTaskNet) -> CheckpointInfo:
    training = {"config": {"seed": 7}, "init": ORIGIN.to_json(), "tasks": {}, "versions": current_versions()}
    return CheckpointInfo("resnet18", net.class_names, Preprocessing(image_px=96), training, 12)


@pytest.fixture
def file(tmp_path: Path, net: MultiTaskNet, info: CheckpointInfo) -> Path:
    save_checkpoint(tmp_path / "checkpoint.safetensors", net, info)
    return tmp_path / "checkpoint.safetensors"


def test_a_network_comes_back_whole(file: Path, net: MultiTaskNet, info: CheckpointInfo) -> None:
    for path in (file, file.parent, str(file.parent)):  # the file, or the run's folder
        again, told = load_checkpoint(path)
        assert told == info
        assert told.origin == ORIGIN
        assert not again.training
        assert again.task_names == ("zebra", "ant")  # the order of the tasks, not of the alphabet
        assert again.class_names == net.class_names
        x = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            for name, logits in net(x).items():
                assert logits.equal(again(x)[name])


def test_channels_last_weights_come_back_equal(tmp_path: Path, net: MultiTaskNet, info: CheckpointInfo) -> None:
    turned = MultiTaskNet(build_backbone("resnet18"), net.class_names)
    turned.load_state_dict(net.state_dict())
    save_checkpoint(tmp_path / "a.safetensors", turned.to(memory_format=torch.channels_last), info)
    again, _ = load_checkpoint(tmp_path / "a.safetensors")
    assert all(tensor.equal(net.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_writing_leaves_one_readable_file_and_no_stray(file: Path) -> None:
    assert [p.name for p in file.parent.iterdir()] == ["checkpoint.safetensors"]
    ordinary = file.parent / "ordinary"
    ordinary.touch()
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def test_a_write_that_fails_says_so_and_leaves_no_stray(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    for path in (tmp_path / "taken", tmp_path / "nowhere" / "a.safetensors"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            write_tensors(path, {"a": torch.zeros(1)}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def rewrite(file: Path, **changes: object) -> Path:
    """The same tensors with another description."""
    with safe_open(file, framework="pt") as opened:
        data = json.loads(opened.metadata()["mtdp"])
    for key, value in changes.items():
        if value is None:
            del data[key]
        else:
            data[key] = value
    save_file(load_file(file), file, metadata={"mtdp": json.dumps(data)})
    return file


def test_what_is_not_a_checkpoint_is_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="schema version 99"):
        load_checkpoint(rewrite(file, schema_version=99))
    rewrite(file, schema_version=1)
    with pytest.raises(CheckpointError, match="preprocessing is missing"):
        load_checkpoint(rewrite(file, preprocessing=None))
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="not the description") as caught:
        load_checkpoint(tmp_path / "plain.safetensors")
    assert "--init" in caught.value.hint
    with pytest.raises(UsageError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere")


def test_a_truncated_checkpoint_is_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors is not a readable safetensors file"):
        load_checkpoint(file)


def test_tensors_of_another_architecture_are_refused(file: Path) -> None:
    with pytest.raises(CheckpointError, match="do not fit resnet34"):
        load_checkpoint(rewrite(file, arch="resnet34"))
