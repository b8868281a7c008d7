"""Bundles that are exported once and looked at by many tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mtdp.backbones import build_backbone
from mtdp.multitask import MultiTaskNet
from mtdp_export.source import open_source
from mtdp_export.write import ExportSettings, write_bundle

HEADS = {"lung": ("aca", "normal", "scc"), "wbc-type": ("lymphocyte", "neutrophil")}


@pytest.fixture(scope="session")
def small_network() -> MultiTaskNet:
    torch.manual_seed(0)
    return MultiTaskNet(build_backbone("resnet18"), HEADS).eval()


@pytest.fixture(scope="session")
def resnet18_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, tiles of 64 px."""
    out = tmp_path_factory.mktemp("bundles") / "r18"
    write_bundle(open_source("resnet18", "random", 64, True), out, ExportSettings("r18", 0.5))
    return out
