"""A folder as Hugging Face hands it out: config.json says the architecture, its arguments and the pixels; and weights.

Two layouts are read: timm's (`architecture`, `model_args`, `pretrained_cfg`; also what `timm:local-dir:` takes), and
that of transformers (`model_type`, and preprocessor_config.json).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mtdp_export.catalogue import Library
from mtdp_export.errors import ExportError, ExportUsageError
from mtdp_export.pixels import Stated
from mtdp_export.snapshot_pixels import FolderPixels, pixels_of_timm, pixels_of_transformers

CONFIG: Final = "config.json"
_WEIGHTS: Final = ("model.safetensors", "pytorch_model.bin", "model.pt", "model.pth", "open_clip_pytorch_model.bin")
_LICENCES: Final = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "license.txt", "COPYING")
_CLASSES: Final = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "vit": "ViTModel",
    "clip": "CLIPVisionModelWithProjection",
    "clip_vision_model": "CLIPVisionModelWithProjection",
}
_MOST_BYTES: Final = 64_000_000


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a folder states."""

    folder: Path
    library: Library
    arch: str
    arguments: Mapping[str, Any]
    pixels: FolderPixels
    feature: str  # empty: as the network itself pools
    note: str = ""  # what is to be said of it

    @property
    def weights(self) -> Path:
        """The file with the weights.

        Raises:
            ExportUsageError: there is none that is known, or they lie in several.
        """
        return weights_in(self.folder)


def is_snapshot(folder: Path) -> bool:
    """Whether a folder has a config.json, and is no run of ours."""
    return (folder / CONFIG).is_file()


def refuse_bare_weights(folder: Path) -> None:
    """Refuse a folder that holds weights, and nothing that says of which network.

    Raises:
        ExportUsageError: it does.
    """
    held = [name for name in _WEIGHTS if (folder / name).is_file()]
    if (folder / "open_clip_config.json").is_file():
        raise ExportUsageError(
            f"{folder}: a model of open_clip, which is not built here",
            "make an ONNX file of its encode_image (torch.onnx.export), and bring it by --onnx",
        )
    if held:
        raise ExportUsageError(
            f"{folder}: {held[0]} lies in it, and no {CONFIG} that says of which network",
            f"name it: mtdp-export ENCODER --weights {folder / held[0]} (--list-encoders), or timm:NAME with --mean "
            "and --std",
        )


def weights_in(folder: Path, preferred: str = "") -> Path:
    """Return the file of weights in a folder.

    Raises:
        ExportUsageError: there is none that is known, or they lie in several.
    """
    for name in (preferred, *_WEIGHTS):
        if name and (folder / name).is_file():
            return folder / name
    parts = [*folder.glob("*-of-*.safetensors"), *folder.glob("*-of-*.bin")]
    if parts:
        raise ExportUsageError(
            f"{folder}: its weights lie in {len(parts)} files",
            "join them: load them with the library that wrote them, then model.save_pretrained(FOLDER, max_shard_size="
            "'100GB')",
        )
    raise ExportUsageError(f"{folder}: no weights in it", f"one of {', '.join(_WEIGHTS)} is looked for")


def licence_text(folder: Path) -> str:
    """Return the text of the licence that lies in a folder; empty where there is none."""
    for name in _LICENCES:
        file = folder / name
        if file.is_file() and file.stat().st_size < _MOST_BYTES:
            return file.read_text(encoding="utf-8", errors="replace")
    return ""


def read_snapshot(folder: Path, stated: Stated) -> Snapshot:
    """Read what a folder states; what the user states goes before it.

    Raises:
        ExportUsageError: it is neither timm's nor of an architecture of transformers that is known here, or it says too
            little of its pixels, or what is not computed here.
        ExportError: a file in it is damaged.
    """
    config = _json(folder / CONFIG)
    if "architecture" in config:
        return _of_timm(folder, config, stated)
    if "auto_map" in config and config.get("model_type") not in _CLASSES:
        raise ExportUsageError(
            f"{folder}: {CONFIG} names code of its own ({next(iter(config['auto_map'].values()))}), which is not run",
            "make an ONNX file with that code (torch.onnx.export), and bring it by --onnx",
        )
    if config.get("model_type") in _CLASSES:
        return _of_transformers(folder, config, stated)
    raise ExportUsageError(
        f"{folder}: {CONFIG} names no architecture that is known here ({config.get('model_type', 'no model_type')})",
        f"timm's, or {', '.join(_CLASSES)} of transformers; of others make an ONNX file, and bring it by --onnx",
    )


def _of_timm(folder: Path, config: Mapping[str, Any], stated: Stated) -> Snapshot:
    given = config.get("model_args") or {}
    if not isinstance(given, Mapping):
        raise ExportError(f"{folder}: model_args is no object but {given!r}", "copy the folder again")
    arguments = {name: value for name, value in given.items() if name != "num_classes"}
    pixels = pixels_of_timm(folder, config, arguments, stated)
    return Snapshot(folder, "timm", str(config["architecture"]), arguments, pixels, "")


def _of_transformers(folder: Path, config: Mapping[str, Any], stated: Stated) -> Snapshot:
    arch = _CLASSES[str(config["model_type"])]
    clip = arch.startswith("CLIP")
    inner = config.get("vision_config", config) if clip else config
    arguments = {
        name: value
        for name, value in inner.items()
        if isinstance(value, int | float | str | bool)
        and not name.startswith("_")
        and name not in ("model_type", "torch_dtype", "dtype", "transformers_version", "attn_implementation")
    }
    if clip and "projection_dim" in config:
        arguments["projection_dim"] = config["projection_dim"]
    pixels = pixels_of_transformers(
        folder, _preprocessor(folder), int(arguments.get("image_size", 224)), arch == "ViTModel", stated
    )
    code = next(iter((config.get("auto_map") or {}).values()), "")
    note = f"code of its own ({code}) was not run: built as transformers' {arch}" if code else ""
    return Snapshot(folder, "transformers", arch, arguments, pixels, "projection" if clip else "cls", note)


def _preprocessor(folder: Path) -> Mapping[str, Any] | None:
    """What a folder says of its images; newer versions of transformers put it into processor_config.json."""
    if (folder / "preprocessor_config.json").is_file():
        return _json(folder / "preprocessor_config.json")
    newer = folder / "processor_config.json"
    inner = _json(newer).get("image_processor") if newer.is_file() else None
    return inner if isinstance(inner, Mapping) else None


def _json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError(f"{file.stat().st_size} bytes")
        document = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise ExportError(f"{file} cannot be read: {error}", "copy the folder again") from error
    return document
