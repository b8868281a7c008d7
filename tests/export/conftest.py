"""Bundles that are exported once and looked at by many tests; the command, in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from isolated_warm import Warm
from mtdp.backbones import build_backbone
from mtdp.multitask import MultiTaskNet
from mtdp_export.cli import main
from mtdp_export.source import open_source
from mtdp_export.write import ExportSettings, write_bundle
from support import Run

HEADS = {"lung": ("aca", "normal", "scc"), "wbc-type": ("lymphocyte", "neutrophil")}


@pytest.fixture(scope="session", autouse=True)
def _warm_processes() -> Iterator[None]:
    """Processes of their own, begun in a tenth of the time."""
    warm = Warm()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtdp_export.isolated.multiprocessing", SimpleNamespace(get_context=lambda method: warm))
        yield


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


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """mtdp-export -q in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mtdp-export", "-q", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return call
