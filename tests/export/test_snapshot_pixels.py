"""What a folder of Hugging Face says of pixels: computed as its own library does it, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

from mtdp_export.errors import ExportError, ExportUsageError
from mtdp_export.pixels import Prepared, Stated, arranged
from mtdp_export.snapshot_pixels import FolderPixels, pixels_of_timm, pixels_of_transformers
from support import stained

MEAN, STD = [0.7, 0.6, 0.5], [0.2, 0.25, 0.3]
FOLDER = Path("folder")
TILE = np.ascontiguousarray(stained(96, 96))
BOTH = Stated((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def check_same(found: FolderPixels, wanted: torch.Tensor) -> None:
    """Equal, but for one grey level where a value lies halfway between two."""
    off = (as_computed(found) - wanted).abs() * 255 * torch.tensor(found.preprocessing.std)[:, None, None]
    assert off.max() < 1.01
    assert (off > 0.01).float().mean() < 0.01


def as_computed(found: FolderPixels) -> torch.Tensor:
    own = found.preprocessing
    stated = Stated(tile_px=len(TILE), resize_px=found.resize_px, crop_px=own.image_px)
    return Prepared(arranged(stated, own, ""))(torch.from_numpy(TILE)[None])[0]


@pytest.mark.parametrize(
    "said",
    [
        {"crop_pct": 1.0},
        {"crop_pct": 0.8},  # 64 / 0.8 is 80, and 64 // 0.8 is 79
        {"crop_pct": 0.9, "crop_mode": "squash", "interpolation": "bilinear"},
        {"crop_pct": 0.95, "crop_mode": "border"},
        {},  # timm's own is 0.875, and bicubic
    ],
)
def test_what_timm_says_is_what_timm_does(said: dict[str, Any]) -> None:
    config: dict[str, Any] = {"mean": MEAN, "std": STD, "input_size": [3, 64, 64], **said}
    transform: Any = timm.data.create_transform(**timm.data.resolve_data_config({}, pretrained_cfg=config))  # type: ignore[attr-defined]
    found = pixels_of_timm(FOLDER, {"pretrained_cfg": config}, {}, Stated())
    check_same(found, transform(Image.fromarray(TILE)))


@pytest.mark.parametrize("processor", ["BitImageProcessorPil", "ViTImageProcessorPil", "CLIPImageProcessorPil"])
@pytest.mark.parametrize(
    "said",
    [
        {"size": {"height": 64, "width": 64}, "do_center_crop": False, "resample": 2},
        {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}, "do_center_crop": True},
        {"size": {"shortest_edge": 64}, "do_center_crop": False, "resample": 1, "do_normalize": False},
        {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 64, "width": 64}},
    ],
)
def test_what_a_preprocessor_says_is_what_transformers_do(processor: str, said: dict[str, Any]) -> None:
    import transformers

    kind = getattr(transformers, processor, None) or getattr(transformers, processor.removesuffix("Pil"))
    said = {"image_mean": MEAN, "image_std": STD, **said}
    if processor.startswith("ViT"):
        said = {name: value for name, value in said.items() if "crop" not in name} | {"do_resize": True}
        said["size"] = {"height": 64, "width": 64}
    wanted = kind(**said)(images=Image.fromarray(TILE), return_tensors="pt")["pixel_values"][0]
    named = {"image_processor_type": processor.removesuffix("Pil"), **said}
    found = pixels_of_transformers(FOLDER, named, 64, False, Stated())
    if not said.get("do_resize", True):  # tiles are then of the size that is cut from
        found = FolderPixels(found.preprocessing, len(TILE))
    check_same(found, wanted)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pixels as they are": ({"do_rescale": False}, r"does not divide pixels by 255 \(do_rescale false\)"),
    "another scale": ({"rescale_factor": 1 / 127.5}, r"does not divide pixels by 255 \(rescale_factor 0\.0078"),
    "numbers of 0..255": (
        {"image_mean": [123.0, 116.0, 103.0], "image_std": [58.0, 57.0, 57.0]},
        "states mean 123 116 103 and std 58 57 57, and pixels are 0..1",
    ),
    "a std of nothing": ({"image_std": [0, 1, 1]}, "which are of nothing"),
    "no numbers": ({"image_mean": None}, "does not say how its network's pixels were normalised"),
    "two numbers": ({"image_mean": [0.5, 0.5]}, "are not three numbers"),
    "a resize of another name": ({"resample": 0}, "images are resized by 'nearest', which is not done here"),
    "no name of a resize": ({"resample": [3]}, r"images are resized by \[3\], which is not done here"),
    "no square": ({"size": {"height": 64, "width": 72}}, "is no square"),
    "no size": ({"size": None}, "names no size"),
    "no size to cut out": ({"do_center_crop": True}, "names no crop_size"),
    "a larger centre": ({"do_center_crop": True, "crop_size": 72}, "resizes to 64 px and cuts out 72 px"),
    "a word as size": ({"size": "64"}, "'64' is no side in pixels"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_computed_otherwise_is_refused(what: str) -> None:
    said, message = REFUSED[what]
    whole = {"image_mean": MEAN, "image_std": STD, "size": 64, **said}
    with pytest.raises(ExportError, match=message) as refused:
        pixels_of_transformers(FOLDER, whole, 64, False, Stated())
    assert refused.value.hint


def test_what_the_user_states_goes_before_what_is_said() -> None:
    said = {"do_rescale": False, "resample": 0, "size": {"height": 64, "width": 72}}
    stated = Stated(BOTH.mean, BOTH.std, "lanczos", 96, 80, 64)
    found = pixels_of_transformers(FOLDER, said, 64, False, stated)
    assert (found.preprocessing.mean, found.preprocessing.interpolation) == (BOTH.mean, "lanczos")
    nothing = pixels_of_transformers(FOLDER, None, 70, False, BOTH)
    assert (nothing.preprocessing.image_px, nothing.resize_px) == (70, 70), "the side that the model states"
    timm_says = pixels_of_timm(FOLDER, {"architecture": "test_vit"}, {"img_size": 128}, BOTH)
    assert (timm_says.preprocessing.image_px, timm_says.resize_px) == (128, 128)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"input_size": [3, 64, 72]}, "not square"),
        ({"input_size": [1, 64, 64]}, "not of R, G and B"),
        ({"input_size": "64"}, "not square"),
        ({"crop_pct": 1.2}, r"crop_pct 1\.2 is not computed here"),
        ({"interpolation": "random"}, "images are resized by 'random'"),
    ],
)
def test_what_timm_says_and_is_not_done_here_is_refused(said: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportUsageError, match=message):
        pixels_of_timm(FOLDER, {"mean": MEAN, "std": STD, "input_size": [3, 64, 64], **said}, {}, Stated())
