"""The catalogue: each entry, built small with random weights in the published layout, is what its sources compute."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import SwiGLUPacked
from torch import nn
from torchvision.transforms import v2

from mtdp_export.catalogue import OTHER, PUBLISHED, Recipe, by_digest, catalogue, parse
from mtdp_export.conv_stem import ConvStem
from mtdp_export.encoder import build
from mtdp_export.encoder_docs import as_markdown
from mtdp_export.encoder_source import Asked, open_recipe
from mtdp_export.fold import constant_nodes
from mtdp_export.golden import calibration_tiles
from mtdp_export.graph import Deployed, export_graph
from mtdp_export.onnx_source import Declared, open_onnx, original_outputs
from mtdp_export.pixels import Stated
from mtdp_runtime.bundle.tolerance import cosines
from support import Run

ROOT = Path(__file__).resolve().parents[2]
READ_PX = 256
BUILT = [key for key, recipe in catalogue().items() if recipe.library in ("timm", "transformers")]
HOW = {"bilinear": v2.InterpolationMode.BILINEAR, "bicubic": v2.InterpolationMode.BICUBIC}
CLASSES = {"swiglu_packed": SwiGLUPacked, "silu": nn.SiLU, "conv_stem": ConvStem}


def small(recipe: Recipe) -> dict[str, Any]:
    """Arguments that make an entry cheap, and leave its kind as it is."""
    if recipe.arch.startswith("vit"):
        return {"depth": 2, "embed_dim": 96, "num_heads": 6}
    if recipe.arch.startswith("swin"):
        return {"depths": (2, 1, 1, 1), "embed_dim": 48, "num_heads": (1, 2, 4, 8)}
    if recipe.arch == "resnet50":
        return {"layers": (1, 1, 1, 1)}
    sizes: dict[str, Any] = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6}
    if recipe.arch != "Dinov2Model":
        sizes["intermediate_size"] = 200
    return {**sizes, **({"projection_dim": 40} if recipe.feature == "projection" else {})}


def original(recipe: Recipe) -> nn.Module:
    """The network as its sources build it, small, with weights in which everything matters."""
    arguments = {**recipe.arguments, **small(recipe)}
    torch.manual_seed(sum(map(ord, recipe.key)))
    if recipe.library == "transformers":
        import transformers

        kind = getattr(transformers, recipe.arch)
        network: nn.Module = kind(kind.config_class(**arguments))
    else:
        given = {k: CLASSES[v] if k.endswith("_layer") else v for k, v in arguments.items()}
        network = timm.create_model(recipe.arch, num_classes=0, **given)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith(("gamma", "lambda1")):
                value.uniform_(0.3, 1.2)
            elif name.endswith("running_var"):
                value.uniform_(0.5, 2.0)
            elif value.is_floating_point():
                value.add_(0.04 * torch.randn_like(value))
    return network.eval()


def published(recipe: Recipe, network: nn.Module, folder: Path) -> Path:
    """The weights as they are published, with what lies beside them there."""
    state = {name: value.clone() for name, value in network.state_dict().items()}
    if recipe.library == "transformers":  # it writes names that are not those in memory
        network.save_pretrained(folder / "saved")  # type: ignore[operator]
        state = load_file(folder / "saved" / "model.safetensors")
        assert not any(".q_proj." in name for name in state) or recipe.key == "plip"
    path = folder / recipe.weights.file
    wrapped: dict[str, Any] = dict(state)
    if recipe.key == "ctranspath":  # the authors' own; the mirror's is bare
        path = folder / "ctranspath.pth"
        wrapped = {"model": {**state, "head.weight": torch.zeros(2, 8)}}
    elif recipe.key == "gpfm":  # as in the release on GitHub; the other one is bare
        chunked = {re.sub(r"blocks\.(\d+)", r"blocks.0.\1", name): value for name, value in state.items()}
        head = {"dino_head.mlp.0.weight": torch.zeros(3, 3)}
        wrapped = {"teacher": {f"backbone.{name}": value for name, value in chunked.items()} | head}
    elif recipe.key == "sp22m":
        wrapped = {f"encoder.{name}": value for name, value in state.items()}
    elif recipe.key == "openmidnight":
        wrapped = in_dinov2s_names(state)
    elif recipe.key == "plip":
        text = {"text_model.embeddings.token_embedding.weight": torch.zeros(9, 4), "logit_scale": torch.ones(())}
        wrapped = {**state, **text}
    if path.suffix == ".safetensors":
        save_file(wrapped, path)
    else:
        torch.save(wrapped, path)
    return path


def in_dinov2s_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As torch.hub's dinov2_vitg14_reg has it: one table for the class token and the patches."""
    names = {"reg_token": "register_tokens"}
    renamed = {}
    for name, value in state.items():
        plain = name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        renamed[names.get(plain, plain)] = value
    first = torch.full((1, 1, state["cls_token"].shape[-1]), 0.25)
    renamed["pos_embed"] = torch.cat([first, state["pos_embed"]], dim=1)
    renamed["cls_token"] = state["cls_token"] - first
    renamed["mask_token"] = torch.zeros(1, state["cls_token"].shape[-1])
    return renamed


