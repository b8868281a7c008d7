"""CUDA and TensorRT acted out in host memory, as late as their rules allow.

Work on a stream is only queued. It is done when something waits for it, and then only what that wait is ordered after:
a missing event shows as a wrong number, a buffer that is used too early, too. Memory that is not given back is counted.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

Work = Callable[[], None]


class Status(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


class Kind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class Stream(int):
    """A handle; its queue is the fake's."""


class Event:
    def __init__(self) -> None:
        self.marks: list[tuple[Stream, int]] = []  # where it was last recorded: stream, and how much of it precedes


class FakeCudart:
    """The calls that the runtime makes, under their own names."""

    cudaError_t = Status
    cudaMemcpyKind = Kind
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaStreamNonBlocking = 1
    cudaEventDisableTiming = 2
    cudaEventBlockingSync = 1
    cudaHostAllocDefault = 0

    def __init__(self, room_bytes: int = 1 << 30, capture_fails: bool = False) -> None:
        self.room_bytes = room_bytes
        self.capture_fails = capture_fails
        self.memory: dict[int, Any] = {}
        self.held: set[object] = set()  # streams, events and graphs that exist
        self.queues: dict[Stream, list[Work]] = {}
        self.done: dict[Stream, int] = {}
        self.capturing: list[Work] | None = None
        self.launches = 0
        self.last_error = Status.cudaSuccess
        self.devices = 1
        self.faulted = False  # a kernel of before did what it may not: from then on every call says so

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not name.startswith("cuda") or not inspect.ismethod(found) or name == "cudaGetLastError":
            return found

        def called(*given: Any) -> tuple[Any, ...]:
            answer = found(*given)
            if self.faulted:
                answer = (Status.cudaErrorIllegalAddress, None)
            if answer[0] != Status.cudaSuccess:
                self.last_error = answer[0]
            return answer  # type: ignore[no-any-return]

        return called

    # memory
    def cudaMalloc(self, size: int) -> tuple[Status, int | None]:
        if sum(len(block) for block in self.memory.values()) + size > self.room_bytes:
            return Status.cudaErrorMemoryAllocation, None
        block = (ctypes.c_uint8 * max(size, 1))()
        address = ctypes.addressof(block)
        self.memory[address] = block
        return Status.cudaSuccess, address

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Status, int | None]:
        return self.cudaMalloc(size)

    def cudaFree(self, address: int) -> tuple[Status]:
        del self.memory[address]
        return (Status.cudaSuccess,)

    cudaFreeHost = cudaFree

    # streams, events, graphs
    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Status, Stream]:
        stream = Stream(len(self.queues) + 1)
        self.queues[stream], self.done[stream] = [], 0
        self.held.add(stream)
        return Status.cudaSuccess, stream

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Status, Event]:
        event = Event()
        self.held.add(event)
        return Status.cudaSuccess, event

    def _release(self, thing: object) -> tuple[Status]:
        self.held.remove(thing)
        return (Status.cudaSuccess,)

    cudaStreamDestroy = cudaEventDestroy = cudaGraphExecDestroy = _release

    def cudaGraphDestroy(self, graph: list[Work]) -> tuple[Status]:
        self.held.remove(id(graph))
        return (Status.cudaSuccess,)

    def queue(self, stream: int, work: Work) -> None:
        if self.capturing is not None:
            self.capturing.append(work)
        else:
            self.queues[Stream(stream)].append(work)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Kind, stream: Stream) -> tuple[Status]:
        self.queue(stream, lambda: ctypes.memmove(target, source, size) and None)
        return (Status.cudaSuccess,)

    def cudaEventRecord(self, event: Event, stream: Stream) -> tuple[Status]:
        event.marks = [(stream, len(self.queues[stream]))]
        return (Status.cudaSuccess,)

    def cudaStreamWaitEvent(self, stream: Stream, event: Event, flags: int) -> tuple[Status]:
        marks = list(event.marks)
        self.queue(stream, lambda: self._reach(marks))
        return (Status.cudaSuccess,)

    def _reach(self, marks: list[tuple[Stream, int]]) -> None:
        for stream, count in marks:
            while self.done[stream] < count:
                work = self.queues[stream][self.done[stream]]
                self.done[stream] += 1
                work()

    def cudaEventSynchronize(self, event: Event) -> tuple[Status]:
        self._reach(event.marks)
        return (Status.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: Stream) -> tuple[Status]:
        self._reach([(stream, len(self.queues[stream]))])
        return (Status.cudaSuccess,)

    def cudaDeviceSynchronize(self) -> tuple[Status]:
        for stream in self.queues:
            self.cudaStreamSynchronize(stream)
        return (Status.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: Stream, mode: int) -> tuple[Status]:
        self.capturing = []
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: Stream) -> tuple[Status, list[Work] | None]:
        captured, self.capturing = self.capturing, None
        if self.capture_fails:
            return Status.cudaErrorStreamCaptureUnsupported, None
        self.held.add(id(captured))
        return Status.cudaSuccess, captured

    def cudaGraphInstantiate(self, graph: list[Work], flags: int) -> tuple[Status, tuple[Work, ...]]:
        instance = tuple(graph)
        self.held.add(instance)
        return Status.cudaSuccess, instance

    def cudaGraphLaunch(self, graph: tuple[Work, ...], stream: Stream) -> tuple[Status]:
        self.launches += 1
        for work in graph:
            self.queue(stream, work)
        return (Status.cudaSuccess,)

    # the device
    def cudaGetDeviceCount(self) -> tuple[Status, int]:
        return Status.cudaSuccess, self.devices

    def cudaGetDeviceProperties(self, index: int) -> tuple[Status, Any]:
        return Status.cudaSuccess, SimpleNamespace(name=b"GPU acted out in host memory\0\0", major=8, minor=9)

    def cudaMemGetInfo(self) -> tuple[Status, int, int]:
        used = sum(len(block) for block in self.memory.values())
        return Status.cudaSuccess, self.room_bytes - used, self.room_bytes

    def cudaSetDevice(self, index: int) -> tuple[Status]:
        return (Status.cudaSuccess,)

    def cudaDriverGetVersion(self) -> tuple[Status, int]:
        return Status.cudaSuccess, 13000

    def cudaRuntimeGetVersion(self) -> tuple[Status, int]:
        return Status.cudaSuccess, 13000

    def cudaGetLastError(self) -> tuple[Status]:
        last, self.last_error = self.last_error, Status.cudaSuccess
        return (last,)


