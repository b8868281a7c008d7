"""The CUDA side: one GPU with an engine loaded.

Three streams a GPU: tiles go in on one, the engine runs on the second, features come out on the third, so that the
copies of one batch run beside the inference of another. Events keep each slot's three steps in order. There is one
execution context: inference is serial on a GPU anyway, and a second one would double the activation memory.

What is relied on, and where it is said:

- A stream that waits for an event waits for what was recorded last (CUDA Runtime API, cudaStreamWaitEvent): each slot
  has events of its own, recorded anew for each batch, and a slot is queued again only after its `done` was waited for.
  So neither its pinned tiles nor its buffers on the GPU are written while a copy or a kernel of before may use them.
- A copy from memory that is not page-locked may be staged, and then blocks (CUDA Runtime API, "API synchronization
  behavior"): all that is copied is page-locked, and lives until the device has come to rest (`close`).
- The streams do not wait for the default stream (cudaStreamNonBlocking), on which others may work.
- A captured graph keeps addresses, shapes and the context's memory (TensorRT Developer Guide, "CUDA Graphs"). Each slot
  has a graph with its own addresses. Nothing of that changes afterwards: the batch is one, its last one is padded.
- A context may need work before it can be captured, so each slot runs once before it (same place).
- The first context of an engine takes its first profile (TensorRT Developer Guide, "Working with Dynamic Shapes"); our
  engines have one. The memory that the context needs is asked for after the shape is set, and given before it runs
  (IExecutionContext, updateDeviceMemorySizeForShapes, setDeviceMemory).
- Tensors and the context's memory must lie on multiples of 256 bytes (IExecutionContext, setTensorAddress): cudaMalloc
  gives no others, and nothing here points into the middle of what it gave.
- uint8 is a type of inputs alone, and is cast at once (TensorRT, DataType): the exported graph begins with that Cast.
  int64 occurs in its shapes only, which both libraries read as they are; no input or output has that type.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.backends.gpus import Gpu, call
from mtdp_runtime.backends.tensorrt.build import INPUT, started
from mtdp_runtime.backends.tensorrt.engine_source import SerializedEngine
from mtdp_runtime.backends.tensorrt.library import Log, says_out_of_memory
from mtdp_runtime.bundle.engine_key import TENSORRT_RTX
from mtdp_runtime.errors import BackendError, DeviceOutOfMemory, EngineRejected
from mtdp_runtime.files import read_with_digest, save_with_digest

_SLOTS: Final = 2


@dataclass(slots=True)
class _Slot:
    tiles: NDArray[np.uint8]  # page-locked
    results: dict[str, NDArray[np.float32]]  # page-locked
    device_tiles: int = 0  # address
    device_results: dict[str, int] = field(default_factory=dict)
    copied: Any = None  # events
    inferred: Any = None
    done: Any = None
    graph: Any = None


class CudaDevice:
    """A GPU with an engine: two slots, pinned buffers, and a CUDA graph a slot where the engine allows it."""

    slots = _SLOTS

    def __init__(
        self,
        library: str,
        gpu: Gpu,
        plan: SerializedEngine,
        *,
        batch: int,
        tile_px: int,
        kernels: Path | None,
        cudart: Any,
        trt: Any,
        left_out: Collection[str] = (),
    ) -> None:
        """Take the engine.

        Args:
            library: one of key.LIBRARIES.
            gpu: where.
            plan: the engine.
            batch: tiles in each batch.
            tile_px: side of a tile.
            kernels: TensorRT-RTX compiles kernels when it first runs; the file that keeps them.
            cudart: the CUDA runtime's bindings (`gpus.load_cudart`).
            trt: the library's module.
            left_out: outputs that stay on the GPU. One engine serves runs with and without them: to build another one
                takes minutes, to compute these is next to nothing beside the network, and to copy them is not.

        Raises:
            EngineRejected: the library does not take the engine, or it is not of this model.
            DeviceOutOfMemory: there is no room.
        """
        self.notes: list[str] = []
        self._library = library
        self._gpu = gpu
        self._kernels = kernels
        self._cudart = cudart
        self._trt = trt
        self._log = Log(trt)
        self._left_out = frozenset(left_out)
        self._frees = ExitStack()
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self._kernel_cache: Any = None
        self._in: Any = None  # streams
        self._compute: Any = None
        self._out: Any = None
        self._slots: list[_Slot] = []
        try:
            self._open(plan, batch, tile_px)
        except BaseException:
            self.close()
            raise

    def input(self, slot: int) -> NDArray[np.uint8]:
        return self._slots[slot].tiles

    def enqueue(self, slot: int) -> None:
        cudart, held = self._cudart, self._slots[slot]
        self._call(cudart.cudaSetDevice(self._gpu.index))
        kind = cudart.cudaMemcpyKind
        address = held.tiles.ctypes.data
        into = kind.cudaMemcpyHostToDevice
        self._call(cudart.cudaMemcpyAsync(held.device_tiles, address, held.tiles.nbytes, into, self._in))
        self._call(cudart.cudaEventRecord(held.copied, self._in))
        self._call(cudart.cudaStreamWaitEvent(self._compute, held.copied, 0))
        if held.graph is not None:
            self._call(cudart.cudaGraphLaunch(held.graph, self._compute))
        else:
            self._execute(held)
        self._call(cudart.cudaEventRecord(held.inferred, self._compute))
        self._call(cudart.cudaStreamWaitEvent(self._out, held.inferred, 0))
        for name, values in held.results.items():
            source, outof = held.device_results[name], kind.cudaMemcpyDeviceToHost
            self._call(cudart.cudaMemcpyAsync(values.ctypes.data, source, values.nbytes, outof, self._out))
        self._call(cudart.cudaEventRecord(held.done, self._out))

    def outputs(self, slot: int) -> Mapping[str, NDArray[np.float32]]:
        held = self._slots[slot]
        self._call(self._cudart.cudaSetDevice(self._gpu.index))
        self._call(self._cudart.cudaEventSynchronize(held.done))
        return held.results

    def close(self) -> None:
        # An error here would hide the one that brought us here; the memory goes with the process then.
        with suppress(BackendError):
            self._call(self._cudart.cudaSetDevice(self._gpu.index))
            self._call(self._cudart.cudaDeviceSynchronize())
            self._save_kernels()  # of a GPU that came to rest: after a fault nothing is kept
        self._slots = []
        # The context before the memory that it uses, the engine before the runtime that made it.
        self._context = self._kernel_cache = None
        self._frees.close()
        self._engine = None
        self._runtime = None

    def _open(self, plan: SerializedEngine, batch: int, tile_px: int) -> None:
        trt, cudart = self._trt, self._cudart
        self._call(cudart.cudaSetDevice(self._gpu.index))
        self._runtime = started(
            lambda: trt.Runtime(self._log.logger), f"{self._library} cannot start its runtime", self._log
        )
        if plan.host_code:
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(plan.engine)
        if self._engine is None:
            raise self._refused("deserialised")
        outputs = self._check_tensors()
        self._context = self._new_context()
        if self._context is None:
            raise self._refused("given a context")
        if not self._context.set_input_shape(INPUT, (batch, tile_px, tile_px, 3)):
            raise EngineRejected(f"it takes no batch of {batch} tiles of {tile_px} px")
        activations = self._context.update_device_memory_size_for_shapes()
        self._context.set_device_memory(self._malloc(max(activations, 1)), activations)
        self._in, self._compute, self._out = (self._stream() for _ in range(3))
        shapes = {name: tuple(self._context.get_tensor_shape(name)) for name in outputs}
        self._slots = [self._new_slot((batch, tile_px, tile_px, 3), shapes) for _ in range(_SLOTS)]
        self._capture_graphs()

    def _check_tensors(self) -> list[str]:
        trt, engine = self._trt, self._engine
        outputs = []
        for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            if engine.get_tensor_dtype(name) != (trt.DataType.UINT8 if is_input else trt.DataType.FLOAT):
                raise EngineRejected(f"its tensor {name} is {engine.get_tensor_dtype(name).name}")
            if is_input != (name == INPUT):
                raise EngineRejected(f"its input is called {name}" if is_input else f"{INPUT} is an output of it")
            if not is_input:
                outputs.append(name)
        return outputs

    def _new_context(self) -> Any:
        trt = self._trt
        ours = trt.ExecutionContextAllocationStrategy.USER_MANAGED  # a lack of memory then shows in our own cudaMalloc
        if self._library != TENSORRT_RTX:
            return self._engine.create_execution_context(ours)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(ours)
        # The batch never changes, so kernels are compiled for it before the first batch, and the graphs are ours.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        self._kernel_cache = config.create_runtime_cache()
        if self._kernels is not None:
            content, damage = read_with_digest(self._kernels)
            if damage or (content and not self._kernel_cache.deserialize(content)):
                self.notes.append(
                    f"kernels compiled anew: {self._kernels.name}: {damage or 'of another GPU or driver'}"
                )
        config.set_runtime_cache(self._kernel_cache)
        return self._engine.create_execution_context(config)

    def _new_slot(self, tiles: tuple[int, int, int, int], outputs: Mapping[str, tuple[int, ...]]) -> _Slot:
        wanted = {name: shape for name, shape in outputs.items() if name not in self._left_out}
        results = {name: self._pinned(shape, np.float32) for name, shape in wanted.items()}
        slot = _Slot(self._pinned(tiles, np.uint8), results)
        slot.device_tiles = self._malloc(slot.tiles.nbytes)
        sizes = {name: int(np.prod(shape)) * np.dtype(np.float32).itemsize for name, shape in outputs.items()}
        slot.device_results = {name: self._malloc(size_bytes) for name, size_bytes in sizes.items()}
        slot.copied, slot.inferred, slot.done = (self._event() for _ in range(3))
        return slot

    def _capture_graphs(self) -> None:
        """Run each slot once, as TensorRT asks before a capture and to find a lack of memory now; then record it."""
        cudart = self._cudart
        for slot in self._slots:
            self._execute(slot)
            self._call(cudart.cudaStreamSynchronize(self._compute))
        capturable = getattr(self._context, "is_stream_capturable", None)  # TensorRT-RTX has it
        if capturable is not None and not capturable(int(self._compute)):
            self.notes.append("no CUDA graphs: this engine cannot be captured")
            return
        try:
            for slot in self._slots:
                slot.graph = self._capture(slot)
        except DeviceOutOfMemory:
            raise
        except BackendError as error:
            for slot in self._slots:
                slot.graph = None
            self.notes.append(f"no CUDA graphs: {error}")

    def _capture(self, slot: _Slot) -> Any:
        cudart = self._cudart
        self._call(
            cudart.cudaStreamBeginCapture(self._compute, cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        )
        with ExitStack() as ended:
            try:
                self._execute(slot)
            finally:  # a stream that is left in capture can do nothing else
                answer = cudart.cudaStreamEndCapture(self._compute)
                if answer[0] == cudart.cudaError_t.cudaSuccess:
                    ended.callback(cudart.cudaGraphDestroy, answer[1])
            instance = self._call(cudart.cudaGraphInstantiate(self._call(answer), 0))
            self._frees.callback(cudart.cudaGraphExecDestroy, instance)
        return instance

    def _execute(self, slot: _Slot) -> None:
        addresses = {INPUT: slot.device_tiles, **slot.device_results}
        fine = all(self._context.set_tensor_address(name, address) for name, address in addresses.items())
        if not fine or not self._context.execute_async_v3(int(self._compute)):
            if says_out_of_memory(self._log.last_error):
                raise DeviceOutOfMemory(self._log.last_error, "Use a smaller --batch.")
            raise BackendError(f"{self._library}: {self._log.last_error or 'a batch was refused'}")

    def _refused(self, what: str) -> BackendError:
        error = self._log.last_error
        if says_out_of_memory(error):
            return DeviceOutOfMemory(error, "Use a smaller --batch.")
        return EngineRejected(f"it cannot be {what}: {error or 'the library does not say why'}")

    def _save_kernels(self) -> None:
        if self._kernels is None or self._kernel_cache is None or not self._slots:
            return
        kernels = self._kernel_cache.serialize()
        if kernels is not None:
            with suppress(OSError):  # the next run compiles again
                save_with_digest(self._kernels, bytes(kernels))

    def _call(self, answer: tuple[Any, ...]) -> Any:
        return call(self._cudart, answer)

    def _malloc(self, size_bytes: int) -> int:
        pointer = self._call(self._cudart.cudaMalloc(size_bytes))
        self._frees.callback(self._cudart.cudaFree, pointer)
        return int(pointer)

    def _pinned(self, shape: tuple[int, ...], dtype: type[Any]) -> NDArray[Any]:
        size_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        try:
            pointer = self._call(self._cudart.cudaHostAlloc(size_bytes, self._cudart.cudaHostAllocDefault))
        except DeviceOutOfMemory as error:
            raise DeviceOutOfMemory("the machine has too little memory to lock for copies", error.hint) from error
        self._frees.callback(self._cudart.cudaFreeHost, pointer)
        memory = (ctypes.c_uint8 * size_bytes).from_address(int(pointer))
        array: NDArray[Any] = np.ctypeslib.as_array(memory).view(dtype).reshape(shape)
        return array

    def _stream(self) -> Any:
        stream = self._call(self._cudart.cudaStreamCreateWithFlags(self._cudart.cudaStreamNonBlocking))
        self._frees.callback(self._cudart.cudaStreamDestroy, stream)
        return stream

    def _event(self) -> Any:
        flags = self._cudart.cudaEventDisableTiming | self._cudart.cudaEventBlockingSync
        event = self._call(self._cudart.cudaEventCreateWithFlags(flags))
        self._frees.callback(self._cudart.cudaEventDestroy, event)
        return event
