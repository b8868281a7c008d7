"""Models of timm: their own preprocessing goes with them, and a side that they cannot take is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mtdp.backbones import build_backbone, native_preprocessing
from mtdp.checkpoint import load_checkpoint
from mtdp.errors import UsageError, WeightsError
from mtdp.finetune import FinetuneConfig, finetune_best
from mtdp.images import load_image
from mtdp.pretrain import PretrainConfig, pretrain
from mtdp.tasks import load_pool
from mtdp.transfer import load_extractor
from mtdp.weights import load_backbone_weights

timm = pytest.importorskip("timm")
checkpoint_filter_fn = pytest.importorskip("timm.models.vision_transformer").checkpoint_filter_fn
VIT = "timm:test_vit"  # timm's own network for tests: 64 features, 160 px
FIXED_VIT = "timm:vit_tiny_patch16_224"


def test_its_preprocessing_is_what_timm_states() -> None:
    vit = native_preprocessing(build_backbone(VIT))
    assert (vit.image_px, vit.mean, vit.std, vit.interpolation) == (160, (0.5,) * 3, (0.5,) * 3, "bicubic")
    assert native_preprocessing(build_backbone("resnet18"), 96).image_px == 96
    extractor = load_extractor("random", VIT)
    assert extractor.preprocessing == vit


@pytest.mark.parametrize(
    "name", ["test_vit", "vit_tiny_patch16_224", "test_resnet", "test_efficientnet", "mobilenetv3_small_050"]
)
def test_features_are_timms_own(name: str) -> None:
    backbone = build_backbone(f"timm:{name}").eval()
    reference = timm.create_model(name, num_classes=0).eval()
    reference.load_state_dict(backbone.trunk.state_dict())
    side = native_preprocessing(backbone).image_px
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), reference(x))
        assert backbone(x).shape == (2, backbone.features_dim)


def test_a_vision_transformer_takes_every_side_that_its_patches_divide() -> None:
    backbone = build_backbone(FIXED_VIT).eval()
    assert native_preprocessing(backbone, 96).image_px == 96
    with pytest.raises(UsageError, match=r"timm:vit_tiny_patch16_224 takes no images of 100 px: .*16") as caught:
        native_preprocessing(backbone, 100)
    assert caught.value.hint == "use its own side, 224 px"
    assert native_preprocessing(build_backbone("timm:test_resnet"), 100).image_px == 100
    fitted = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=96).eval()
    state = checkpoint_filter_fn(backbone.trunk.state_dict(), fitted)  # as timm loads weights of another side
    fitted.load_state_dict(state)
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), fitted(x))


def test_a_timm_weights_file_with_its_classifier_loads(tmp_path: Path) -> None:
    trained = timm.create_model("test_vit", num_classes=7)
    torch.save(trained.state_dict(), tmp_path / "vit.pth")
    backbone = build_backbone(VIT)
    load_backbone_weights(backbone, VIT, str(tmp_path / "vit.pth"))
    wanted = {name: value for name, value in trained.state_dict().items() if not name.startswith("head.")}
    torch.testing.assert_close(dict(backbone.trunk.state_dict()), wanted)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(WeightsError, match="does not fit timm:test_vit"):
        load_backbone_weights(backbone, VIT, str(tmp_path / "resnet.pth"))


def test_images_are_resized_as_the_model_wants_it(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for name in ("bilinear", "bicubic", "lanczos"):
        wanted = Image.fromarray(pixels).resize((32, 32), Image.Resampling[name.upper()])
        np.testing.assert_array_equal(load_image(tmp_path / "a.png", 32, name), wanted)


def test_it_trains_and_its_checkpoint_keeps_its_preprocessing(pool_file: Path, tmp_path: Path) -> None:
    config = PretrainConfig(arch=VIT, init="random", iterations=2, warmup=1, batch_size=2, image_px=160)
    pretrain(load_pool(pool_file), config, tmp_path / "run", quiet=True)
    net, info = load_checkpoint(tmp_path / "run")
    assert info.preprocessing == native_preprocessing(net.backbone)
    tuned = FinetuneConfig(VIT, str(tmp_path / "run"), epochs=1, batch_size=4, image_px=160, precision="fp32")
    task = load_pool(pool_file)[0]
    finetune_best(task, tuned, tmp_path / "tuned", (1e-4,), quiet=True)
    _, info = load_checkpoint(tmp_path / "tuned")
    assert info.preprocessing == native_preprocessing(net.backbone), "its statistics and bicubic resizing"
    wrong = PretrainConfig(arch=FIXED_VIT, init="random", iterations=2, warmup=1, batch_size=2, image_px=100)
    with pytest.raises(UsageError, match="takes no images of 100 px"):
        pretrain(load_pool(pool_file), wrong, tmp_path / "other", quiet=True)
