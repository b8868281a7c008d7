"""Weights: each source and layout, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision import models

from mtdp.backbones import Backbone, build_backbone
from mtdp.checkpoint import CheckpointInfo, current_versions, load_checkpoint, save_checkpoint
from mtdp.errors import UsageError, WeightsError
from mtdp.multitask import MultiTaskNet
from mtdp.preprocess import Preprocessing
from mtdp.weights import (
    WeightsOrigin,
    download,
    file_sha256,
    load_backbone_weights,
    named_input,
    names_its_architecture,
)

Tensors = dict[str, torch.Tensor]


def torchvision_state(arch: str, seed: int = 5) -> Tensors:
    torch.manual_seed(seed)
    return dict(models.get_model(arch, weights=None).state_dict())


def authors_layout(state: Tensors) -> Tensors:
    """The published layout: `features.` before every torchvision name, classifier too; heads as 1x1 convolutions."""
    width = {name: t for name, t in state.items() if name in ("fc.weight", "classifier.weight")}.popitem()[1].shape[1]
    heads = {
        f"heads.{task}.linear.{part}": torch.zeros(*shape)
        for task, classes in (("camelyon16", 2), ("umcm_colorectal", 8))
        for part, shape in (("weight", (classes, width, 1, 1)), ("bias", (classes,)))
    }
    return {**{f"features.{name}": tensor for name, tensor in state.items()}, **heads}


def assert_trunk_is(backbone: Backbone, state: Tensors) -> None:
    trunk = backbone.trunk.state_dict()
    assert trunk
    for name, tensor in trunk.items():
        assert tensor.equal(state[name]), name


@pytest.mark.parametrize("arch", ["resnet50", "densenet121"])
def test_the_authors_files_load(arch: str, tmp_path: Path) -> None:
    state = torchvision_state(arch)
    torch.save(authors_layout(state), tmp_path / "mh.pth")
    backbone = build_backbone(arch)
    origin = load_backbone_weights(backbone, arch, str(tmp_path / "mh.pth"))
    assert_trunk_is(backbone, state)
    assert (origin.source, origin.sha256) == ("mh.pth", file_sha256(tmp_path / "mh.pth"))


def test_the_authors_file_is_used_when_it_was_downloaded_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "resnet50-mh-best-191205-141200.pth"
    path.parent.mkdir(parents=True)
    state = torchvision_state("resnet50")
    torch.save(authors_layout(state), path)
    backbone = build_backbone("resnet50")
    origin = load_backbone_weights(backbone, "resnet50", "mtdp")
    assert_trunk_is(backbone, state)
    assert origin.source == "mtdp"
    assert "MIT" in origin.licence


@pytest.mark.parametrize("classifier", [True, False])
@pytest.mark.parametrize("arch", ["resnet18", "densenet121"])
def test_torchvision_files_load_with_and_without_classifier(arch: str, classifier: bool, tmp_path: Path) -> None:
    state = torchvision_state(arch)
    kept = {name: t for name, t in state.items() if classifier or not name.startswith(("fc.", "classifier."))}
    torch.save(kept, tmp_path / "a.pth")
    save_file(kept, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        backbone = build_backbone(arch)
        load_backbone_weights(backbone, arch, str(tmp_path / name))
        assert_trunk_is(backbone, state)


def test_old_densenet_names_and_missing_counters_load(tmp_path: Path) -> None:
    state = torchvision_state("densenet121")
    old = {}
    for name, tensor in state.items():
        if not name.endswith("num_batches_tracked"):
            for part in ("norm", "conv"):
                for number in "12":
                    if "denselayer" in name:
                        name = name.replace(f".{part}{number}.", f".{part}.{number}.")
            old[name] = tensor
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "old.pth")
    backbone = build_backbone("densenet121")
    load_backbone_weights(backbone, "densenet121", str(tmp_path / "old.pth"))
    for name, tensor in backbone.trunk.state_dict().items():
        assert name.endswith("num_batches_tracked") or tensor.equal(state[name])


def test_data_parallel_names_load(tmp_path: Path) -> None:
    state = torchvision_state("resnet18")
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "dp.pth")
    backbone = build_backbone("resnet18")
    load_backbone_weights(backbone, "resnet18", str(tmp_path / "dp.pth"))
    assert_trunk_is(backbone, state)


NOTHING = WeightsOrigin("random", "", "", None)


def run_folder(
    folder: Path, arch: str = "resnet18", origin: WeightsOrigin = NOTHING, config: dict[str, object] | None = None
) -> MultiTaskNet:
    """A run's folder with a checkpoint of ours."""
    folder.mkdir()
    net = MultiTaskNet(build_backbone(arch), {"a": ("x", "y")})
    training = {"config": config or {}, "init": origin.to_json(), "tasks": {}, "versions": current_versions()}
    info = CheckpointInfo(arch, net.class_names, Preprocessing(), training, 1)
    save_checkpoint(folder / "checkpoint.safetensors", net, info)
    return net