def by_sources(recipe: Recipe, network: Any, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The oracle: the card's transform on PIL images, and the feature as the card takes it."""
    px, numbers = recipe.preprocessing.image_px, recipe.preprocessing
    transform = v2.Compose(
        [
            v2.Resize(recipe.resize_px, interpolation=HOW[numbers.interpolation]),
            v2.CenterCrop(px),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(numbers.mean, numbers.std),
        ]
    )
    x = torch.stack([transform(Image.fromarray(tile)) for tile in tiles])
    assert x.shape[-1] == px
    with torch.no_grad():
        if recipe.feature == "projection":
            return network(pixel_values=x).image_embeds.numpy()
        if recipe.feature == "stage3":
            maps = timm.create_model("resnet50", features_only=True, out_indices=[3], layers=(1, 1, 1, 1)).eval()
            maps.load_state_dict(network.state_dict(), strict=False)
            return maps(x)[0].mean((2, 3)).numpy()
        if recipe.feature == "pooled":
            return network(x).numpy()
        tokens = (
            network(pixel_values=x).last_hidden_state
            if recipe.library == "transformers"
            else network.forward_features(x)
        )
        cls, patches = (
            tokens[:, 0],
            tokens[:, 1 + int(recipe.arguments.get("reg_tokens", 4 if "reg4" in recipe.arch else 0)) :],
        )
        assert patches.shape[1] == (px // patch_px(recipe)) ** 2
        return (torch.cat([cls, patches.mean(1)], dim=-1) if recipe.feature == "cls+mean" else cls).numpy()


def patch_px(recipe: Recipe) -> int:
    stated = recipe.arguments.get("patch_size")
    return int(stated or recipe.arch.split("patch")[1].split("_")[0])


@pytest.fixture(scope="module")
def tiles(slides_dir: Path) -> NDArray[np.uint8]:
    """Two tiles of tissue, as TRIDENT reads them."""
    return calibration_tiles(slides_dir / "CMU-1-Small-Region.svs", READ_PX, 0.5)[[3, 9]]


@pytest.mark.parametrize("key", BUILT)
def test_an_entry_computes_what_its_sources_do(key: str, tiles: NDArray[np.uint8], tmp_path: Path) -> None:
    recipe = catalogue()[key]
    network = original(recipe)
    path = published(recipe, network, tmp_path)
    opened = open_recipe(recipe, str(path), Stated(tile_px=READ_PX), Asked(arguments=small(recipe)))
    assert (opened.encoder, opened.pixels.tile_px, opened.mpp) == (key, READ_PX, recipe.mpp[0])
    graph = export_graph(Deployed(opened.network, opened.pixels).eval(), {})
    assert not constant_nodes(graph)
    assert "Resize" not in {node.op_type for node in graph.graph.node}
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    got, wanted = session.run(["features"], {"tiles": tiles})[0], by_sources(recipe, network, tiles)
    assert got.shape == wanted.shape
    assert cosines(got, wanted).min() >= 0.999999
    assert cosines(wanted[:1], wanted[1:])[0] < 0.9999, "the tiles are too alike for this to show anything"


@pytest.mark.parametrize("key", BUILT)
def test_at_full_size_it_has_the_published_number_of_parameters(key: str) -> None:
    recipe = catalogue()[key]
    network = build(recipe.library, recipe.arch, recipe.arguments, recipe.feature).trunk
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert millions == pytest.approx(recipe.parameters_m, rel=0.006)
    width = getattr(network, "num_features", None) or network.config.hidden_size  # type: ignore[union-attr]
    factor = {"cls+mean": 2, "stage3": 0.5}.get(recipe.feature, 1)
    expected = 512 if recipe.feature == "projection" else factor * width  # type: ignore[operator]
    assert recipe.features_dim == expected


class TestTheCatalogue:
    def test_names_every_encoder_that_is_promised(self) -> None:
        promised = [
            "uni",
            "uni2-h",
            "virchow",
            "virchow2",
            "h-optimus-0",
            "h-optimus-1",
            "h0-mini",
            "prov-gigapath",
            "gpfm",
            "openmidnight",
            "midnight-12k",
            "phikon",
            "phikon-v2",
            "hibou-b",
            "hibou-l",
            "kaiko-vits16",
            "kaiko-vits8",
            "kaiko-vitb16",
            "kaiko-vitb8",
            "kaiko-vitl14",
            "lunit-vits16",
            "lunit-vits8",
            "lunit-rn50-bt",
            "lunit-rn50-swav",
            "lunit-rn50-mocov2",
            "retccl",
            "ctranspath",
            "mstar",
            "pathorchestra",
            "conch",
            "conch-v1.5",
            "musk",
            "plip",
            "quiltnet-b-32",
            "resnet50-trunc",
            "mtdp-resnet50",
            "mtdp-densenet121",
        ]
        assert set(promised) <= set(catalogue())

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ('feature = "cls"', 'feature = "first"', "feature first"),
            ('mlp_layer = "swiglu_packed"', 'mlp_layer = "os.system"', "no class is called os.system"),
            ('statistics = "half"', 'statistics = "halves"', "KeyError"),
            ("features_dim", "feature_dim", "features_dim"),
            ('title = "UNI"', 'title = "UNI"\nnote = "x"', "unknown keys: note"),
            ('library = "timm"', 'library = "pickle"', "library pickle"),
            ("mpp = [0.5]", "mpp = [0.0]", "mpp"),
        ],
    )
    def test_with_a_mistake_is_not_read(self, old: str, new: str, message: str) -> None:
        text = (ROOT / "export" / "mtdp_export" / "encoders.toml").read_text(encoding="utf-8")
        assert old in text
        with pytest.raises(ValueError, match=re.escape(message)):
            parse(text.replace(old, new))

    def test_is_what_the_docs_show(self) -> None:
        """After a change: python -m mtdp_export.encoder_docs"""
        text = (ROOT / "docs" / "encoders.md").read_text(encoding="utf-8")
        assert text == as_markdown(list(catalogue().values()))

    def test_the_lines_that_make_an_onnx_file_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (code,) = re.findall(r"```python\n(.*?)```", as_markdown([]), re.DOTALL)
        monkeypatch.chdir(tmp_path)
        model = nn.Sequential(nn.Conv2d(3, 5, 32, 32), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten())
        exec(code, {"model": model})
        line = catalogue()["conch-v1.5"].line
        assert line.endswith("--mpp 0.5 --tile-px 512 --resize 448 --interpolation bilinear --out B")
        source = open_onnx(Path("FILE.onnx"), Declared((0.5,) * 3, (0.5,) * 3, tile_px=512, resize_px=448))
        assert (source.pixels.tile_px, source.pixels.preprocessing.image_px) == (512, 448)
        assert original_outputs(source, np.zeros((3, 512, 512, 3), np.uint8))["features"].shape == (3, 5)

    def test_every_digest_is_one_encoders(self) -> None:
        digests = [recipe.weights.sha256 for recipe in catalogue().values() if recipe.weights.sha256]
        assert len(set(digests)) == len(digests) > 25
        for recipe in catalogue().values():
            if recipe.weights.sha256:
                assert by_digest(recipe.weights.sha256) == recipe
                assert recipe.weights.compared(recipe.weights.sha256) == PUBLISHED
                assert recipe.weights.compared("0" * 64) == OTHER


