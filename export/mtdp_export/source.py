"""What is to be exported: a run, a checkpoint, or an architecture with weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mtdp.backbones import ARCHITECTURES, build_backbone, native_preprocessing
from mtdp.checkpoint import CheckpointInfo, load_checkpoint
from mtdp.multitask import MultiTaskNet
from mtdp.preprocess import Preprocessing
from mtdp.weights import is_named_source, load_backbone_weights, names_its_architecture
from mtdp_export.errors import ExportUsageError


@dataclass(frozen=True, slots=True)
class Source:
    """A network in eval mode, and where it comes from."""

    network: MultiTaskNet
    arch: str
    preprocessing: Preprocessing
    origin: str
    licence: str
    checkpoint: CheckpointInfo | None  # None for bare weights

    @property
    def class_names(self) -> dict[str, tuple[str, ...]]:
        return self.network.class_names


def open_source(name: str, weights: str | None, tile_px: int | None, heads: bool) -> Source:
    """Load what the user named.

    Args:
        name: an architecture, a run folder or a checkpoint file; `./resnet50` is a path, `resnet50` is not.
        weights: for an architecture only: imagenet, mtdp, random or a path.
        tile_px: side of the input; the checkpoint's own, or 224, where None.
        heads: keep the classification heads of a checkpoint.

    Raises:
        ExportUsageError: the name is neither a path nor an architecture, or the options do not go together.
        MtdpError: the checkpoint or the weights cannot be loaded.
    """
    known = name in ARCHITECTURES or name.startswith("timm:")
    if not known and Path(name).exists():
        if weights is not None:
            raise ExportUsageError(f"--weights {weights}: {name} has weights of its own", "leave --weights out")
        network, info = load_checkpoint(Path(name))
        preprocessing = _with_side(network, info.preprocessing, tile_px)
        network = network if heads else MultiTaskNet(network.backbone, {})
        licence = f"of the weights that training started from: {info.origin.licence}"
        return Source(network.eval(), info.arch, preprocessing, _origin(info), licence, info)
    if not known:
        raise ExportUsageError(
            f"{name}: neither a run, nor a checkpoint, nor an architecture",
            f"architectures: {', '.join(ARCHITECTURES)}, timm:NAME; an ONNX file is given with --onnx",
        )
    if weights is not None and not is_named_source(weights) and names_its_architecture(weights) is not None:
        raise ExportUsageError(
            f"--weights {weights}: a training run of ours, which has a preprocessing of its own",
            f"mtdp-export {weights} --out BUNDLE, with --no-heads for the features alone",
        )
    if weights is None:
        raise ExportUsageError(f"{name}: an architecture needs weights", "--weights imagenet, mtdp, random or a path")
    backbone = build_backbone(name)
    origin = load_backbone_weights(backbone, name, weights)
    network = MultiTaskNet(backbone, {}).eval()
    return Source(network, name, native_preprocessing(backbone, tile_px), origin.description, origin.licence, None)


def weights_digest(network: torch.nn.Module) -> str:
    """SHA-256 over all tensors in the order of their names: name, dtype, shape, bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _with_side(network: MultiTaskNet, preprocessing: Preprocessing, tile_px: int | None) -> Preprocessing:
    if tile_px in (None, preprocessing.image_px):
        return preprocessing
    native_preprocessing(network.backbone, tile_px)  # refuses a side that the architecture cannot take
    return replace(preprocessing, image_px=tile_px)


def _origin(info: CheckpointInfo) -> str:
    tasks, config = info.training["tasks"], info.training["config"]
    images = sum(task["images"] for task in tasks.values())
    if "epochs" in config:
        return (
            f"fine-tuning on {', '.join(tasks)} ({images} images), epoch {info.iteration} of {config['epochs']}, "
            f"started from: {info.origin.description}"
        )
    return (
        f"multi-task pre-training, {info.iteration} batches of {config['batch_size']} from "
        f"{len(tasks)} tasks ({images} images), started from: {info.origin.description}"
    )
