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
from mtdp_export.pixels import Pixels, Stated, arranged


@dataclass(frozen=True, slots=True)
class Source:
    """A network in eval mode, and where it comes from."""

    network: MultiTaskNet
    arch: str
    pixels: Pixels
    origin: str
    licence: str
    checkpoint: CheckpointInfo | None  # None for bare weights

    @property
    def preprocessing(self) -> Preprocessing:
        return self.pixels.preprocessing

    @property
    def class_names(self) -> dict[str, tuple[str, ...]]:
        return self.network.class_names


def open_source(
    name: str, weights: str | None, tile_px: int | None, heads: bool, *, stated: Stated | None = None
) -> Source:
    """Load what the user named.

    Args:
        name: an architecture, a run folder or a checkpoint file; `./resnet50` is a path, `resnet50` is not.
        weights: for an architecture only: imagenet, mtdp, random or a path.
        tile_px: side of the tile that is read; the checkpoint's own, or 224, where None.
        heads: keep the classification heads of a checkpoint.
        stated: what else the user says of the pixels.

    Raises:
        ExportUsageError: the name is neither a path nor an architecture, or the options do not go together.
        MtdpError: the checkpoint or the weights cannot be loaded.
    """
    stated = replace(stated or Stated(), tile_px=tile_px)
    known = name in ARCHITECTURES or name.startswith("timm:")
    if known:
        return _architecture(name, weights, stated)
    if Path(name).exists():
        return _run(name, weights, stated, heads)
    raise ExportUsageError(
        f"{name}: neither a run, nor a checkpoint, nor an architecture",
        f"architectures: {', '.join(ARCHITECTURES)}, timm:NAME; an ONNX file is given with --onnx",
    )


def _run(name: str, weights: str | None, stated: Stated, heads: bool) -> Source:
    if weights is not None:
        raise ExportUsageError(f"--weights {weights}: {name} has weights of its own", "leave --weights out")
    stated.check()
    network, info = load_checkpoint(Path(name))
    pixels = arranged(stated, info.preprocessing, "the training run's own")
    if pixels.preprocessing.image_px != info.preprocessing.image_px:
        native_preprocessing(network.backbone, pixels.preprocessing.image_px)  # refuses a side that it cannot take
    network = network if heads else MultiTaskNet(network.backbone, {})
    licence = f"of the weights that training started from: {info.origin.licence}"
    return Source(network.eval(), info.arch, pixels, _origin(info), licence, info)


def _architecture(name: str, weights: str | None, stated: Stated) -> Source:
    if weights is None:
        raise ExportUsageError(f"{name}: an architecture needs weights", "--weights imagenet, mtdp, random or a path")
    a_file = not is_named_source(weights)
    if a_file and names_its_architecture(weights) is not None:
        raise ExportUsageError(
            f"--weights {weights}: a training run of ours, which has a preprocessing of its own",
            f"mtdp-export {weights} --out BUNDLE, with --no-heads for the features alone",
        )
    stated.check()
    missing = [f"--{part}" for part in ("mean", "std") if getattr(stated, part) is None]
    if a_file and missing:
        raise ExportUsageError(
            f"--weights {weights}: {' and '.join(missing)} must be said: nothing in a file of weights tells how its "
            f"network's pixels were normalised, and {name} alone does not either",
            "ImageNet's are --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225; the encoder's card says its own",
        )
    backbone = build_backbone(name)
    origin = load_backbone_weights(backbone, name, weights)
    pixels = arranged(stated, native_preprocessing(backbone), _says(name, weights))
    native_preprocessing(backbone, pixels.preprocessing.image_px)  # refuses a side that it cannot take
    network = MultiTaskNet(backbone, {}).eval()
    return Source(network, name, pixels, origin.description, origin.licence, None)


def _says(name: str, weights: str) -> str:
    """Who says the numbers of an architecture: never of weights that are not its library's."""
    if weights == "mtdp":
        return "the paper's, ImageNet's (Mormont et al. 2021)"
    library = "timm's" if name.startswith("timm:") else "torchvision's"
    if weights == "imagenet":
        return f"{library} for the pre-trained {name.removeprefix('timm:')}"
    return f"{library} default for {name.removeprefix('timm:')}"


def weights_digest(network: torch.nn.Module) -> str:
    """SHA-256 over all tensors in the order of their names: name, dtype, shape, bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


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
