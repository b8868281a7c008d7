"""benchmarks/yardstick.py: what bf16 is judged by, measured after the export, is what an export measures."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from mtdp_export.errors import ExportError, ParityFailure
from mtdp_export.graph import autocast_outputs
from mtdp_export.source import open_source
from mtdp_export.write import ExportSettings, write_bundle
from mtdp_runtime.backends.openvino import OpenVINO
from mtdp_runtime.bundle import Bundle, default_bundle_path, load_bundle, write_manifest
from mtdp_runtime.bundle.golden import FEATURES, golden_of
from mtdp_runtime.bundle.tolerance import cosines
from mtdp_runtime.machine import cpuinfo, fast_bf16_units
from support import script, write_tiny_bundle

FARTHEST = 1  # of the packaged bundle's golden tiles, in bf16


@pytest.fixture(scope="module")
def yardstick() -> ModuleType:
    return script("yardstick")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("yardstick") / "r18"
    settings = ExportSettings("r18", 0.5, "fp16", precisions=("fp32", "bf16"))
    return write_bundle(open_source("resnet18", "random", 64, True), out, settings)[0]


def test_it_writes_what_the_export_would_have(
    exported: Bundle,
    yardstick: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "r18"
    shutil.copytree(exported.path, folder)
    write_manifest(folder, replace(exported.manifest, autocast=()))
    monkeypatch.setattr(sys, "argv", ["yardstick.py", str(folder), "--write"])
    yardstick.main()
    assert load_bundle(folder).manifest == exported.manifest
    shown = capsys.readouterr().out
    assert "torch autocast" in shown
    assert "typed, 0 of" in shown or "typed, 1 of" in shown


def test_another_network_than_the_golden_outputs_is_refused(exported: Bundle, yardstick: ModuleType) -> None:
    other = replace(exported, manifest=replace(exported.manifest, mean=(0.5, 0.5, 0.5)))
    with pytest.raises(ParityFailure, match="smallest cosine to the reference"):
        yardstick.network_of(other)


def test_a_graph_that_was_not_traced_from_torchvision_is_refused(yardstick: ModuleType, tmp_path: Path) -> None:
    tiny = load_bundle(write_tiny_bundle(tmp_path / "tiny"))
    with pytest.raises(ExportError, match="no initialiser"):
        yardstick.network_of(replace(tiny, manifest=replace(tiny.manifest, arch="resnet18")))


def test_the_packaged_bundle_states_what_autocast_comes_to(yardstick: ModuleType) -> None:
    """The farthest tile alone: torch emulates bf16 where the CPU has none, at a second a tile."""
    bundle = load_bundle(default_bundle_path())
    [stated] = bundle.manifest.autocast
    assert (stated.precision, stated.knn_agreement) == ("bf16", 1.0)
    tiles, expected = golden_of(bundle)
    outputs = autocast_outputs(yardstick.network_of(bundle), tiles[FARTHEST : FARTHEST + 1], "bf16")
    assert outputs is not None
    found = float(cosines(outputs[FEATURES], expected[FEATURES][FARTHEST : FARTHEST + 1])[0])
    assert 1 - found == pytest.approx(1 - stated.cosine_min, rel=0.25)  # CPUs sum in other orders


def test_auto_takes_bf16_for_the_packaged_model_where_this_cpu_is_fast_in_it() -> None:
    with OpenVINO.load(load_bundle(default_bundle_path()), "auto", 4, 2) as engine:
        assert engine.precision == ("bf16" if fast_bf16_units(cpuinfo()) else "fp32")
        assert engine.note == ""