class FakeTrt:
    """A library that takes engines which begin with `good`: features are a tile's first pixel and its sum."""

    ILogger = type("ILogger", (), {})
    TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
    DataType = SimpleNamespace(UINT8=SimpleNamespace(name="UINT8"), FLOAT=SimpleNamespace(name="FLOAT"))
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="ours")
    CudaGraphStrategy = SimpleNamespace(DISABLED="off")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")

    def __init__(self, cudart: FakeCudart, activations_bytes: int = 1000) -> None:
        self.cudart = cudart
        self.activations_bytes = activations_bytes
        self.kernels_of_this_gpu: bytes | None = b"kernels"

    def Runtime(self, logger: Any) -> Any:
        def deserialize(plan: bytes) -> Any:
            if plan.startswith(b"good"):
                return FakeEngine(self)
            logger.log(SimpleNamespace(value=1), "magic tag\n  does not match")
            return None

        return SimpleNamespace(deserialize_cuda_engine=deserialize)

    @staticmethod
    def Runtime_without_cuda(logger: Any) -> Any:
        """As the bindings behave where CUDA does not start."""
        logger.log(SimpleNamespace(value=1), "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")


class FakeEngine:
    num_io_tensors = 2

    def __init__(self, trt: FakeTrt) -> None:
        self.trt = trt

    def get_tensor_name(self, index: int) -> str:
        return ("tiles", "features")[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name == "tiles" else "out"

    def get_tensor_dtype(self, name: str) -> Any:
        return self.trt.DataType.UINT8 if name == "tiles" else self.trt.DataType.FLOAT

    def create_runtime_config(self) -> Any:
        def deserialize(content: bytes) -> bool:
            return content == self.trt.kernels_of_this_gpu

        cache = SimpleNamespace(deserialize=deserialize, serialize=lambda: self.trt.kernels_of_this_gpu)
        return SimpleNamespace(
            set_execution_context_allocation_strategy=lambda strategy: None,
            create_runtime_cache=lambda: cache,
            set_runtime_cache=lambda given: given is cache,
        )

    def create_execution_context(self, config: Any) -> FakeContext:
        return FakeContext(self.trt)


class FakeContext:
    def __init__(self, trt: FakeTrt) -> None:
        self.trt = trt
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}
        self.memory = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return shape[0] <= 64

    def update_device_memory_size_for_shapes(self) -> int:
        return self.trt.activations_bytes * self.shape[0]

    def set_device_memory(self, address: int, size: int) -> None:
        assert len(self.trt.cudart.memory[address]) >= size
        self.memory = address

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape if name == "tiles" else (self.shape[0], 2)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return True

    def execute_async_v3(self, stream: int) -> bool:
        shape, source, target = self.shape, self.addresses["tiles"], self.addresses["features"]
        memory = self.trt.cudart.memory

        def infer() -> None:
            assert self.memory in memory, "inference without activation memory"
            tiles = np.ctypeslib.as_array(memory[source]).reshape(shape)
            sums = tiles.reshape(shape[0], -1).sum(axis=1)
            features = np.stack([tiles[:, 0, 0, 0], sums], axis=1).astype(np.float32)
            ctypes.memmove(target, features.ctypes.data, features.nbytes)

        self.trt.cudart.queue(stream, infer)
        return True
