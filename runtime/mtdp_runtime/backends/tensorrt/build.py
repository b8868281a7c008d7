"""From an ONNX file to a serialized engine. Precision is the graph's own: these libraries add none and take none away.

TensorRT tunes on the GPU and needs one; TensorRT-RTX compiles for given compute capabilities, without one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mtdp_runtime.backends.tensorrt.library import LIBRARY, Log, says_out_of_memory
from mtdp_runtime.bundle.engine_key import TENSORRT_RTX
from mtdp_runtime.bundle.manifest import DATA_SUFFIX
from mtdp_runtime.errors import BackendError, DeviceOutOfMemory
from mtdp_runtime.files import read_with_digest, save_with_digest

INPUT: Final = "tiles"


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How an engine is built."""

    batch: tuple[int, int, int]  # smallest, best, largest
    capabilities: tuple[str, ...] = ()  # TensorRT-RTX: "8.9", ..., or "current"; empty: its default, 8.0 and later
    hardware: str = "none"  # TensorRT: one of key.HARDWARE
    version_compatible: bool = False  # TensorRT
    timing_cache: Path | None = None  # TensorRT: measured kernels, kept between builds


@dataclass(frozen=True, slots=True)
class Built:
    """An engine, and what the builder said."""

    engine: bytes
    log: str
    notes: tuple[str, ...] = ()  # what a person should know


def build_engine(library: str, onnx: Path, tile_px: int, options: BuildOptions, gpu: int | None = None) -> Built:
    """Parse and compile.

    Args:
        library: one of key.LIBRARIES.
        onnx: a graph that takes `tiles` uint8[batch, tile_px, tile_px, 3].
        tile_px: side of a tile.
        options: what to build for.
        gpu: index of the GPU to tune on; None where there is none.

    Raises:
        BackendUnavailable: the library is not installed.
        DeviceOutOfMemory: the GPU that it tunes on has too little memory free.
        BackendError: it refuses the file, or cannot build for what was asked.
    """
    trt = LIBRARY[library].load()
    log = Log(trt)
    if gpu is not None:
        from mtdp_runtime.backends.gpus import select_gpu

        select_gpu(gpu)
    # Each of these must outlive what it made: network and config die with the builder.
    builder = started(lambda: trt.Builder(log.logger), f"{library} cannot start a builder", log)
    network = builder.create_network(_network_flags(trt))
    _parse(trt, network, onnx, library, log)
    config = builder.create_builder_config()
    _check_input(trt, network, onnx, tile_px, options)
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT, *((rows, tile_px, tile_px, 3) for rows in options.batch))
    config.add_optimization_profile(profile)
    # fp32 means fp32: TF32 would round the inputs of every product to 10 bits.
    config.clear_flag(trt.BuilderFlag.TF32)
    _set_targets(trt, config, library, options)
    notes: tuple[str, ...] = ()
    cache = options.timing_cache if library != TENSORRT_RTX else None  # the RTX library has none
    if cache is not None:
        notes = attach_timing_cache(config, cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        if says_out_of_memory(log.last_error):
            raise DeviceOutOfMemory(f"{library} cannot build {onnx}: {log.last_error}", "Use a smaller --batch.")
        raise BackendError(
            f"{library} cannot build {onnx}: {log.last_error or 'it does not say why'}", _hint(library, log.last_error)
        )
    if cache is not None:
        notes += _keep_timing_cache(config, cache)
    return Built(bytes(plan), log.text, notes)


def started(make: Callable[[], Any], failure: str, log: Log) -> Any:
    """Return what the library's constructor makes.

    Raises:
        BackendError: it makes nothing. Where CUDA does not start, its bindings raise a TypeError.
    """
    try:
        made = make()
    except TypeError as error:
        reason = log.last_error or " ".join(str(error).split())
        raise BackendError(f"{failure}: {reason}", "mtdp-doctor says what is missing.") from error
    if made is None:
        raise BackendError(f"{failure}: {log.last_error}", "mtdp-doctor says what is missing.")
    return made


def _network_flags(trt: Any) -> int:
    """TensorRT 11 knows strongly typed networks alone; 10 must be told, or it picks types of its own."""
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if typed is None else 1 << int(typed)


def _keep_timing_cache(config: Any, path: Path) -> tuple[str, ...]:
    try:
        save_with_digest(path, bytes(config.get_timing_cache().serialize()))
    except OSError as error:
        return (f"the timing cache is not kept: {path}: {error.strerror}",)
    return ()


def _parse(trt: Any, network: Any, onnx: Path, library: str, log: Log) -> None:
    parser = trt.OnnxParser(network, log.logger)
    apart = onnx.with_name(onnx.name + DATA_SUFFIX).exists()  # weights that no protocol buffer holds
    if parser.parse_from_file(str(onnx)) if apart else parser.parse(onnx.read_bytes()):
        return
    first = parser.get_error(0) if parser.num_errors else None
    where = f"node {first.node_name()} ({first.node_operator()}): " if first is not None and first.node_name() else ""
    reason = f"{where}{first.desc()}" if first is not None else log.last_error
    raise BackendError(
        f"{library} cannot read {onnx}: {' '.join(reason.split())}",
        "Export the model again; mtdp-extract --backend onnxruntime runs what this library does not.",
    )


def _check_input(trt: Any, network: Any, onnx: Path, tile_px: int, options: BuildOptions) -> None:
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    found = inputs.get(INPUT)
    shape = tuple(found.shape) if found is not None else ()
    if found is None or len(inputs) != 1 or found.dtype != trt.DataType.UINT8 or shape[1:] != (tile_px, tile_px, 3):
        raise BackendError(
            f"{onnx}: its input is {', '.join(f'{name} {tuple(i.shape)} {i.dtype.name}' for name, i in inputs.items())}"
            f"; {INPUT} uint8[batch, {tile_px}, {tile_px}, 3] is needed",
            "Export the model with mtdp-export.",
        )
    if shape[0] != -1 and {shape[0]} != set(options.batch):
        raise BackendError(
            f"{onnx}: its batch is fixed to {shape[0]}, batches of {options.batch[0]} to {options.batch[2]} are wanted",
            "Export the model with a dynamic batch, as mtdp-export does.",
        )


def _set_targets(trt: Any, config: Any, library: str, options: BuildOptions) -> None:
    if library == TENSORRT_RTX:
        # Memory comes from us alone: CUDA graphs cannot be captured otherwise.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        targets = [_capability(trt, text) for text in options.capabilities]
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            if not config.set_compute_capability(target, index):
                raise BackendError(f"{library} does not build for compute capability {options.capabilities[index]}")
        return
    levels = {
        "none": trt.HardwareCompatibilityLevel.NONE,
        "same-compute-capability": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
        "ampere-plus": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
    }
    config.hardware_compatibility_level = levels[options.hardware]
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)


