"""The ladder of engines: the best that runs is taken, and every better one that was not is accounted for."""

from __future__ import annotations

import ast
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import mtdp_runtime
import warm
from fake_backends import Broken, Picky
from mtdp.devices import has_fast_bf16
from mtdp_runtime.backends import (
    BACKENDS,
    Backend,
    Probe,
    backend_class,
    choose,
    first_that_loads,
    load,
    probe_all,
    variant_precisions,
)
from mtdp_runtime.backends.gpus import Gpu
from mtdp_runtime.backends.onnxruntime import OnnxRuntime, OnnxRuntimeTensorRT, strict_session
from mtdp_runtime.backends.tensorrt.library import LIBRARY, Library
from mtdp_runtime.bundle import Bundle, load_bundle
from mtdp_runtime.commands.doctor import _self_test, conflicts
from mtdp_runtime.errors import BackendError, BackendUnavailable, DeviceOutOfMemory, UsageError
from mtdp_runtime.machine import fast_bf16_units

GPU_RUNGS = ("tensorrt", "tensorrt-rtx", "onnxruntime-tensorrt", "onnxruntime-cuda")


def ladder(*classes: str) -> dict[str, str]:
    names = {"Absent": "absent", "Broken": "broken", "Picky": "picky", "Fine": "fine", "NeverAsked": "never-asked"}
    return {names[one]: f"fake_backends:{one}" for one in classes}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return load_bundle(tiny_bundle)


class TestAuto:
    def test_takes_the_first_that_runs_and_asks_no_further(self, bundle: Bundle) -> None:
        engine, reason = load("auto", bundle, "auto", 1, 1, ladder("Absent", "Fine", "NeverAsked"))
        assert type(engine).__name__ == "Fine"
        assert reason == "the best here: fine 1.0 on a test; not absent (mtdp-doctor says why)"

    def test_climbs_down_past_what_fails_and_says_why(self, bundle: Bundle) -> None:
        engine, reason = load("auto", bundle, "auto", 1, 1, ladder("Broken", "Absent", "Picky", "Fine"))
        assert type(engine).__name__ == "Fine"
        assert reason == (
            "the best here: fine 1.0 on a test; not absent (mtdp-doctor says why)"
            "; broken failed: its library cannot build this model; picky failed: it has no such precision"
        )

    def test_the_highest_rungs_error_is_raised_where_none_takes_the_model(self, bundle: Bundle) -> None:
        with pytest.raises(BackendError, match="cannot build this model"):
            load("auto", bundle, "auto", 1, 1, ladder("Absent", "Broken", "Picky"))

    def test_nothing_usable_is_said_with_every_reason(self, bundle: Bundle) -> None:
        with pytest.raises(BackendUnavailable, match="absent not usable: not installed") as caught:
            load("auto", bundle, "auto", 1, 1, ladder("Absent"))
        assert caught.value.hint.startswith("pip install")


@pytest.mark.parametrize(
    ("cpuinfo", "units"),
    [
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512_bf16 amx_bf16 amx_tile\n", "AMX matrix units"),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512_bf16\n", ""),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512_bf16\n", "AMD's vector units"),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2\n", ""),
        ("", ""),
    ],
)
def test_bf16_is_the_default_where_it_was_measured_to_be_faster(cpuinfo: str, units: str) -> None:
    assert fast_bf16_units(cpuinfo) == units
    assert has_fast_bf16(cpuinfo) == bool(units), "training decides alike"


class TestByName:
    def test_there_is_no_other_rung(self, bundle: Bundle) -> None:
        with pytest.raises(BackendError, match="cannot build this model"):
            load("broken", bundle, "auto", 1, 1, ladder("Broken", "Fine"))

    def test_an_unknown_name(self) -> None:
        with pytest.raises(UsageError, match="unknown backend 'cuda'") as caught:
            choose("cuda")
        assert all(name in caught.value.hint for name in BACKENDS)

    @pytest.mark.parametrize("name", GPU_RUNGS)
    def test_a_gpu_rung_without_a_gpu_names_what_is_missing_and_what_installs_it(self, name: str) -> None:
        probe = backend_class(name).probe()
        if probe.usable:
            pytest.skip("this machine runs it")
        with pytest.raises(BackendUnavailable) as caught:
            choose(name)
        assert str(caught.value) == f"backend {name} is not usable here: {probe.reason}"
        assert "pip install" in caught.value.hint or "driver" in caught.value.hint


