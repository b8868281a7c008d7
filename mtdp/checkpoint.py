"""Checkpoints: weights as safetensors, and in the same file's metadata, as JSON, all that rebuilds and explains them.

Nothing is ever pickled. A file is written beside its final name and moved there at the end, so a reader sees the old
one or the new one, and a killed run leaves no half-written checkpoint.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

import mtdp
from mtdp.backbones import build_backbone
from mtdp.errors import CheckpointError, UsageError
from mtdp.multitask import MultiTaskNet
from mtdp.preprocess import Preprocessing
from mtdp.stated import misfit, parsed
from mtdp.weights import CHECKPOINT_SHAPE, METADATA_KEY, WeightsOrigin, find_weights_file

SCHEMA_VERSION: Final = 1
COPY_AGAIN: Final = "it is damaged, or no file of mtdp: copy it again"
_MOST_CLASSES: Final = 100_000  # of all heads: a file of a kilobyte must not ask for gigabytes


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What a checkpoint says of itself."""

    arch: str
    heads: Mapping[str, tuple[str, ...]]  # task -> class names, in the order of the head's outputs
    preprocessing: Preprocessing
    training: Mapping[str, Any]  # "config" (seeds included), "init" (origin), "tasks" (data and metric), "versions"
    iteration: int  # how many were done

    @property
    def origin(self) -> WeightsOrigin:
        """Where the backbone's weights came from before this training."""
        return WeightsOrigin.from_json(self.training["init"])

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "arch": self.arch,
            "heads": {name: list(classes) for name, classes in self.heads.items()},
            "head_order": list(self.heads),
            "preprocessing": self.preprocessing.to_json(),
            "training": dict(self.training),
            "iteration": self.iteration,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> CheckpointInfo:
        heads = data["heads"]
        return CheckpointInfo(
            arch=str(data["arch"]),
            heads={str(name): tuple(heads[name]) for name in data.get("head_order", heads)},
            preprocessing=Preprocessing.from_json(data["preprocessing"]),
            training={**data["training"], "init": WeightsOrigin.from_json(data["training"]["init"]).to_json()},
            iteration=int(data["iteration"]),
        )


def current_versions() -> dict[str, str]:
    """Return the versions of what trains, by name."""
    return {
        "mtdp": mtdp.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }


def save_checkpoint(path: Path, net: MultiTaskNet, info: CheckpointInfo) -> None:
    """Write the network and what it says of itself, atomically."""
    write_tensors(path, net.state_dict(), info.to_json())


def load_checkpoint(path: str | Path) -> tuple[MultiTaskNet, CheckpointInfo]:
    """Rebuild a network, in eval mode on the CPU, from a checkpoint file or the folder of a training run.

    Raises:
        UsageError: there is no such file or run.
        CheckpointError: the file is damaged, of an unknown schema, or not a checkpoint of this package.
    """
    file = find_weights_file(str(path))
    tensors, data = read_tensors_and_json(file, CHECKPOINT_SHAPE)
    try:
        info = CheckpointInfo.from_json(data)
        if sum(map(len, info.heads.values())) > _MOST_CLASSES:
            raise UsageError(f"more than {_MOST_CLASSES} classes")
        net = MultiTaskNet(build_backbone(info.arch), info.heads)
    except KeyError as error:
        raise CheckpointError(f"{file}: head_order names {error}, which heads lacks", COPY_AGAIN) from error
    except UsageError as error:
        raise CheckpointError(f"{file}: {error}", error.hint) from error
    fill_net(net, tensors, file)
    return net.eval(), info


def fill_net(net: MultiTaskNet, tensors: Mapping[str, torch.Tensor], origin: Path) -> None:
    """Copy a whole state dict into a network; names and shapes must be equal."""
    try:
        net.load_state_dict(dict(tensors))
    except (RuntimeError, NotImplementedError) as error:
        first = str(error).split("\n", 1)[-1].strip().split("\n")[0][:200]
        raise CheckpointError(f"{origin}: the weights do not fit {net.backbone.arch} and its heads: {first}") from error


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], data: Mapping[str, Any]) -> None:
    """Write tensors and a JSON document to one safetensors file, atomically."""
    partial = path.with_name(f".{path.name}.partial")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with partial.open("wb") as file:  # our own file, so that it has the user's usual permissions
            file.write(save(plain, metadata={METADATA_KEY: json.dumps(data, sort_keys=True)}))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}", "check free space and permissions") from error
    finally:
        partial.unlink(missing_ok=True)


def read_tensors_and_json(path: Path, shape: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the JSON document of a file that `write_tensors` wrote.

    Args:
        path: the file.
        shape: of the document; see `mtdp.stated`.

    Raises:
        CheckpointError: the file is damaged, of another schema, or of another origin.
    """
    try:
        with safe_open(path, framework="pt") as file:
            data = _described(path, (file.metadata() or {}).get(METADATA_KEY), shape)
            return {name: file.get_tensor(name) for name in file.keys()}, data  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def read_description(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, without its tensors.

    Raises:
        CheckpointError: as `read_tensors_and_json`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return _described(path, (file.metadata() or {}).get(METADATA_KEY), CHECKPOINT_SHAPE)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is not a readable safetensors file: {error}", "the file may be truncated")


def _described(path: Path, text: str | None, shape: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document, which must be of the shape; before any tensor is read."""
    if text is None:
        raise CheckpointError(
            f"{path} holds weights, but not the description that a checkpoint of mtdp has",
            "use it as starting weights (--init PATH, or --weights PATH with an architecture name)",
        )
    try:
        data: dict[str, Any] = parsed(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: its description is damaged: {error}", COPY_AGAIN) from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version != SCHEMA_VERSION:
        raise CheckpointError(f"{path}: schema version {version!r}, this program reads {SCHEMA_VERSION}", "update mtdp")
    wrong = misfit(data, {"schema_version": int, **shape})
    if wrong:
        raise CheckpointError(f"{path}: in its description, {wrong}", COPY_AGAIN)
    return data
