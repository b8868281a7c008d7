"""An output that is no number fails its own row, and its own variant: the others are judged all the same."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from mtdp_export import variants, verify
from mtdp_export.cli import main
from mtdp_export.errors import ExportError, ParityFailure
from mtdp_export.golden import save_golden
from mtdp_export.onnx_source import Declared, open_onnx
from mtdp_export.parity import Comparison, Refused, table
from mtdp_export.source import open_source
from mtdp_export.typed import name_nodes, to_low_type
from mtdp_export.write import ExportSettings, write_bundle
from mtdp_runtime.backends import Probe
from mtdp_runtime.backends.onnxruntime import OnnxRuntime
from mtdp_runtime.bundle import file_ref, load_bundle, write_manifest
from mtdp_runtime.bundle.golden import load_golden
from mtdp_runtime.bundle.manifest import Variant
from mtdp_runtime.errors import BundleInvalid
from support import write_tiny_bundle

NOT_FINITE = "output features is not finite in 4 of 4 tiles"


def add_fp16(bundle: Path, model: onnx.ModelProto) -> Path:
    """Add a typed copy of the model as the bundle's fp16 variant."""
    name_nodes(model)
    onnx.save(to_low_type(model, "fp16"), bundle / "model.fp16.onnx")
    manifest = load_bundle(bundle).manifest
    variant = Variant("fp16", file_ref(bundle, "model.fp16.onnx"), manifest.variants[0].parity)
    write_manifest(bundle, replace(manifest, variants=(*manifest.variants, variant)))
    return bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Fp32 and fp16 of a network of one convolution."""
    folder = write_tiny_bundle(tmp_path / "tiny")
    return add_fp16(folder, onnx.load(folder / "model.fp32.onnx"))


class Overflowing(OnnxRuntime):
    """An engine whose numbers overflow in the precisions of `at`."""

    at: tuple[str, ...] = ("fp16",)

    @classmethod
    def probe(cls) -> Probe:
        return Probe("overflowing", True, "", precisions=("fp32", "fp16"))

    def result(self, ticket: int) -> Mapping[str, NDArray[np.float32]]:
        outputs = super().result(ticket)
        self.name = "overflowing 1"
        if self.precision not in self.at:
            return outputs
        return {name: np.full_like(values, np.inf) for name, values in outputs.items()}


class OverflowingAlways(Overflowing):
    at = ("fp32", "fp16")


@pytest.fixture(params=[Overflowing])
def engines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines, run in this process."""
    classes: dict[str, Any] = {"overflowing": request.param, "onnxruntime": OnnxRuntime}
    monkeypatch.setattr(verify, "probe_all", lambda: [one.probe() for one in classes.values()])
    monkeypatch.setattr(verify, "backend_class", classes.__getitem__)
    monkeypatch.setattr(
        verify, "verify_bundle", lambda path, backends, trust, limit_s: verify.replay(path, backends, trust)
    )


@pytest.mark.usefixtures("engines")
class TestOneEngine:
    def test_is_a_row_and_the_others_go_on(self, bundle: Path) -> None:
        rows = verify.replay(bundle, ())
        refused = [row for row in rows if isinstance(row, Refused)]
        assert [(row.backend, row.precision, row.reason) for row in refused] == [("overflowing 1", "fp16", NOT_FINITE)]
        compared = [row for row in rows if isinstance(row, Comparison)]
        assert len(compared) == 4
        assert all(row.passed for row in compared)
        lines = [" ".join(line.split()) for line in table(rows).splitlines()]
        assert f"overflowing 1 fp16 refused: {NOT_FINITE}" in lines

    @pytest.mark.parametrize("options", [[], ["--json"]])
    def test_ends_the_command_with_1(
        self, bundle: Path, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["mtdp-export", "--verify", str(bundle), *options])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 1
        shown = capsys.readouterr().out
        assert NOT_FINITE in shown
        if options:
            found = json.loads(shown)
            assert [row["passed"] for row in found["parity"]].count(False) == 1
            assert (found["passed"], found["digest"]) == (False, load_bundle(bundle).digest)

    def test_is_refused_at_its_export_and_named(self, bundle: Path) -> None:
        proof = variants.prove(bundle, None)
        assert proof.parities.keys() == {"fp32"}
        (error,) = proof.refused
        assert str(error).startswith(f"fp16 on overflowing 1: {NOT_FINITE}; no single layer is far off")
        assert error.hint == "It was not written. Export without --precision fp16."

    @pytest.mark.parametrize("engines", [OverflowingAlways], indirect=True)
    def test_of_fp32_ends_an_export(self, bundle: Path) -> None:
        with pytest.raises(ParityFailure, match=f"fp32 on overflowing 1: {NOT_FINITE}"):
            variants.prove(bundle, None)