def test_a_run_of_ours_gives_its_backbone(tmp_path: Path) -> None:
    net = run_folder(tmp_path / "run")
    backbone = build_backbone("resnet18")
    load_backbone_weights(backbone, "resnet18", str(tmp_path / "run"))
    assert_trunk_is(backbone, dict(net.backbone.trunk.state_dict()))


def test_a_run_of_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    run_folder(tmp_path / "run", "resnet18")
    with pytest.raises(WeightsError, match="holds resnet18 weights, not resnet50") as caught:
        load_backbone_weights(build_backbone("resnet50"), "resnet50", str(tmp_path / "run"))
    assert "--arch resnet18" in caught.value.hint


def test_weights_of_another_architecture_are_refused_with_a_few_names(tmp_path: Path) -> None:
    torch.save(torchvision_state("resnet18"), tmp_path / "r18.pth")
    for arch, words in (
        ("densenet121", ("missing (features.conv0.weight", "unexpected (conv1.weight")),
        ("resnet34", ("missing (layer1.2.conv1.weight",)),
        ("resnet50", ("of another shape (layer1.0.conv1.weight",)),
    ):
        with pytest.raises(WeightsError) as caught:
            load_backbone_weights(build_backbone(arch), arch, str(tmp_path / "r18.pth"))
        assert all(word in caught.value.message for word in (*words, "r18.pth", arch))
        assert len(caught.value.message) < 600


def test_random_weights_follow_the_seed_and_leave_the_generator_alone() -> None:
    one, two, three = (build_backbone("resnet18") for _ in range(3))
    before = torch.get_rng_state()
    load_backbone_weights(one, "resnet18", "random", seed=1)
    load_backbone_weights(two, "resnet18", "random", seed=1)
    load_backbone_weights(three, "resnet18", "random", seed=2)
    assert torch.get_rng_state().equal(before)
    assert_trunk_is(one, dict(two.trunk.state_dict()))
    assert not one.trunk.state_dict()["conv1.weight"].equal(three.trunk.state_dict()["conv1.weight"])


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("pwned"),))  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["bad.pth", "bad.safetensors", "code.pth", "module.pth"])
def test_files_that_are_no_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Malicious(), protocol=2))
    torch.save({"epoch": 3, "state": torchvision_state("resnet18")}, tmp_path / "module.pth")
    with pytest.raises(WeightsError, match=name.replace(".", r"\.")):
        load_backbone_weights(build_backbone("resnet18"), "resnet18", str(tmp_path / name))
    assert not (tmp_path / "pwned").exists()


def test_a_source_that_is_nothing_is_wrong_usage(tmp_path: Path) -> None:
    backbone = build_backbone("resnet18")
    with pytest.raises(UsageError, match="no weights 'imagnet'"):
        load_backbone_weights(backbone, "resnet18", "imagnet")
    with pytest.raises(UsageError, match=r"without checkpoint\.safetensors"):
        load_backbone_weights(backbone, "resnet18", str(tmp_path))
    with pytest.raises(UsageError, match="published no resnet18"):
        load_backbone_weights(backbone, "resnet18", "mtdp")