def rtx_capabilities(trt: Any) -> list[str]:
    """Return the compute capabilities that the installed TensorRT-RTX compiles for: "7.5", "8.0", ..."""
    names = (name for name in trt.ComputeCapability.__members__ if name.startswith("SM"))
    return [f"{name[2:-1]}.{name[-1]}" for name in names]


def _capability(trt: Any, text: str) -> Any:
    members = trt.ComputeCapability.__members__
    target = members.get("CURRENT" if text == "current" else f"SM{text.replace('.', '')}")
    if target is None:
        raise BackendError(
            f"{TENSORRT_RTX} does not build for compute capability {text}",
            f"It builds for {', '.join(rtx_capabilities(trt))}.",
        )
    return target


def attach_timing_cache(config: Any, path: Path) -> tuple[str, ...]:
    """Give the builder its earlier measurements; a file that is damaged or another GPU's starts anew, with a note."""
    content, damage = read_with_digest(path)
    cache = config.create_timing_cache(content)
    if cache is not None and config.set_timing_cache(cache, False):
        return (f"timing cache {path}: {damage}; begun anew",) if damage else ()
    config.set_timing_cache(config.create_timing_cache(b""), False)
    return (f"timing cache {path}: not of this library or GPU; begun anew",)


def _hint(library: str, error: str) -> str:
    if "Turing" in error:
        return (
            "Turing GPUs (7.5) have no fp32 path here: leave --compute-capability 7.5 out, or build fp16 for it alone."
        )
    if "cudaError" in error or "CUDA" in error:
        return f"{library} needs an NVIDIA GPU and its driver for this; mtdp-doctor says what is missing."
    return "Try another --precision, or a smaller --batch."