@pytest.mark.usefixtures("engines")
def test_where_nothing_runs_nothing_is_verified(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No row failed; none passed, either."""
    manifest = load_bundle(bundle).manifest
    write_manifest(bundle, replace(manifest, variants=(replace(manifest.variants[0], precision="int8"),)))
    monkeypatch.setattr(verify, "probe_all", lambda: [Overflowing.probe()])
    monkeypatch.setattr(sys, "argv", ["mtdp-export", "--verify", str(bundle)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "not run: this engine runs fp32, fp16 here" in capsys.readouterr().out


def test_a_graph_that_overflows_is_a_row_as_it_is_typed(tmp_path: Path) -> None:
    """The sums of its convolution are beyond fp16; its weights are not."""
    folder = write_tiny_bundle(tmp_path / "tiny")
    model = onnx.load(folder / "model.fp32.onnx")
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1e5), tensor.name))
    fp32, as_typed, in_fp32 = verify.replay(add_fp16(folder, model), ["onnxruntime"])
    assert fp32.passed
    assert isinstance(as_typed, Refused)
    assert as_typed.backend.startswith("as typed")
    assert as_typed.reason == NOT_FINITE
    assert not in_fp32.passed  # the engine computes the file in fp32: finite, right in direction, and 1e5 times as long


def test_a_weight_beyond_fp16_stays_in_fp32(tmp_path: Path) -> None:
    """The graph of the tiny bundle, brought as a model of one's own that takes uint8."""
    folder = write_tiny_bundle(tmp_path / "tiny")
    model = onnx.load(folder / "model.fp32.onnx")
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[0] *= np.float32(1e5 / np.abs(weight[0]).max())
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "weight"))
    onnx.save(model, tmp_path / "own.onnx")
    settings = ExportSettings("own", 0.5, precisions=("fp32", "fp16", "bf16"))
    bundle, report = write_bundle(open_onnx(tmp_path / "own.onnx", Declared()), tmp_path / "b", settings)
    assert bundle.holds("fp32")
    assert bundle.holds("fp16")  # with the kernel that it belongs to in fp32
    assert {str(error)[:4] for error in report.refused} <= {"bf16"}  # it was tried: nothing says that it must pass


def test_a_network_that_gives_no_numbers_is_named_before_the_proof(tmp_path: Path) -> None:
    source = open_source("resnet18", "random", 32, True)
    with torch.no_grad():
        source.network.backbone.trunk.bn1.running_var.fill_(float("nan"))
    with pytest.raises(ExportError, match="the network's own features are not finite on 16 of 16 golden tiles"):
        write_bundle(source, tmp_path / "b", ExportSettings("b", 0.5))
    assert not list(tmp_path.iterdir())


def test_golden_outputs_that_are_no_numbers_prove_nothing(bundle: Path) -> None:
    """A NaN among them would compare with nothing, and pass unseen."""
    tiles, outputs = load_golden(bundle / "golden.npz")
    outputs["features"][2, 3] = np.nan
    save_golden(bundle / "golden.npz", tiles, outputs)
    manifest = load_bundle(bundle).manifest
    write_manifest(bundle, replace(manifest, golden=file_ref(bundle, "golden.npz")))
    with pytest.raises(BundleInvalid, match="not golden tiles: features is not finite"):
        verify.replay(bundle, ["onnxruntime"])