def test_the_order_is_the_documented_one() -> None:
    assert [probe.name for probe in probe_all()] == [*GPU_RUNGS, "openvino", "onnxruntime"]


class TestPrecision:
    GPU = Probe("gpu", True, "", precisions=("fp16", "bf16", "fp32", "int8"))

    def with_variants(self, bundle: Bundle, *precisions: str) -> Bundle:
        variants = tuple(replace(bundle.manifest.variants[0], precision=one) for one in precisions)
        return replace(bundle, manifest=replace(bundle.manifest, variants=variants))

    def test_auto_takes_the_best_graph_that_the_bundle_holds(self, bundle: Bundle) -> None:
        assert variant_precisions(self.with_variants(bundle, "fp32", "bf16"), "auto", self.GPU) == ["bf16", "fp32"]
        assert variant_precisions(self.with_variants(bundle, "int8", "fp32"), "auto", self.GPU) == ["fp32"]

    @pytest.mark.parametrize(("asked", "why"), [("fp16", "no fp16 variant"), ("fp8", "--precision fp8")])
    def test_what_was_asked_for_is_had_or_refused(self, bundle: Bundle, asked: str, why: str) -> None:
        with pytest.raises(UsageError, match=why):
            variant_precisions(bundle, asked, self.GPU)
        assert variant_precisions(bundle, "fp32", self.GPU) == ["fp32"]

    def test_int8_alone_is_not_taken_unasked(self, bundle: Bundle) -> None:
        only = self.with_variants(bundle, "int8")
        with pytest.raises(UsageError, match="this bundle has int8"):
            variant_precisions(only, "auto", self.GPU)
        assert variant_precisions(only, "int8", self.GPU) == ["int8"]

    def test_int8_is_hinted_at_only_where_it_runs(self, bundle: Bundle) -> None:
        for precisions, hinted in ((("fp16", "int8"), True), (("fp16",), False)):
            with pytest.raises(UsageError) as caught:
                variant_precisions(self.with_variants(bundle, "int8"), "auto", replace(self.GPU, precisions=precisions))
            assert ("int8" in caught.value.hint) == hinted

    def test_auto_climbs_down_the_precisions_before_the_rung_is_left(self, bundle: Bundle) -> None:
        every = self.with_variants(bundle, "fp32", "bf16", "fp16", "int8")
        engine, _ = load("auto", every, "auto", 1, 1, {"choosy": "fake_backends:Choosy", **ladder("NeverAsked")})
        assert engine.precision == "fp32"
        assert engine.note == (
            "not fp16: it does not compute this model in fp16; not bf16: it does not compute this model in bf16"
            "; engine built now"
        )

    def test_a_precision_that_was_asked_for_is_not_exchanged(self, bundle: Bundle) -> None:
        every = self.with_variants(bundle, "fp32", "bf16", "fp16")
        with pytest.raises(BackendError, match="does not compute this model in bf16"):
            load("choosy", every, "bf16", 1, 1, {"choosy": "fake_backends:Choosy"})

    def test_a_lack_of_memory_is_no_matter_of_precision(self) -> None:
        def load_at(precision: str) -> Backend:
            raise DeviceOutOfMemory(precision)

        with pytest.raises(DeviceOutOfMemory, match="fp16"):
            first_that_loads(["fp16", "fp32"], load_at)