def test_download_fetches_once_and_leaves_no_stray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    (tmp_path / "served.bin").write_bytes(b"weights")
    url = (tmp_path / "served.bin").as_uri()
    digest = file_sha256(tmp_path / "served.bin")
    path = download(url, "got.bin", digest[:8])
    assert path.read_bytes() == b"weights"
    (tmp_path / "served.bin").unlink()
    assert download(url, "got.bin", digest) == path  # from the first time
    with pytest.raises(WeightsError, match="digest"):
        download(url, "got.bin", "0123")
    with pytest.raises(WeightsError, match=r"other\.bin could not be downloaded") as caught:
        download(url, "other.bin")
    assert "give its path" in caught.value.hint
    assert [p.name for p in path.parent.iterdir()] == ["got.bin"]


def test_offline_imagenet_weights_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(WeightsError, match=r"resnet18-\w+\.pth could not be downloaded from https://download\.pytorch"):
        load_backbone_weights(build_backbone("resnet18"), "resnet18", "imagenet")


def test_the_real_imagenet_densenet_loads(data_dir: Path) -> None:
    path = data_dir / "weights" / "densenet121-imagenet.safetensors"
    backbone = build_backbone("densenet121").eval()
    origin = load_backbone_weights(backbone, "densenet121", str(path))
    assert origin.sha256 == "4b4df6751a9b8fc7d0d0a6807a4b7108e4a5d362c76c400f02191c39f210176b"
    assert "ImageNet" in origin.description
    assert backbone.trunk.state_dict()["features.conv0.weight"].equal(load_file(path)["features.conv0.weight"])
    assert WeightsOrigin.from_json(json.loads(json.dumps(origin.to_json()))) == origin


def test_a_checkpoint_of_ours_tells_where_it_is_from(tmp_path: Path) -> None:
    run_folder(tmp_path / "first", origin=WeightsOrigin("imagenet", "torchvision resnet18", "BSD-3-Clause", None))
    origin = load_backbone_weights(build_backbone("resnet18"), "resnet18", str(tmp_path / "first"))
    assert origin.description == "1 iterations of first, from torchvision resnet18"
    assert origin.licence == "BSD-3-Clause"
    assert origin.sha256 == file_sha256(tmp_path / "first/checkpoint.safetensors")
    run_folder(tmp_path / "tuned", origin=origin, config={"epochs": 1})
    again = load_backbone_weights(build_backbone("resnet18"), "resnet18", str(tmp_path / "tuned"))
    assert again.description == "1 epochs of tuned, from 1 iterations of first, from torchvision resnet18"
    assert again.licence == "BSD-3-Clause"


def test_a_state_dict_without_a_tensor_is_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "empty.pth")
    with pytest.raises(WeightsError, match=r"empty\.pth does not fit resnet18: 100 missing"):
        load_backbone_weights(build_backbone("resnet18"), "resnet18", str(tmp_path / "empty.pth"))


def test_a_runs_state_is_no_weights_file(tmp_path: Path) -> None:
    save_file(
        {"network.a": torch.zeros(1)}, tmp_path / "state.safetensors", metadata={"mtdp": '{"kind": "fine-tuning"}'}
    )
    for call in (names_its_architecture, lambda source: named_input(source, None, None), load_checkpoint):
        with pytest.raises(UsageError, match="is the state that a run resumes from") as caught:
            call(str(tmp_path / "state.safetensors"))
        assert caught.value.hint == "give checkpoint.safetensors"
    (tmp_path / "state.safetensors").rename(tmp_path / "renamed.safetensors")
    assert names_its_architecture(str(tmp_path / "renamed.safetensors")) is None
    with pytest.raises(WeightsError, match="does not fit resnet18"):
        load_backbone_weights(build_backbone("resnet18"), "resnet18", str(tmp_path / "renamed.safetensors"))
