"""Weights as they are handed out: unwrapped where the wrapping is known, refused with a reason where they are not."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from mtdp.errors import WeightsError
from mtdp_export.catalogue import catalogue
from mtdp_export.cli import main
from mtdp_export.encoder_source import Asked, open_folder, open_timm
from mtdp_export.errors import ExportError, ExportUsageError
from mtdp_export.pixels import Stated
from mtdp_export.source import open_source
from mtdp_export.state_dicts import unwrap
from mtdp_export.weights_file import read_state
from mtdp_runtime.bundle import load_bundle

STATED = Stated((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
ARCH = "timm:test_vit"
Wrap = Callable[[dict[str, Any]], dict[str, Any]]


def network(seed: int = 3) -> Any:
    torch.manual_seed(seed)
    model = timm.create_model("test_vit", num_classes=0).eval()
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(0.05 * torch.randn_like(value))
    return model


def under(prefix: str, **more: Any) -> Wrap:
    return lambda state: {**{f"{prefix}{name}": value for name, value in state.items()}, **more}


WRAPPINGS: dict[str, tuple[Wrap, str]] = {
    "as it is": (lambda state: state, ""),
    "with a classifier": (lambda state: {**state, "head.weight": torch.ones(2, 2), "head.bias": torch.ones(2)}, ""),
    "in halves": (lambda state: {name: value.half() for name, value in state.items()}, ""),
    **{
        prefix: (under(prefix), f"prefix {prefix} taken off")
        for prefix in (
            "module.",
            "model.",
            "backbone.",
            "teacher.",
            "encoder.",
            "trunk.",
            "module.backbone.",
            "model.visual.trunk.",
        )
    },
    "a prefix beside heads": (
        under("backbone.", **{"dino_head.last.weight": torch.ones(1), "epoch": 7}),
        "prefix backbone. taken off, 1 other tensors left out",
    ),
    "state_dict": (lambda state: {"state_dict": state, "epoch": 3}, "taken out of {state_dict: ...}"),
    "model": (lambda state: {"model": state, "optimizer": {"state": {}, "step": torch.ones(1)}}, "out of {model: ...}"),
    "teacher and student": (
        lambda state: {
            "student": {name: value + 1 for name, value in state.items()},
            "teacher": under("module.backbone.")(state),
            "args": argparse.Namespace(arch="vit_small", lr=np.float64(0.1)),
        },
        "taken out of {teacher: ...}; prefix module.backbone. taken off",
    ),
    "in doubles": (lambda state: {name: value.double() for name, value in state.items()}, ""),
    "heads of DINOv2": (
        lambda state: {**state, "dino_head.mlp.0.weight": torch.ones(2), "mask_token": torch.ones(1, 64)},
        "1 tensors of heads left out",
    ),
    "a decoder of MAE": (
        lambda state: {"model": {**state, "mask_token": torch.ones(1), "decoder_blocks.0.norm.bias": torch.ones(1)}},
        "tensors of heads left out",
    ),
    "a run of Lightning": (
        lambda state: {
            "state_dict": under("model.")(state),
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
            "pytorch-lightning_version": "2.4",
        },
        "taken out of {state_dict: ...}; prefix model. taken off",
    ),
    "compiled": (under("module._orig_mod."), "torch's wrappers taken off; prefix module. taken off"),
    "wrapped by FSDP within": (
        lambda state: under("backbone._fsdp_wrapped_module.")(
            {name.replace(".attn.", "._checkpoint_wrapped_module.attn."): value for name, value in state.items()}
        ),
        "torch's wrappers taken off; prefix backbone. taken off",
    ),
    "under any key": (lambda state: {"net": state, "scheduler": {"last": 3}}, "taken out of {net: ...}"),
    "one network under two names": (
        lambda state: {**under("model.")(state), **under("net.")(state)},
        "prefix model. taken off",
    ),
    "chunks of blocks": (
        lambda state: {
            name.replace("blocks.", "blocks.0.", 1) if name.startswith("blocks.") else name: value
            for name, value in state.items()
        },
        "chunks of blocks joined",
    ),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_wrapping_that_is_known_comes_off_and_is_named(wrapping: str, tmp_path: Path) -> None:
    model = network()
    wrap, said = WRAPPINGS[wrapping]
    torch.save(wrap(model.state_dict()), tmp_path / "w.pth")
    opened = open_timm(ARCH, str(tmp_path / "w.pth"), STATED, Asked("cls"))
    assert said in opened.origin
    x = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        got, wanted = opened.network.backbone(x), model.forward_features(x)[:, 0]
    torch.testing.assert_close(got, wanted, atol=0.02 if wrapping == "in halves" else 1e-5, rtol=0.01)
    assert {value.dtype for value in opened.network.state_dict().values()} == {torch.float32}


OF_TWO: dict[str, tuple[Callable[[Any, Any], dict[str, Any]], str]] = {
    "a student before its teacher": (
        lambda meant, other: {**under("student.backbone.")(other), **under("teacher.backbone.")(meant)},
        "teacher.backbone.* taken, and not student.backbone.*",
    ),
    "a whole run of DINOv2": (
        lambda meant, other: {
            "model": {
                **under("student.backbone.", **{"student.dino_head.mlp.0.weight": torch.ones(2)})(other),
                **under("teacher.backbone.", **{"dino_loss.center": torch.ones(2)})(meant),
            },
            "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
        },
        "model: teacher.backbone.* taken, and not model: student.backbone.*",
    ),
    "student and teacher": (
        lambda meant, other: {"student": under("module.")(other), "teacher": meant},
        "teacher: ... taken, and not student: module.*",
    ),
    "an average of timm": (
        lambda meant, other: {"state_dict": other, "state_dict_ema": meant},
        "state_dict_ema: ... taken, and not state_dict: ...",
    ),
    "an average of Lightning": (
        lambda meant, other: {"state_dict": {**under("model.")(other), **under("ema_model.module.")(meant)}},
        "ema_model.module.* taken",
    ),
    "a distilled network beside its teacher": (
        lambda meant, other: {
            "teacher": timm.create_model("test_vit2", num_classes=0).state_dict(),
            "student": under("backbone.")(meant),
        },
        "taken out of {student: ...}; prefix backbone. taken off",
    ),
    "MoCo v3": (
        lambda meant, other: {
            "state_dict": {**under("module.momentum_encoder.")(other), **under("module.base_encoder.")(meant)}
        },
        "module.base_encoder.* taken, and not state_dict: module.momentum_encoder.*",
    ),
    "MoCo v2": (
        lambda meant, other: under("encoder_k.", queue=torch.ones(3))(other) | under("encoder_q.")(meant),
        "encoder_q.* taken, and not encoder_k.*",
    ),
}


@pytest.mark.parametrize("wrapping", OF_TWO)
def test_of_two_networks_the_one_is_taken_that_its_authors_evaluate(wrapping: str, tmp_path: Path) -> None:
    meant, other = network(3), network(4)
    wrap, said = OF_TWO[wrapping]
    torch.save(wrap(meant.state_dict(), other.state_dict()), tmp_path / "w.pth")
    opened = open_timm(ARCH, str(tmp_path / "w.pth"), STATED, Asked("cls"))
    assert said in opened.origin
    x = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(opened.network.backbone(x), meant.forward_features(x)[:, 0])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("online_encoder.", "target_encoder."), r"2 networks that fit.*: online_encoder\.\* and target_encoder\.\*"),
        (("encoder", "target_encoder"), r"2 networks that fit.*: encoder: \.\.\. and target_encoder: \.\.\."),
        (("", "model."), r"2 networks that fit.*: \.\.\. and model\.\*"),
    ],
)
def test_of_two_networks_that_nothing_tells_apart_none_is_taken(
    tmp_path: Path, names: tuple[str, str], said: str
) -> None:
    states = [network(seed).state_dict() for seed in (3, 4)]
    both: dict[str, Any] = dict(zip(names, states, strict=True))
    if any("." in name for name in names):
        both = {**under(names[0])(states[0]), **under(names[1])(states[1])}
    torch.save(both, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=said) as caught:
        open_timm(ARCH, str(tmp_path / "w.pth"), STATED, Asked())
    assert "torch.save({name: tensor" in caught.value.hint


@pytest.mark.parametrize("kind", ["safetensors", "pth", "old pth"])
@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_file_is_read_by_what_it_is_whatever_its_name_ends_in(tmp_path: Path, kind: str, name: str) -> None:
    state = network().state_dict()
    if kind == "safetensors":
        save_file(state, tmp_path / name)
    else:
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=kind == "pth")
    assert read_state(tmp_path / name).keys() == state.keys()


def test_an_archive_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(network().state_dict(), tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_state(tmp_path / "w.pth").keys() == network().state_dict().keys()


def test_published_weights_bring_their_licence_whatever_they_are_built_as(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(network().state_dict(), tmp_path / "w.pth")
    digest = catalogue()["uni"].weights.sha256
    monkeypatch.setattr("mtdp_export.encoder_source.file_sha256", lambda path: digest)
    opened = open_timm(ARCH, str(tmp_path / "w.pth"), STATED, Asked("cls"))
    assert opened.published == "the published weights of UNI"
    assert opened.licence.startswith("CC BY-NC-ND 4.0")


def test_positions_of_another_size_are_resampled_as_timm_does_and_patches_are_not(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=0, img_size=256, dynamic_img_size=True).eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    opened = open_timm(ARCH, str(tmp_path / "w.pth"), STATED, Asked("mean"))
    assert "the table of 257 positions resampled to 101, as timm does" in opened.origin
    x = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        wanted = model.forward_features(x)[:, 1:].mean(1)  # it resamples its table as it runs
        torch.testing.assert_close(opened.network.backbone(x), wanted)
    state = timm.create_model("test_vit", num_classes=0, patch_size=8).state_dict()
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"1 of another shape \(patch_embed\.proj\.weight: .*8, 8\], not .*16, 16\]"):
        open_timm(ARCH, str(tmp_path / "w.pth"), STATED, Asked())


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("it ran",))


class TestRefused:
    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a pointer of Git LFS"),
            (b"\xef\xbb\xbf\n<!DOCTYPE html><html><title>Log in</title>", "is a web page, not weights"),
            (b'{"error": "Access to model lab/x is restricted."}', r"is a text, not weights: .*Access to model lab/x"),
            (b"", "is empty"),
            (b"\0" * 100, "cannot be read as weights"),
            (b"PK\x03\x04" + b"\0" * 99, "cannot be read as weights, or is cut"),
        ],
    )
    @pytest.mark.parametrize("name", ["w.safetensors", "pytorch_model.bin"])
    def test_what_a_download_may_have_left(self, tmp_path: Path, content: bytes, said: str, name: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=said) as caught:
            read_state(tmp_path / name)
        assert caught.value.hint

    @pytest.mark.parametrize("kind", ["safetensors", "pth", "old pth"])
    @pytest.mark.parametrize("part", [0.5, 0.01])
    def test_a_file_that_is_cut(self, tmp_path: Path, kind: str, part: float) -> None:
        path = tmp_path / "w.bin"
        if kind == "safetensors":
            save_file(network().state_dict(), path)
        else:
            torch.save(network().state_dict(), path, _use_new_zipfile_serialization=kind == "pth")
        content = path.read_bytes()
        path.write_bytes(content[: int(part * len(content))])
        with pytest.raises(WeightsError, match="cannot be read as weights, or is cut") as caught:
            read_state(path)
        assert "download it again" in caught.value.hint

    def test_a_byte_that_changed_in_torchs_archive(self, tmp_path: Path) -> None:
        """It is mapped into memory, where nothing else would see it."""
        path = tmp_path / "w.pth"
        torch.save(network().state_dict(), path)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=r"is damaged: w/data/\d+ in it is not what its checksum says"):
            read_state(path)

    @pytest.mark.parametrize(
        ("begins", "said"),
        [
            (b"\x1f\x8b\x08", "is compressed by gzip"),
            (b"\x28\xb5\x2f\xfd", "is compressed by zstd"),
            (b"\x89HDF\r\n", "is an HDF5 file"),
            (b"\x08\x08\x12\x07pytorch", "begins like an ONNX file"),
            (b'{"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}', "is the index of weights"),
        ],
    )
    def test_a_file_of_another_kind_is_called_by_its_name(self, tmp_path: Path, begins: bytes, said: str) -> None:
        (tmp_path / "w.bin").write_bytes(begins + (b"" if begins[:1] == b"{" else b"\0" * 99))
        with pytest.raises(WeightsError, match=said) as caught:
            read_state(tmp_path / "w.bin")
        assert caught.value.hint

    def test_an_archive_of_something_else(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "w.npz", a=np.ones(2), b=np.ones(2))
        with pytest.raises(WeightsError, match=r"is an archive of other files: a\.npy, b\.npy$"):
            read_state(tmp_path / "w.npz")

    def test_a_program_of_torchscript_is_not_run(self, tmp_path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has something newer
            torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "w.pt")
        with pytest.raises(WeightsError, match="is a TorchScript archive") as caught:
            read_state(tmp_path / "w.pt")
        assert "torch.jit.load('FILE').state_dict()" in caught.value.hint

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ([torch.ones(2)], "is not a state dict but a list"),
            (
                {"epoch": 3, "args": argparse.Namespace()},
                r"no tensors are in it, but epoch \(int\), args \(Namespace\)",
            ),
            ({"_fsdp_wrapped_module._flat_param": torch.ones(9)}, "part of a sharded training state"),
            ({"blocks": {"0": {"norm1": {"weight": torch.ones(64)}}}}, "does not fit test_vit: .* missing"),
        ],
    )
    def test_what_is_no_state_dict(self, tmp_path: Path, content: Any, said: str) -> None:
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(WeightsError, match=said):
            open_timm(ARCH, str(tmp_path / "w.pth"), STATED, Asked())

    def test_quantised_weights(self, tmp_path: Path) -> None:
        state = {
            name: value.to(torch.int8) if value.dim() == 2 else value for name, value in network().state_dict().items()
        }
        torch.save(state, tmp_path / "w.pth")
        with pytest.raises(WeightsError, match=r"holds int8 numbers in blocks\.0\..*: quantised weights"):
            open_timm(ARCH, str(tmp_path / "w.pth"), STATED, Asked())

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda value: value.to_sparse(), "holds a sparse tensor in norm"),
            (lambda value: value.to("meta"), "holds no values in norm"),
            (lambda value: value * float("nan"), "holds values in norm.* that are no finite numbers"),
            (lambda value: value.to(torch.float8_e5m2), "holds float8_e5m2 numbers in norm.*: quantised weights"),
        ],
    )
    def test_a_tensor_without_the_networks_values(
        self, tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], said: str
    ) -> None:
        state = network().state_dict()
        torch.save({**state, "norm.weight": change(state["norm.weight"])}, tmp_path / "w.pth")
        with pytest.raises(WeightsError, match=said):
            open_timm(ARCH, str(tmp_path / "w.pth"), STATED, Asked())

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ({"qkv_bias": "no"}, "--arch-arg qkv_bias=no: it is a switch"),
            ({"checkpoint_path": "w.pth"}, "--arch-arg checkpoint_path: no argument of a network"),
            ({"global_pool": ""}, r"gives float\[1, 101, 64\] for an image, and not a vector of 64"),
            ({"in_chans": 1}, "takes no images of 160 px: .* to have 1 channels"),
            ({"depth": "two"}, "cannot be built with these arguments"),
        ],
    )
    def test_an_argument_by_which_nothing_is_computed(self, arguments: dict[str, Any], said: str) -> None:
        with pytest.raises(ExportUsageError, match=said) as caught:
            open_timm(ARCH, "random", STATED, Asked(None, arguments))
        assert caught.value.hint

    def test_the_published_weights_of_another_entry(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """mSTAR's have the names and shapes of UNI's: nothing else would tell."""
        torch.save({}, tmp_path / "pytorch_model.bin")
        published = catalogue()["mstar"].weights.sha256
        monkeypatch.setattr("mtdp_export.encoder_source.file_sha256", lambda path: published)
        with pytest.raises(WeightsError, match=r"holds the published weights of mSTAR, not of UNI$") as caught:
            open_source("uni", str(tmp_path / "pytorch_model.bin"), None, True)
        assert caught.value.hint == f"mtdp-export mstar --weights {tmp_path}/pytorch_model.bin --out B"

    def test_code_in_a_pickle_is_not_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        torch.save({"model": network().state_dict(), "hook": RunsCode()}, tmp_path / "w.pth")
        with pytest.raises(WeightsError, match=r"it holds code \(.*print\)") as caught:
            open_timm(ARCH, str(tmp_path / "w.pth"), STATED, Asked())
        assert "torch.save(" in caught.value.hint
        assert "it ran" not in capsys.readouterr().out

    def test_weights_of_another_encoder_are_named(self, tmp_path: Path) -> None:
        """Lunit's and Kaiko's ViT-S/16 where a ViT-B/16 was named."""
        state = timm.create_model("vit_small_patch16_224", num_classes=0).state_dict()
        save_file(state, tmp_path / "w.safetensors")
        with pytest.raises(WeightsError, match=r"does not fit vit_base_patch16_224: .* of another shape \(") as caught:
            open_source("kaiko-vitb16", str(tmp_path / "w.safetensors"), None, True)
        assert "it looks like kaiko-vits16 or lunit-vits16" in caught.value.hint

    def test_a_missing_and_a_strange_tensor_are_named(self, tmp_path: Path) -> None:
        state = network().state_dict()
        del state["norm.weight"]
        torch.save({**state, "blocks.0.attn.extra": torch.ones(2)}, tmp_path / "w.pth")
        with pytest.raises(WeightsError, match=r"1 missing \(norm\.weight\); 1 unexpected \(blocks\.0\.attn\.extra\)"):
            open_timm(ARCH, str(tmp_path / "w.pth"), STATED, Asked())

    def test_a_file_without_tensors(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match="no tensors are in it"):
            unwrap({"epoch": 3, "teacher": {"student": {}}}, {}, tmp_path)


class TestAFolderOfHuggingFace:
    @pytest.fixture
    def of_timm(self, tmp_path: Path) -> Path:
        model = timm.create_model("test_vit", num_classes=0, reg_tokens=2, img_size=128).eval()
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        config = {
            "architecture": "test_vit",
            "num_classes": 0,
            "model_args": {"reg_tokens": 2, "img_size": 128, "num_classes": 0},
            "pretrained_cfg": {
                "input_size": [3, 128, 128],
                "mean": [0.7, 0.6, 0.5],
                "std": [0.2, 0.25, 0.3],
                "interpolation": "bilinear",
                "crop_pct": 1.0,
            },
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "LICENSE").write_text("You may look, and not touch.\n")
        (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# A model\n")
        return tmp_path

    @pytest.mark.parametrize("prefix", ["", "timm:local-dir:"])
    def test_of_timm_says_all(self, of_timm: Path, prefix: str) -> None:
        source = open_source(f"{prefix}{of_timm}", None, None, True)
        pixels = source.preprocessing
        assert (pixels.image_px, pixels.mean, pixels.std) == (128, (0.7, 0.6, 0.5), (0.2, 0.25, 0.3))
        assert (pixels.interpolation, source.feature) == ("bilinear", "cls")
        assert source.pixels.numbers_from == "the folder's own config.json"
        assert source.licence == "cc-by-4.0, as the README of its folder states"
        by_timm = timm.create_model(f"local-dir:{of_timm}", pretrained=True, num_classes=0).eval()
        x = torch.rand(1, 3, 128, 128)
        with torch.no_grad():
            torch.testing.assert_close(source.network.backbone(x), by_timm(x))

    def test_its_numbers_are_those_of_the_catalogue_where_that_knows_its_weights(
        self, of_timm: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The mirror of Lunit's weights and mSTAR's page state what timm filled in."""
        published = catalogue()["mstar"].weights.sha256
        monkeypatch.setattr("mtdp_export.encoder_source.file_sha256", lambda path: published)
        with pytest.raises(
            ExportUsageError, match=r"mSTAR's .* std 0\.7 0\.6 0\.5 .*, the catalogue 0\.485 "
        ) as caught:
            open_folder(of_timm, Stated(), Asked())
        assert f"mtdp-export mstar --weights {of_timm} --out B" in caught.value.hint
        opened = open_folder(of_timm, STATED, Asked())
        assert opened.published == "the published weights of mSTAR"
        assert opened.pixels.preprocessing.mean == (0.5, 0.5, 0.5)

    def test_its_licence_goes_into_the_bundle(
        self, of_timm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = of_timm / "b"
        monkeypatch.setattr(sys, "argv", ["mtdp-export", str(of_timm), "--feature", "cls+mean", "--out", str(out)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (0, None), capsys.readouterr().err
        manifest = load_bundle(out).manifest
        assert (manifest.feature, manifest.features_dim, manifest.tile_px) == ("cls+mean", 128, 128)
        assert (out / "LICENSE").read_text() == "You may look, and not touch.\n"
        assert "[LICENSE](LICENSE)" in (out / "card.md").read_text()
        assert "| feature | cls+mean |" in (out / "card.md").read_text()
        assert "writing the network as ONNX" in capsys.readouterr().err

    def test_of_transformers(self, tmp_path: Path) -> None:
        from transformers import Dinov2Config, Dinov2Model

        torch.manual_seed(0)
        sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 70}
        model = Dinov2Model(Dinov2Config(**sizes)).eval()
        model.save_pretrained(tmp_path)
        stated = {
            "image_mean": [0.7, 0.6, 0.5],
            "image_std": [0.2, 0.25, 0.3],
            "resample": 3,
            "size": {"shortest_edge": 80},
            "crop_size": {"height": 70, "width": 70},
            "do_resize": True,
            "do_center_crop": True,
        }
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
        opened = open_folder(tmp_path, Stated(tile_px=96), Asked())
        pixels = opened.pixels
        assert (pixels.tile_px, pixels.resize_px, pixels.preprocessing.image_px) == (96, 80, 70)
        assert (pixels.preprocessing.mean, pixels.preprocessing.interpolation) == ((0.7, 0.6, 0.5), "bicubic")
        x = torch.rand(2, 3, 70, 70)
        with torch.no_grad():
            torch.testing.assert_close(opened.network.backbone(x), model(pixel_values=x).last_hidden_state[:, 0])

    @pytest.mark.parametrize("pool", ["", "token", "avg", "map"])
    def test_the_feature_is_what_its_network_pools(self, of_timm: Path, pool: str) -> None:
        sizes = {"reg_tokens": 2, "img_size": 128, "global_pool": pool}
        model = timm.create_model("test_vit", num_classes=0, **sizes).eval()
        save_file(model.state_dict(), of_timm / "model.safetensors")
        config = json.loads((of_timm / "config.json").read_text())
        (of_timm / "config.json").write_text(json.dumps({**config, "model_args": sizes}))
        opened = open_folder(of_timm, Stated(), Asked())
        x = torch.rand(1, 3, 128, 128)
        with torch.no_grad():
            wanted = model(x) if pool else model(x)[:, 0]
            torch.testing.assert_close(opened.network.backbone(x), wanted)
        assert opened.feature == ("cls" if pool in ("", "token") else "pooled")

    def test_code_of_its_own_is_not_run(self, tmp_path: Path) -> None:
        config = {"model_type": "hibou", "auto_map": {"AutoModel": "modeling_hibou.HibouModel"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "modeling_hibou.py").write_text("raise SystemExit('it ran')")
        with pytest.raises(ExportUsageError, match=r"names code of its own \(modeling_hibou\.HibouModel\)"):
            open_folder(tmp_path, Stated(), Asked())

    def test_weights_alone_do_not_say_of_which_network_they_are(self, of_timm: Path) -> None:
        (of_timm / "config.json").unlink()
        with pytest.raises(ExportUsageError, match=r"model\.safetensors lies in it, and no config\.json") as caught:
            open_source(str(of_timm), None, None, True)
        assert f"--weights {of_timm}/model.safetensors" in caught.value.hint
        (of_timm / "open_clip_config.json").write_text("{}")
        with pytest.raises(ExportUsageError, match="a model of open_clip"):
            open_source(str(of_timm), None, None, True)

    def test_what_it_lacks_is_said(self, of_timm: Path) -> None:
        config = json.loads((of_timm / "config.json").read_text())
        del config["pretrained_cfg"]
        (of_timm / "config.json").write_text(json.dumps(config))
        with pytest.raises(ExportUsageError, match="does not say how its network's pixels were normalised"):
            open_folder(of_timm, Stated(), Asked())
        (of_timm / "model.safetensors").rename(of_timm / "model-00001-of-00002.safetensors")
        with pytest.raises(ExportUsageError, match="its weights lie in 1 files"):
            open_folder(of_timm, STATED, Asked())
        (of_timm / "config.json").write_text("{")
        with pytest.raises(ExportError, match=r"config\.json cannot be read"):
            open_folder(of_timm, STATED, Asked())


@pytest.mark.parametrize("place", range(0, 400, 40))
def test_a_damaged_archive_that_was_packed_again_is_named(tmp_path: Path, place: int) -> None:
    path = tmp_path / "packed.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"x" * 5000)
        archive.writestr("a/data/0", bytes(range(256)) * 400)
    content = bytearray(path.read_bytes())
    content[content.index(b"a/data/0") + 8 + place] ^= 255
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"packed\.pth"):
        read_state(path)
