"""A GPU acted out where the runtime looks for one: CUDA, TensorRT, TensorRT-RTX, ONNX Runtime's providers.

The engines are real models: what a library "builds" holds its ONNX file, and ONNX Runtime computes it on the CPU when
the acted CUDA comes to it (`fake_cuda`). So all that is ours runs, from the probe to the features, and must be right.
"""

from __future__ import annotations

import importlib.machinery
import os
import stat
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fake_cuda import FakeContext, FakeCudart, FakeEngine, FakeTrt
from support import write_tiny_bundle

CARD = "GPU acted out in host memory"
_SMI = """#!/bin/sh
case "$*" in
  *-lms*) while :; do echo "55, 1024, 1980, 2619, 312.50"; sleep 0.05; done ;;
  *) echo "{card}, 580.65.06, 143771, 700.00, Disabled" ;;
esac
"""


class OnnxTrt(FakeTrt):
    """A library that builds and runs ONNX models."""

    __version__ = "0.0.fake"
    BuilderFlag = SimpleNamespace(TF32="tf32", REQUIRE_USER_ALLOCATION="ours", VERSION_COMPATIBLE="compatible")
    HardwareCompatibilityLevel = SimpleNamespace(NONE=0, SAME_COMPUTE_CAPABILITY=1, AMPERE_PLUS=2)
    NetworkDefinitionCreationFlag = SimpleNamespace()
    ComputeCapability = SimpleNamespace(__members__={"CURRENT": -1, "SM75": 75, "SM80": 80, "SM89": 89, "SM90": 90})

    def Builder(self, logger: Any) -> Any:
        return SimpleNamespace(
            create_network=lambda flags: SimpleNamespace(onnx=b""),
            create_builder_config=_Config,
            create_optimization_profile=_Profile,
            build_serialized_network=self._build,
        )

    def OnnxParser(self, network: Any, logger: Any) -> Any:
        def parse(content: bytes) -> bool:
            (given,) = _session(content).get_inputs()
            shape = tuple(size if isinstance(size, int) else -1 for size in given.shape)
            assert given.type == "tensor(uint8)", given.type
            network.onnx, network.num_inputs = content, 1
            network.get_input = lambda index: SimpleNamespace(name=given.name, dtype=self.DataType.UINT8, shape=shape)
            return True

        return SimpleNamespace(parse=parse, num_errors=0)

    def Runtime(self, logger: Any) -> Any:
        def deserialize(plan: bytes) -> Any:
            low, high, content = plan.split(b"|", 2)
            return OnnxEngine(self, content, int(low), int(high))

        return SimpleNamespace(deserialize_cuda_engine=deserialize)

    @staticmethod
    def _build(network: Any, config: _Config) -> bytes:
        (profile,) = config.profiles
        low, _, high = profile.shapes["tiles"]
        return b"|".join((str(low[0]).encode(), str(high[0]).encode(), network.onnx))


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        self.shapes[name] = shapes


class _Config:
    def __init__(self) -> None:
        self.profiles: list[_Profile] = []
        self.flags: list[str] = []

    def add_optimization_profile(self, profile: _Profile) -> None:
        self.profiles.append(profile)

    def clear_flag(self, flag: str) -> None:
        self.flags.append(f"no {flag}")

    def set_flag(self, flag: str) -> None:
        self.flags.append(flag)

    def set_compute_capability(self, target: int, index: int) -> bool:
        return True

    def create_timing_cache(self, content: bytes) -> bytes:
        return content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        return True

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: b"kernels")


class OnnxEngine(FakeEngine):
    def __init__(self, trt: FakeTrt, content: bytes, low: int, high: int) -> None:
        super().__init__(trt)
        self.session = _session(content)
        self.low, self.high = low, high
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.num_io_tensors = 1 + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return ["tiles", *self.outputs][index]

    def create_execution_context(self, config: Any) -> OnnxContext:
        return OnnxContext(self)


class OnnxContext(FakeContext):
    def __init__(self, engine: OnnxEngine) -> None:
        super().__init__(engine.trt)
        self.engine = engine

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return self.engine.low <= shape[0] <= self.engine.high

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        rows = {output.name: output.shape[1:] for output in self.engine.session.get_outputs()}
        return self.shape if name == "tiles" else (self.shape[0], *rows[name])

    def execute_async_v3(self, stream: int) -> bool:
        shape, addresses, memory = self.shape, dict(self.addresses), self.trt.cudart.memory

        def infer() -> None:
            assert self.memory in memory, "inference without activation memory"
            tiles = np.ctypeslib.as_array(memory[addresses["tiles"]])[: int(np.prod(shape))].reshape(shape)
            names = self.engine.outputs
            for name, values in zip(names, self.engine.session.run(names, {"tiles": tiles}), strict=True):
                np.ctypeslib.as_array(memory[addresses[name]])[: values.nbytes] = values.view(np.uint8).ravel()

        self.trt.cudart.queue(stream, infer)
        return True


def _session(content: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def install(patch: pytest.MonkeyPatch, cudart: FakeCudart | None = None) -> FakeCudart:
    """Put the acted GPU in place; `patch` takes it away again."""
    import onnxruntime

    from mtdp_runtime.backends import onnxruntime as rung

    cudart = cudart or FakeCudart(room_bytes=8 << 30)
    trt = OnnxTrt(cudart)
    bindings = _module("cuda.bindings", runtime=cudart)
    modules = {"cuda": _module("cuda", bindings=bindings), "cuda.bindings": bindings, "cuda.bindings.runtime": cudart}
    for name, module in (modules | {name: _library(name, trt) for name in ("tensorrt", "tensorrt_rtx")}).items():
        patch.setitem(sys.modules, name, module)
    patch.setattr(onnxruntime, "get_available_providers", _providers)
    patch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    patch.setattr(rung, "_installed", lambda package: package == "onnxruntime-gpu")
    patch.setattr(rung, "strict_session", lambda file, providers: _session(Path(file).read_bytes()))
    return cudart


def install_for_process(folder: Path) -> None:
    """Put it in place until the process ends, with an nvidia-smi, and a tiny model as the packaged one."""
    patch = pytest.MonkeyPatch()
    install(patch)
    programs, tiny = folder / "programs", folder / "tiny"
    programs.mkdir(exist_ok=True)
    write_nvidia_smi(programs)
    patch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    # A process of its own would not know of what is put here. Whoever needs it imports it after this.
    patch.setattr("mtdp_export.isolated.isolated", lambda what, work, *given: work(*given))
    if not tiny.exists():
        write_tiny_bundle(tiny)
    patch.setattr("mtdp_runtime.bundle.default_bundle_path", lambda: tiny)


def _providers() -> list[str]:
    return ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


def _module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(members)
    return module


def _library(name: str, trt: OnnxTrt) -> ModuleType:
    """Return the library as a module: its classes and constants, and its version."""
    members = {member: getattr(trt, member) for member in dir(trt) if not member.startswith("_")}
    return _module(name, __version__=trt.__version__, **members)


def write_nvidia_smi(folder: Path) -> Path:
    """Write a program that answers as nvidia-smi does to what benchmarks/gpu.py asks."""
    path = folder / "nvidia-smi"
    path.write_text(_SMI.replace("{card}", CARD))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path