class TestProbesNeverRaise:
    """What an incomplete removal leaves behind, and what a broken GPU says."""

    GPU = Gpu(0, "RTX of the test", "8.9")

    @pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
    def test_of_a_module_that_is_a_shell(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        probe = backend_class(name).probe()
        assert not probe.usable
        assert "has no attribute" in probe.reason

    @pytest.mark.parametrize("name", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
    def test_of_a_shell_beside_a_gpu(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
        monkeypatch.setattr("mtdp_runtime.backends.onnxruntime._installed", lambda package: True)
        monkeypatch.setattr("mtdp_runtime.backends.gpus.gpus", lambda: [self.GPU])
        assert "onnxruntime-gpu cannot be loaded" in backend_class(name).probe().reason

    @pytest.mark.parametrize("name", GPU_RUNGS)
    def test_of_a_gpu_in_a_broken_state(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken() -> list[Gpu]:
            raise BackendError("CUDA: cudaErrorDevicesUnavailable", "Run mtdp-doctor.")

        monkeypatch.setattr("mtdp_runtime.backends.gpus.gpus", broken)
        monkeypatch.setattr("mtdp_runtime.backends.tensorrt.backend.gpus", broken)
        probe = backend_class(name).probe()
        assert not probe.usable
        assert "cudaErrorDevicesUnavailable" in probe.reason

    @pytest.mark.parametrize("rung", ["tensorrt", "tensorrt-rtx"])
    def test_of_an_engine_library_that_is_a_shell(self, rung: str, monkeypatch: pytest.MonkeyPatch) -> None:
        library = Library(rung, "json", ("no-such-distribution",), "pip install it")
        monkeypatch.setattr("mtdp_runtime.backends.tensorrt.backend.gpus", lambda: [self.GPU])
        monkeypatch.setitem(LIBRARY, rung, library)
        monkeypatch.setattr("json.__version__", "", raising=False)
        monkeypatch.delattr("json.__version__")
        probe = backend_class(rung).probe()
        assert not probe.usable
        assert "cannot be loaded" in probe.reason


@pytest.mark.parametrize("name", GPU_RUNGS)
def test_no_gpu_rung_offers_int8(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT refuses its zero points, and CUDA would compute it in fp32."""
    gpu = [Gpu(0, "RTX of the test", "8.9")]
    monkeypatch.setattr("mtdp_runtime.backends.gpus.gpus", lambda: gpu)
    monkeypatch.setattr("mtdp_runtime.backends.tensorrt.backend.gpus", lambda: gpu)
    monkeypatch.setattr("mtdp_runtime.backends.onnxruntime._installed", lambda package: True)
    providers = ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: providers)
    monkeypatch.setitem(LIBRARY, name, Library(name, "json", ("pytest",), ""))
    probe = backend_class(name).probe()
    assert probe.usable, probe.reason
    assert set(probe.precisions) <= {"fp32", "fp16", "bf16"}


def test_fp32_on_onnxruntimes_tensorrt_is_not_tf32(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def session(file: Path, providers: object) -> None:
        seen.append(os.environ.get("NVIDIA_TF32_OVERRIDE"))
        raise BackendError("no GPU")

    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "")  # what is there now comes back after the test
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    monkeypatch.setattr("onnxruntime.preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr("mtdp_runtime.backends.onnxruntime.strict_session", session)
    monkeypatch.setattr(OnnxRuntimeTensorRT, "probe", lambda: Probe("x", True, "", precisions=("fp32",)))
    with pytest.raises(BackendError, match="no GPU"):
        OnnxRuntimeTensorRT.load(bundle, "fp32", 1, 1)
    assert seen == ["0"]


class TestOnnxRuntimeNeverFallsBack:
    def test_a_provider_that_is_not_there_is_an_error(self, bundle: Bundle) -> None:
        """Left to itself it warns and runs on the CPU."""
        with pytest.raises(BackendError, match="without its NoSuchExecutionProvider"):
            strict_session(bundle.path / "model.fp32.onnx", (("NoSuchExecutionProvider", {}),))

    def test_a_provider_that_leaves_the_nodes_to_the_cpu_is_an_error(self, bundle: Bundle) -> None:
        """The provider for remote models is in every build and runs none of these nodes: all would go to the CPU."""
        onnxruntime = pytest.importorskip("onnxruntime")
        if "AzureExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("this build of ONNX Runtime has no such provider")
        with pytest.raises(BackendError, match=r"cannot run .* on AzureExecutionProvider"):
            strict_session(bundle.path / "model.fp32.onnx", (("AzureExecutionProvider", {}),))

    def test_what_it_can_run_it_runs(self, bundle: Bundle) -> None:
        session = strict_session(bundle.path / "model.fp32.onnx", (("CPUExecutionProvider", {}),))
        assert session.get_providers() == ["CPUExecutionProvider"]


class TestDoctor:
    def test_prints_the_ladder_with_what_is_missing_and_the_line_that_brings_it(self) -> None:
        code = (
            "from mtdp_runtime.commands.doctor import _print; from mtdp_runtime.backends import probe_all\n"
            "from dataclasses import asdict\n"
            "probes = [asdict(p) for p in probe_all()]\n"
            "_print({'machine': '', 'averaging': '', 'openslide': '', 'packaged_model': '', 'backends': probes,"
            " 'self_test': {}, 'problems': []})"
        )
        result = warm.run(code)
        assert result.returncode == 0, result.stderr
        lines = [line.strip() for line in result.stdout.splitlines()]
        rungs = [line.split()[0] for line in lines if line.split()[:1] and line.split()[0] in BACKENDS]
        assert rungs == list(BACKENDS)
        for number, line in enumerate(lines):
            if line.split()[:1] and line.split()[0] in BACKENDS and line.split()[1] == "no":
                assert lines[number + 1].startswith("-> ")

    def test_a_rung_that_refuses_is_a_problem_and_the_others_are_tried(
        self, monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path
    ) -> None:
        monkeypatch.setattr("mtdp_runtime.bundle.default_bundle_path", lambda: tiny_bundle)
        classes: dict[str, type[Any]] = {"picky": Picky, "broken": Broken, "onnxruntime": OnnxRuntime}
        monkeypatch.setattr("mtdp_runtime.backends.probe_all", lambda: [one.probe() for one in classes.values()])
        monkeypatch.setattr("mtdp_runtime.backends.backend_class", classes.__getitem__)
        problems: list[str] = []
        assert _self_test(problems).keys() == {"onnxruntime"}
        assert [problem.split(":")[0] for problem in problems] == ["self-test of picky", "self-test of broken"]

    def test_two_onnxruntimes_in_one_environment_are_a_problem(self) -> None:
        assert conflicts({"onnxruntime": "1.32", "onnxruntime-gpu": ""}) == []
        (problem,) = conflicts({"onnxruntime": "1.32", "onnxruntime-gpu": "1.31"})
        assert "overwrite each other's files" in problem


class TestNamesExist:
    """What cannot run without a GPU is at least spelled as the installed libraries spell it."""

    SOURCE = ast.parse((Path(mtdp_runtime.__file__).parent / "backends" / "tensorrt" / "cuda.py").read_text())

    def chains(self, root: str) -> set[str]:
        """Attribute chains from a name, such as `cudaMemcpyKind.cudaMemcpyHostToDevice`."""
        return {
            ast.unparse(node).removeprefix(f"{root}.")
            for node in ast.walk(self.SOURCE)
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(f"{root}.")
        }

    def test_of_cuda(self) -> None:
        runtime = pytest.importorskip("cuda.bindings.runtime")
        used = self.chains("cudart") | self.chains("self._cudart")
        assert len(used) > 25
        for chain in used:
            found = runtime
            for part in chain.split("."):
                assert hasattr(found, part), f"cuda.bindings.runtime has no {chain}"
                found = getattr(found, part)

    def test_of_tensorrt(self) -> None:
        trt = pytest.importorskip("tensorrt_rtx")
        for chain in self.chains("trt"):
            found = trt
            for part in chain.split("."):
                assert hasattr(found, part), f"tensorrt_rtx has no {chain}"
                found = getattr(found, part)
        members = {
            "self._context": trt.IExecutionContext,
            "self._engine": trt.ICudaEngine,
            "self._runtime": trt.Runtime,
            "self._kernel_cache": trt.IRuntimeCache,
            "config": trt.IRuntimeConfig,
        }
        for root, kind in members.items():
            used = {chain for chain in self.chains(root) if "." not in chain}
            assert used
            for name in used:
                assert hasattr(kind, name), f"{kind.__name__} has no {name}"