class TestByName:
    def test_the_list(self, run: Run) -> None:
        code, out, _ = run("--list-encoders")
        assert code == 0
        assert re.search(r"^virchow2 +2560 +224 px +0\.5 0\.25 1 2 +cls\+mean +no +yes +timm$", out, re.MULTILINE)
        code, out, _ = run("--list-encoders", "--json")
        listed = {entry["key"]: entry for entry in json.loads(out)}
        assert listed["uni"]["line"] == "mtdp-export uni --weights pytorch_model.bin --out B"
        assert listed["uni"]["licence"]["commercial"] == "no"
        assert run("--list-encoders", "--out", "b")[0] == 2

    @pytest.mark.parametrize(
        ("arguments", "said", "hint"),
        [
            (("uni3", "--weights", "x"), "uni3: neither a run", "did you mean uni"),
            (("musk", "--weights", "x"), "musk: MUSK needs its authors' own code", "torch.onnx.export"),
            (("UNI",), "uni: UNI needs its weights", "pytorch_model.bin from MahmoodLab/UNI"),
            (("uni", "--weights", "nowhere.bin"), "nowhere.bin", "path"),
            (("uni", "--weights", "random", "--arch-arg", "depth"), "--arch-arg depth: not NAME=VALUE", ""),
            (("resnet18", "--weights", "random", "--feature", "cls"), "--feature and --arch-arg go with timm:NAME", ""),
            (
                ("timm:test_vit", "--weights", "random", "--feature", "stage2"),
                "--feature stage2: test_vit has no such",
                "one of cls, mean, cls+mean, pooled",
            ),
            (
                ("timm:test_vit", "--weights", "random", "--arch-arg", "mlp_layer=evil"),
                "--arch-arg mlp_layer=evil: no class of that name",
                "swiglu_packed",
            ),
            (
                ("timm:test_vit", "--weights", "random", "--arch-arg", "wings=2"),
                "test_vit cannot be built with these arguments",
                "--arch-arg",
            ),
            (
                ("timm:test_vit", "--weights", "random", "--feature", "cls", "--resize", "100"),
                "test_vit takes no images of 100 px: 100 is no multiple of its patch of 16 px",
                "--resize 160",
            ),
            (
                ("timm:test_vit", "--weights", "random", "--resize", "176", "--arch-arg", "dynamic_img_size=false"),
                "test_vit takes no images of 176 px: Input height (176) doesn't match model (160)",
                "--arch-arg img_size=176, which resamples its table of positions, or use its own side, 160 px",
            ),
        ],
    )
    def test_what_cannot_be_is_said(
        self, run: Run, tmp_path: Path, arguments: tuple[object, ...], said: str, hint: str
    ) -> None:
        code, _, err = run(*arguments, "--out", tmp_path / "b")
        lines = err.splitlines()
        assert code == 2, err
        assert said in lines[0]
        assert lines[1].startswith("hint: ")
        assert hint in lines[1]
        assert not (tmp_path / "b").exists()
