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

from mtdp.preprocess import Preprocessing
from mtdp_export.catalogue import Library
from mtdp_export.errors import ExportError, ExportUsageError

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
_PIL: Final = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # `resample` of a preprocessor is Pillow's number
_MOST_BYTES: Final = 64_000_000


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a folder states."""

    folder: Path
    library: Library
    arch: str
    arguments: Mapping[str, Any]
    preprocessing: Preprocessing | None  # None: it says no mean and std
    resize_px: int | None  # before the centre is cut out
    feature: str

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


def read_snapshot(folder: Path) -> Snapshot:
    """Read what a folder states.

    Raises:
        ExportUsageError: it is neither timm's nor of an architecture of transformers that is known here.
        ExportError: a file in it is damaged.
    """
    config = _json(folder / CONFIG)
    if "architecture" in config:
        return _of_timm(folder, config)
    if "auto_map" in config and config.get("model_type") not in _CLASSES:
        raise ExportUsageError(
            f"{folder}: {CONFIG} names code of its own ({next(iter(config['auto_map'].values()))}), which is not run",
            "make an ONNX file with that code (torch.onnx.export), and bring it by --onnx",
        )
    if config.get("model_type") in _CLASSES:
        return _of_transformers(folder, config)
    raise ExportUsageError(
        f"{folder}: {CONFIG} names no architecture that is known here ({config.get('model_type', 'no model_type')})",
        f"timm's, or {', '.join(_CLASSES)} of transformers",
    )


def _of_timm(folder: Path, config: Mapping[str, Any]) -> Snapshot:
    arguments = {k: v for k, v in (config.get("model_args") or {}).items() if k != "num_classes"}
    stated: Mapping[str, Any] = config.get("pretrained_cfg") or config
    preprocessing, resize_px = None, None
    if "mean" in stated and "std" in stated:
        side = int((stated.get("input_size") or (3, 224, 224))[-1])
        crop_pct = float(stated.get("crop_pct") or 1.0)
        preprocessing = Preprocessing(
            side, _rgb(stated["mean"], folder), _rgb(stated["std"], folder), str(stated.get("interpolation", "bicubic"))
        )
        resize_px = int(side // crop_pct) if 0 < crop_pct < 1 else None
    pool = arguments.get("global_pool", config.get("global_pool", "token"))
    feature = "cls" if pool in ("", "token") and "vit" in str(config["architecture"]) else "pooled"
    return Snapshot(folder, "timm", str(config["architecture"]), arguments, preprocessing, resize_px, feature)


def _of_transformers(folder: Path, config: Mapping[str, Any]) -> Snapshot:
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
    file = folder / "preprocessor_config.json"
    preprocessing, resize_px = None, None
    if file.is_file():
        stated = _json(file)
        size, crop = _side(stated.get("size")), _side(stated.get("crop_size"))
        cuts = bool(stated.get("do_center_crop", crop is not None)) and crop is not None
        resizes = bool(stated.get("do_resize", True)) and size is not None
        side = crop if cuts else size
        if "image_mean" in stated and "image_std" in stated and side is not None:
            how = _PIL.get(int(stated.get("resample", 2)), "bilinear")
            mean, std = _rgb(stated["image_mean"], folder), _rgb(stated["image_std"], folder)
            preprocessing = Preprocessing(side, mean, std, how)
            resize_px = size if resizes and cuts and size != side else None
    return Snapshot(folder, "transformers", arch, arguments, preprocessing, resize_px, "projection" if clip else "cls")


def _side(value: Any) -> int | None:
    if isinstance(value, Mapping):
        value = value.get("shortest_edge", value.get("height"))
    return int(value) if isinstance(value, int | float) else None


def _rgb(values: Any, folder: Path) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise ExportError(f"{folder}: mean and std are not three numbers: {values!r}", "copy it again") from error
    return (red, green, blue)


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
