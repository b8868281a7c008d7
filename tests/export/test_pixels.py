"""From the tile to the network's input: as torchvision does it, by numbers that somebody stands for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import resnet18
from torchvision.transforms import v2

from mtdp.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from mtdp_export.errors import ExportUsageError
from mtdp_export.golden import synthetic_tiles
from mtdp_export.onnx_source import Declared, open_onnx
from mtdp_export.pixels import Pixels, Prepared, Stated, arranged, resize_matrix
from mtdp_export.source import open_source
from mtdp_export.typed import KERNELS, kernel_names, to_low_type
from mtdp_export.write import ExportSettings, write_bundle
from mtdp_runtime.bundle import load_bundle
from mtdp_runtime.bundle.golden import load_golden
from mtdp_runtime.bundle.tolerance import cosines
from support import Run

MEAN, STD = (0.7, 0.5, 0.6), (0.2, 0.3, 0.25)
HOW = {
    "bilinear": v2.InterpolationMode.BILINEAR,
    "bicubic": v2.InterpolationMode.BICUBIC,
    "lanczos": v2.InterpolationMode.LANCZOS,
}


def by_torchvision(tiles: NDArray[np.uint8], resize: int, crop: int, how: str) -> torch.Tensor:
    """The oracle: what an encoder's card does to a PIL image, float32[N, 3, crop, crop]."""
    transform = v2.Compose(
        [
            v2.Resize(resize, interpolation=HOW[how]),
            v2.CenterCrop(crop),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return torch.stack([transform(Image.fromarray(tile)) for tile in tiles])


class TestResize:
    @settings(deadline=None, max_examples=40)
    @given(
        st.integers(32, 150), st.integers(32, 150), st.integers(0, 40), st.sampled_from(sorted(HOW)), st.integers(0, 99)
    )
    def test_it_is_torchvisions(self, tile_px: int, resize_px: int, cut: int, how: str, seed: int) -> None:
        crop_px = max(32, resize_px - cut)
        tiles = np.random.default_rng(seed).integers(0, 256, (2, tile_px, tile_px, 3), np.uint8)
        pixels = Pixels(Preprocessing(crop_px, MEAN, STD, how), tile_px, resize_px, "")
        got, wanted = Prepared(pixels)(torch.from_numpy(tiles)), by_torchvision(tiles, resize_px, crop_px, how)
        levels = (got - wanted).abs() * torch.tensor(STD).view(1, 3, 1, 1) * 255
        assert got.shape == wanted.shape
        # Sums of float32: a value that is all but halfway between two levels may fall to the other side, in each pass.
        # Most are at a ratio of 2 to 3, whose weights are sixths: one in seventeen.
        assert levels.max() < 2.01
        assert levels.mean() < 0.1

    def test_halves_are_rounded_up(self) -> None:
        tiles = np.random.default_rng(0).integers(0, 256, (4, 128, 128, 3), np.uint8)
        pixels = Pixels(Preprocessing(64, MEAN, STD, "bilinear"), 128, 64, "")
        got = Prepared(pixels)(torch.from_numpy(tiles))
        torch.testing.assert_close(got, by_torchvision(tiles, 64, 64, "bilinear"), atol=1e-5, rtol=0)

    @given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(sorted(HOW)))
    def test_a_plain_image_stays_as_it_is(self, from_px: int, to_px: int, how: str) -> None:
        np.testing.assert_allclose(resize_matrix(from_px, to_px, how).sum(axis=1), 1, atol=1e-4)

    def test_its_products_are_no_kernels_of_a_typed_graph(self, tmp_path: Path) -> None:
        stated = Stated(resize_px=48, crop_px=40)
        bundle, _ = write_bundle(
            open_source("resnet18", "random", 64, True, stated=stated), tmp_path / "b", ExportSettings("b", 0.5)
        )
        model = onnx.load(bundle.path / "model.fp32.onnx")
        products = [node for node in model.graph.node if node.op_type == "MatMul"]
        assert len(products) == 2
        assert not {node.name for node in products} & set(kernel_names(model))
        assert len(kernel_names(model)) == sum(node.op_type in KERNELS for node in model.graph.node) - 2
        low = {tensor.name for tensor in to_low_type(model, "bf16").graph.initializer if tensor.data_type != 1}
        assert not any("pixels" in name for name in low)


class TestWhoStandsForTheNumbers:
    @pytest.fixture
    def weights(self, tmp_path: Path) -> Path:
        torch.manual_seed(5)
        save_file(resnet18().state_dict(), tmp_path / "own.safetensors")
        return tmp_path / "own.safetensors"

    @pytest.mark.parametrize(
        "options", [(), ("--mean", *MEAN), ("--std", *STD)], ids=["nothing", "mean alone", "std alone"]
    )
    @pytest.mark.parametrize("arch", ["resnet18", "timm:test_resnet"])
    def test_a_file_of_weights_alone_is_refused(
        self, run: Run, weights: Path, tmp_path: Path, arch: str, options: tuple[object, ...]
    ) -> None:
        code, _, err = run(arch, "--weights", weights, *options, "--out", tmp_path / "b")
        assert code == 2
        missing = [part for part in ("--mean", "--std") if part not in options]
        assert f"{weights}: {' and '.join(missing)} must be said" in err.splitlines()[0]
        assert not (tmp_path / "b").exists()

    def test_what_is_stated_is_what_is_computed(self, run: Run, weights: Path, tmp_path: Path) -> None:
        options = ("--mean", *MEAN, "--std", *STD, "--tile-px", 80, "--resize", 72, "--crop", 64)
        code, out, err = run(
            "resnet18", "--weights", weights, *options, "--interpolation", "bicubic", "--out", tmp_path / "b"
        )
        assert (code, "pass" in out) == (0, True), err
        manifest = load_bundle(tmp_path / "b").manifest
        assert (manifest.tile_px, manifest.resize_px, manifest.input_px) == (80, 72, 64)
        assert (manifest.mean, manifest.std, manifest.interpolation) == (MEAN, STD, "bicubic")
        assert manifest.preprocessing_source == "mean, std and interpolation stated by who exported the bundle"
        tiles, golden = load_golden(tmp_path / "b" / "golden.npz")
        assert tiles.shape[1:] == (80, 80, 3)
        torch.manual_seed(5)
        network = resnet18().eval()
        network.fc = torch.nn.Identity()
        with torch.no_grad():
            wanted = network(by_torchvision(tiles, 72, 64, "bicubic")).numpy()
        assert cosines(golden["features"], wanted).min() >= 0.999999
        card = (tmp_path / "b" / "card.md").read_text(encoding="utf-8")
        assert "resized to 72 px, cut to its centre of 64 px" in card
        assert "stated by who exported the bundle" in card

    @pytest.mark.parametrize(
        ("arch", "weights", "said"),
        [
            ("resnet18", "random", "torchvision's default for resnet18"),
            ("timm:test_vit", "random", "timm's default for test_vit"),
        ],
    )
    def test_a_librarys_own_are_called_so(self, arch: str, weights: str, said: str) -> None:
        assert open_source(arch, weights, None, True).pixels.numbers_from == said

    def test_one_that_is_stated_and_two_that_are_not(self) -> None:
        pixels = arranged(Stated(interpolation="lanczos"), Preprocessing(64), "the training run's own")
        assert pixels.preprocessing == Preprocessing(64, IMAGENET_MEAN, IMAGENET_STD, "lanczos")
        assert pixels.numbers_from == (
            "interpolation stated by who exported the bundle; mean and std: the training run's own"
        )

    def test_bundles_of_before_say_nothing(self, resnet18_bundle: Path) -> None:
        document = json.loads((resnet18_bundle / "bundle.json").read_text())
        assert document["mtdp"]["preprocessing_source"] == "torchvision's default for resnet18"
        assert "resize_px" not in document["mtdp"]
        del document["mtdp"]["preprocessing_source"]
        manifest = type(load_bundle(resnet18_bundle).manifest).from_json(document)
        assert (manifest.preprocessing_source, manifest.resize_px, manifest.input_px) == ("", None, None)


class TestNumbersThatCannotBe:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--mean", 123.7, 116.3, 103.5), "--mean 123.7 116.3 103.5: pixels are 0..1, and so is their mean"),
            (("--std", 58.4, 57.1, 57.4), "--std 58.4 57.1 57.4: pixels are 0..1, and so is their std"),
            (("--std", 0, 1, 1), "--std 0 1 1: not the std of anything"),
            (("--mean", -0.1, 0, 0), "--mean -0.1 0 0: pixels are 0..1"),
            (("--mean", "nan", 0, 0), "--mean nan 0 0: not the mean of anything"),
            (("--interpolation", "nearest"), "--interpolation nearest: unknown"),
            (("--resize", 0), "--resize 0: no side of an image"),
            (("--resize", 64, "--crop", 65), "--crop 65: the tile has 64 px by then"),
        ],
    )
    def test_are_refused(self, run: Run, tmp_path: Path, options: tuple[object, ...], message: str) -> None:
        code, _, err = run("resnet18", "--weights", "random", *options, "--out", tmp_path / "b")
        assert (code, err.splitlines()[0].startswith(f"error: {message}")) == (2, True), err
        assert err.splitlines()[1].startswith("hint: ")

    def test_on_the_other_scale(self) -> None:
        with pytest.raises(ExportUsageError, match=r"the mean is on the scale 0\.\.255"):
            Stated(mean=(0.5, 0.5, 0.5), std=(60, 60, 60)).check(input_range=255)
        with pytest.raises(ExportUsageError, match=r"the std is on the scale 0\.\.255"):
            Stated(mean=(0, 0, 0), std=(0.2, 0.2, 0.2)).check(input_range=255)
        Stated(mean=(120, 110, 100), std=(60, 60, 60)).check(input_range=255)
        Stated(mean=(0, 0, 0), std=(1, 1, 1)).check(input_range=255)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(("tile_px", "resize_px"), [(80, 64), (64, 64), (48, 64)], ids=["smaller", "cut", "larger"])
