"""`mtdp-export --tokens`: the graph gives the tokens of a tile's patches, too, and they are part of the proof."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mtdp_export.card import model_card
from mtdp_export.catalogue import catalogue
from mtdp_export.encoder import Encoder
from mtdp_export.encoder_source import Asked, open_recipe, open_timm
from mtdp_export.errors import ExportUsageError, ParityFailure
from mtdp_export.golden import synthetic_tiles
from mtdp_export.graph import Deployed, export_graph, reference_outputs
from mtdp_export.onnx_source import Declared, open_onnx, original_outputs
from mtdp_export.parity import Comparison, compare_outputs, judged, require, table
from mtdp_export.pixels import Stated
from mtdp_export.rounding import run as run_graph
from mtdp_export.source import Source
from mtdp_export.tokens import GOLDEN_TILES, features_and_tokens, tokens_of
from mtdp_export.write import ExportSettings, write_bundle
from mtdp_runtime.bundle import load_bundle
from mtdp_runtime.bundle.golden import load_golden
from mtdp_runtime.bundle.manifest import Autocast, Tokens
from mtdp_runtime.bundle.tolerance import tokens_cosine
from support import Run

PX, PATCH = 64, 16
HALF = Stated((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), tile_px=PX)
SMALL = {"img_size": PX, "embed_dim": 48, "depth": 2, "num_heads": 3, "reg_tokens": 4}


def source(feature: str = "cls") -> Source:
    opened = open_timm("timm:vit_tiny_patch16_224", "random", HALF, Asked(feature, SMALL))
    return Source(opened.network, opened.arch, opened.pixels, opened.origin, opened.licence, None, opened.feature)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokens") / "vit"
    write_bundle(source(), out, ExportSettings("vit", 0.5, tokens=True, precisions=("fp32", "bf16")))
    return out


def by_torch(network: Deployed, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What timm's own forward_features gives for the patches."""
    with torch.no_grad():
        trunk = network.network.backbone.trunk
        last = trunk.forward_features(network.pixels(torch.from_numpy(tiles)))  # type: ignore[operator]
    return np.asarray(last[:, 5:].numpy())  # behind a class token and four registers


def test_the_graph_gives_torchs_own_patch_tokens(bundle: Path) -> None:
    tiles = synthetic_tiles(PX)
    wanted = by_torch(Deployed(source().network, source().pixels).eval(), tiles)
    got = run_graph(onnx.load(bundle / "model.fp32.onnx"), tiles)["tokens"]
    assert got.shape == wanted.shape == (len(tiles), 16, 48)
    assert tokens_cosine(got, wanted) >= 0.999999


def test_the_manifest_states_them_and_the_golden_tiles_hold_a_few(bundle: Path) -> None:
    manifest = load_bundle(bundle).manifest
    assert manifest.tokens == Tokens(16, 48, (4, 4), "float32")
    stated = json.loads((bundle / "bundle.json").read_text())["mtdp"]["tokens"]
    assert stated == {"count": 16, "dim": 48, "grid": [4, 4], "dtype": "float32"}
    tiles, outputs = load_golden(bundle / "golden.npz")
    assert (outputs["tokens"].dtype, outputs["tokens"].shape) == (np.float32, (GOLDEN_TILES, 16, 48))
    assert tokens_cosine(outputs["tokens"], by_torch(Deployed(source().network, source().pixels), tiles[:4])) > 0.999999


def test_tokens_lie_in_rows_from_the_top_left(bundle: Path) -> None:
    """One patch that is unlike the others, in row 1 and column 2, has the token that is unlike the others."""
    network = source().network.backbone
    trunk = network.trunk
    with torch.no_grad():
        trunk.pos_embed.zero_()  # type: ignore[operator, union-attr]  # all patches are alike then, but for their pixels
        image = torch.zeros(1, 3, PX, PX)
        image[:, :, PATCH : 2 * PATCH, 2 * PATCH : 3 * PATCH] = 1
        tokens = features_and_tokens(network, image)[1][0].reshape(4, 4, -1)
    away = (tokens - tokens[3, 3]).abs().amax(-1)
    assert np.argwhere(away.numpy() > 1e-3).tolist() == [[1, 2]]


@pytest.mark.parametrize("feature", ["cls", "mean", "cls+mean", "pooled"])
def test_the_features_are_those_of_the_network_alone(feature: str) -> None:
    network = source(feature).network.backbone.eval()
    image = torch.rand(2, 3, PX, PX)
    with torch.no_grad():
        features, tokens = features_and_tokens(network, image)
        assert torch.equal(features, network(image))
    assert tokens.shape == (2, 16, 48)


