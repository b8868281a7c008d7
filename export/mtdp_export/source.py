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
from mtdp.weights import CHECKPOINT_NAME, file_sha256, is_named_source, load_backbone_weights, names_its_architecture
from mtdp_export.catalogue import by_digest, named, nearest
from mtdp_export.encoder_source import Asked, Opened, open_folder, open_recipe, open_timm
from mtdp_export.errors import ExportUsageError
from mtdp_export.pixels import Pixels, Stated, arranged
from mtdp_export.snapshot import is_snapshot, refuse_bare_weights


@dataclass(frozen=True, slots=True)
class Source:
    """A network in eval mode, and where it comes from."""

    network: MultiTaskNet
    arch: str
    pixels: Pixels
    origin: str
    licence: str
    checkpoint: CheckpointInfo | None  # None for bare weights
    feature: str = ""  # which of the network's values, where there is a choice
    encoder: str = ""  # its key in the catalogue
    published: str = ""  # what the digest of the weights says of them
    mpp: float | None = None  # at which it was trained; None: not known
    licence_text: str = ""  # that lay beside the weights

    @property
    def preprocessing(self) -> Preprocessing:
        return self.pixels.preprocessing

    @property
    def class_names(self) -> dict[str, tuple[str, ...]]:
        return self.network.class_names


def open_source(
    name: str,
    weights: str | None,
    tile_px: int | None,
    heads: bool,
    *,
    stated: Stated | None = None,
    asked: Asked | None = None,
) -> Source:
    """Load what the user named.

    Args:
        name: an architecture, a run folder or a checkpoint file; `./resnet50` is a path, `resnet50` is not.
        weights: for an architecture only: imagenet, mtdp, random or a path.
        tile_px: side of the tile that is read; the checkpoint's own, or 224, where None.
        heads: keep the classification heads of a checkpoint.
        stated: what else the user says of the pixels.
        asked: what the user says of the network: arguments of a constructor, and which of its values is the feature.

    Raises:
        ExportUsageError: the name is neither a path nor an architecture, or the options do not go together.
        MtdpError: the checkpoint or the weights cannot be loaded.
    """
    stated, asked = replace(stated or Stated(), tile_px=tile_px), asked or Asked()
    recipe = named(name)
    if recipe is not None:
        return _of(open_recipe(recipe, weights, stated, asked))
    local = name.removeprefix("timm:").removeprefix("local-dir:") if name.startswith("timm:local-dir:") else name
    if name in ARCHITECTURES or (name.startswith("timm:") and local == name):
        return _architecture(name, weights, stated, asked)
    if is_snapshot(Path(local)):
        _no_weights(name, weights)
        return _of(open_folder(Path(local), stated, asked))
    if Path(local).exists() and local == name:
        _no_weights(name, weights)
        if Path(name).is_dir() and not (Path(name) / CHECKPOINT_NAME).is_file():
            refuse_bare_weights(Path(name))
        return _run(name, stated, heads, asked)
    close = nearest(name, ARCHITECTURES)
    raise ExportUsageError(
        f"{name}: neither a run, nor a checkpoint, nor an architecture, nor an encoder of the catalogue",
        f"did you mean {' or '.join(close)}? mtdp-export --list-encoders shows all"
        if close
        else f"architectures: {', '.join(ARCHITECTURES)}, timm:NAME; mtdp-export --list-encoders; an ONNX file is "
        "given with --onnx",
    )


def _of(opened: Opened) -> Source:
    return Source(
        opened.network,
        opened.arch,
        opened.pixels,
        opened.origin,
        opened.licence,
        None,
        opened.feature,
        opened.encoder,
        opened.published,
        opened.mpp,
        opened.licence_text,
    )


def _no_weights(name: str, weights: str | None) -> None:
    if weights is not None:
        raise ExportUsageError(f"--weights {weights}: {name} has weights of its own", "leave --weights out")


def _run(name: str, stated: Stated, heads: bool, asked: Asked) -> Source:
    if asked != Asked():
        raise ExportUsageError(f"--feature and --arch-arg: {name} is a run, whose network is known", "leave them out")
    stated.check()
    network, info = load_checkpoint(Path(name))
    pixels = arranged(stated, info.preprocessing, "the training run's own")
    if pixels.preprocessing.image_px != info.preprocessing.image_px:
        native_preprocessing(network.backbone, pixels.preprocessing.image_px)  # refuses a side that it cannot take
    network = network if heads else MultiTaskNet(network.backbone, {})
    licence = f"of the weights that training started from: {info.origin.licence}"
    return Source(network.eval(), info.arch, pixels, _origin(info), licence, info)


def _architecture(name: str, weights: str | None, stated: Stated, asked: Asked) -> Source:
    if weights is None:
        raise ExportUsageError(f"{name}: an architecture needs weights", "--weights imagenet, mtdp, random or a path")
    a_file = not is_named_source(weights)
    own_timm = name.startswith("timm:") and (a_file or asked != Asked())
    if asked != Asked() and not own_timm:
        raise ExportUsageError(f"--feature and --arch-arg go with timm:NAME, not with {name}", "leave them out")
    if a_file and not Path(weights).is_dir() and names_its_architecture(weights) is not None:
        raise ExportUsageError(
            f"--weights {weights}: a training run of ours, which has a preprocessing of its own",
            f"mtdp-export {weights} --out BUNDLE, with --no-heads for the features alone",
        )
    stated.check()
    missing = [f"--{part}" for part in ("mean", "std") if getattr(stated, part) is None]
    if a_file and missing:
        known = by_digest(file_sha256(Path(weights))) if Path(weights).is_file() else None
        if known is not None:
            raise ExportUsageError(
                f"--weights {weights}: these are {known.title}'s published weights, which the catalogue knows",
                known.line.replace(known.weights.file, weights),
            )
        raise ExportUsageError(
            f"--weights {weights}: {' and '.join(missing)} must be said: nothing in a file of weights tells how its "
            f"network's pixels were normalised, and {name} alone does not either",
            "ImageNet's are --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225; the encoder's card says its own",
        )
    if own_timm and weights not in ("imagenet", "mtdp"):
        return _of(open_timm(name, weights, stated, asked))
    if asked != Asked():
        raise ExportUsageError(f"--feature and --arch-arg go with weights of a file, not {weights}", "leave them out")
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
        f"multi-task pre-training, {info.iteration} batches of {config.get('batch_size', 'an unknown size')} from "
        f"{len(tasks)} tasks ({images} images), started from: {info.origin.description}"
    )