def test_an_onnx_file_is_given_what_its_declaration_says(
    tmp_path: Path, layout: str, tile_px: int, resize_px: int
) -> None:
    """The reference takes Pillow's pixels, the graph its own."""
    torch.manual_seed(1)

    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 24, 5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            planes = x if layout == "nchw" else x.permute(0, 3, 1, 2)
            return torch.relu(self.conv(planes)).mean((2, 3))

    shape = (2, 3, 56, 56) if layout == "nchw" else (2, 56, 56, 3)
    network = Own().eval()
    torch.onnx.export(
        network, (torch.zeros(shape),), tmp_path / "own.onnx", dynamo=True, dynamic_shapes=({0: "n"},), verbose=False
    )
    declared = Declared(
        MEAN, STD, tile_px=tile_px, interpolation="bicubic", resize_px=resize_px, crop_px=56, output=None
    )
    bundle, _ = write_bundle(open_onnx(tmp_path / "own.onnx", declared), tmp_path / "b", ExportSettings("b", 0.5))
    manifest = bundle.manifest
    sides = (manifest.tile_px, manifest.resize_px or manifest.tile_px, manifest.input_px)
    assert sides == (tile_px, resize_px, 56)
    tiles = synthetic_tiles(tile_px)
    session = onnxruntime.InferenceSession(bundle.path / "model.fp32.onnx", providers=["CPUExecutionProvider"])
    pixels = by_torchvision(tiles, resize_px, 56, "bicubic")
    with torch.no_grad():
        wanted = network(pixels if layout == "nchw" else pixels.permute(0, 2, 3, 1)).numpy()
    assert cosines(session.run(None, {"tiles": tiles})[0], wanted).min() >= 0.999999


def test_an_onnx_file_of_one_size_says_how_larger_tiles_go(tmp_path: Path, resnet18_bundle: Path) -> None:
    with pytest.raises(ExportUsageError, match="takes 64 px only, and would be given 96") as caught:
        open_onnx(resnet18_bundle / "model.fp32.onnx", Declared(tile_px=96))
    assert "add --resize 64" in caught.value.hint
    with pytest.raises(ExportUsageError, match="takes uint8 and prepares it by itself"):
        open_onnx(resnet18_bundle / "model.fp32.onnx", Declared(tile_px=96, resize_px=64))