def test_a_bundle_without_them_is_the_same_file_as_ever() -> None:
    plain = Deployed(source().network, source().pixels).eval()
    with_tokens = Deployed(source().network, source().pixels, tokens=True).eval()
    graph, larger = export_graph(plain, {}), export_graph(with_tokens, {})
    assert [output.name for output in graph.graph.output] == ["features"]
    assert [output.name for output in larger.graph.output] == ["features", "tokens"]
    tiles = synthetic_tiles(PX)[:4]
    np.testing.assert_array_equal(run_graph(graph, tiles)["features"], run_graph(larger, tiles)["features"])


class TestEncodersOfTheCatalogue:
    @pytest.mark.parametrize(
        ("key", "small", "grid", "prefix"),
        [
            ("phikon", {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}, 14, 1),
            ("midnight-12k", {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}, 16, 1),
            ("plip", {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "projection_dim": 8}, 7, 1),
            ("virchow2", {"depth": 1, "embed_dim": 48, "num_heads": 4}, 16, 5),
        ],
    )
    def test_give_the_last_hidden_state_of_the_patches(
        self, key: str, small: dict[str, int], grid: int, prefix: int
    ) -> None:
        recipe = catalogue()[key]
        network = open_recipe(replace(recipe, features_dim=0), "random", Stated(), Asked(None, small)).network.backbone
        side = recipe.preprocessing.image_px
        assert tokens_of(network, side) == Tokens(grid**2, 48, (grid, grid))
        assert isinstance(network, Encoder)
        image = torch.rand(1, 3, side, side)
        with torch.no_grad():
            features, tokens = features_and_tokens(network, image)
            assert torch.equal(tokens, network.feature_map(image)[:, prefix:])
            assert torch.equal(features, network(image))

    def test_of_a_window_transformer_the_map_in_rows(self) -> None:
        small = {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 4, 8)}
        network = open_recipe(
            replace(catalogue()["ctranspath"], features_dim=0), "random", Stated(), Asked(None, small)
        ).network.backbone
        assert tokens_of(network, 224) == Tokens(49, 192, (7, 7))
        image = torch.rand(1, 3, 224, 224)
        with torch.no_grad():
            rows = network.feature_map(image)
            assert torch.equal(features_and_tokens(network, image)[1].reshape(rows.shape), rows)


WANTED = {
    "features": np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32),
    "tokens": np.random.default_rng(1).normal(size=(4, 9, 40)).astype(np.float32),
}


class TestTheProof:
    def compared(self, tokens: NDArray[np.float32]) -> Comparison:
        given = {**WANTED, "tokens": np.concatenate([tokens, tokens])}  # the engine ran more tiles than are kept
        return compare_outputs("engine 1", "bf16", given, WANTED)

    def test_is_of_every_variant_on_every_engine_and_of_autocast(self, bundle: Path) -> None:
        manifest = load_bundle(bundle).manifest
        for variant in manifest.variants:
            for parity in (variant.parity, *variant.engines):
                assert parity.tokens_cosine_min is not None
                assert parity.tokens_cosine_min > 0.999
        assert manifest.autocast[0].tokens_cosine_min is not None
        card = model_card(manifest, None, False)
        assert "| fp32, tokens |" in card
        assert "| bf16, tokens |" in card
        assert "| patch tokens (`mtdp-extract --tokens`) | 4 x 4 of 48 |" in card

    def test_refuses_tokens_that_are_turned_stretched_or_not_finite(self) -> None:
        right = WANTED["tokens"]
        assert self.compared(right).passed
        one_tile = right.copy()
        one_tile[2] = np.random.default_rng(2).normal(size=one_tile[2].shape)
        for wrong, said in ((one_tile, "mean cosine of a tile's tokens"), (right * np.float32(1.1), "lengths are off")):
            assert not self.compared(wrong).passed
            with pytest.raises(ParityFailure, match=said) as refusal:
                require(self.compared(wrong))
            assert "Export without --tokens" in refusal.value.hint
        with pytest.raises(ParityFailure, match="tokens is not finite in 1 of 4 tiles"):
            self.compared(np.where(np.arange(4)[:, None, None] == 1, np.float32(np.nan), right))

    def test_follows_autocasts_own_distance_and_has_a_row(self, bundle: Path) -> None:
        far = replace(self.compared(WANTED["tokens"]), length_max_error=0.0)
        far = replace(far, parity=replace(far.parity, tokens_cosine_min=0.9994))
        manifest = load_bundle(bundle).manifest
        strict, lax = (
            replace(manifest, autocast=(Autocast("bf16", 1.0, 1.0, 1.0, cosine),)) for cosine in (0.99999, 0.9995)
        )
        assert not judged(far, strict).passed
        assert judged(far, lax).passed
        rows = table([judged(far, strict)], strict.autocast).splitlines()
        assert [rows[2].split()[0:4], rows[2].split()[-1]] == [["its", "tokens", "bf16", "0.99940000"], "FAIL"]
        assert rows[4].split()[:4] == ["its", "tokens", "bf16", "0.99999000"]

    def test_is_repeated_by_verify(self, bundle: Path, run: Run) -> None:
        code, shown, _ = run("--verify", bundle, "--backend", "onnxruntime")
        assert code == 0
        assert sum("its tokens" in line and line.endswith("pass") for line in shown.splitlines()) >= 1


def tokens_file(folder: Path) -> Path:
    """An ONNX file that gives 16 tokens of 6 for images of 32 px: each patch's mean, times weights."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["map"], strides=[8, 8]),
        helper.make_node("Reshape", ["map", "shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["tokens_"], perm=[0, 2, 1]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 32, 32])],
        [helper.make_tensor_value_info("tokens_", TensorProto.FLOAT, ["n", 16, 6])],
        [
            numpy_helper.from_array(rng.normal(size=(6, 3, 8, 8)).astype(np.float32), "w"),
            numpy_helper.from_array(np.array([0, 6, 16], np.int64), "shape"),
        ],
    )
    path = folder / "tokens.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


class TestAnOnnxFile:
    @pytest.mark.parametrize("pool", ["mean", "cls"])
    def test_that_gives_tokens_keeps_those_of_the_patches(self, tmp_path: Path, pool: str) -> None:
        declared = Declared((0, 0, 0), (1, 1, 1), pool=pool, prefix_tokens=0 if pool == "mean" else 7, tokens=True)
        opened = open_onnx(tokens_file(tmp_path), declared)
        side = 4 if pool == "mean" else 3
        assert opened.tokens == Tokens(side * side, 6, (side, side))
        if pool == "cls":
            return
        bundle, _ = write_bundle(opened, tmp_path / "out", ExportSettings("mine", 0.5, tokens=True))
        assert bundle.manifest.tokens == opened.tokens
        tiles = synthetic_tiles(32)
        wanted = original_outputs(opened, tiles)
        got = run_graph(onnx.load(tmp_path / "out/model.fp32.onnx"), tiles)
        assert tokens_cosine(got["tokens"][:4], wanted["tokens"]) > 0.999999
        np.testing.assert_allclose(got["features"], got["tokens"].mean(axis=1), rtol=1e-4, atol=1e-4)

    def test_that_gives_a_vector_has_none(self, tmp_path: Path, run: Run) -> None:
        code, _, errors = run("--onnx", tokens_file(tmp_path), "--tokens", "--out", tmp_path / "out")
        assert code == 2
        assert errors.startswith("error: --tokens with --onnx: a file that gives one vector for each image has no")
        assert "add --pool" in errors

    def test_whose_tokens_are_no_square_is_refused(self, tmp_path: Path) -> None:
        declared = Declared((0, 0, 0), (1, 1, 1), pool="mean", prefix_tokens=1, tokens=True)
        with pytest.raises(ExportUsageError, match="gives 15 tokens, which are no square of patches"):
            open_onnx(tokens_file(tmp_path), declared)


@pytest.mark.parametrize(("name", "weights"), [("resnet18", "random"), ("timm:resnet10t", "random")])
def test_a_convolutional_network_has_none(name: str, weights: str, tmp_path: Path, run: Run) -> None:
    code, _, errors = run(name, "--weights", weights, "--tokens", "--out", tmp_path / "out")
    assert code == 2
    assert errors.splitlines()[0] == f"error: --tokens: {name} is no transformer: it has no patch tokens"
    assert not (tmp_path / "out").exists()


def test_the_real_dinov2_gives_its_own_tokens(data_dir: Path) -> None:
    weights = data_dir / "weights/dinov2-vits14.safetensors"
    stated = Stated((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), tile_px=56)
    asked = Asked("cls", {"img_size": 56, "dynamic_img_size": True})
    opened = open_timm("timm:vit_small_patch14_dinov2", str(weights), stated, asked)
    model = Deployed(opened.network, opened.pixels, tokens=True).eval()
    tiles = synthetic_tiles(56)[:GOLDEN_TILES]
    got = run_graph(export_graph(model, {}), tiles)
    trunk = opened.network.backbone.trunk
    with torch.no_grad():
        last = trunk.forward_features(model.pixels(torch.from_numpy(tiles)))  # type: ignore[operator]
    assert tokens_cosine(got["tokens"], last[:, 1:].numpy()) >= 0.999999
    assert tokens_cosine(reference_outputs(model, tiles)["tokens"], last[:, 1:].numpy()) >= 0.9999999
