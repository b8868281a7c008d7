"""Which GPUs there are, and how a call to CUDA is judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from mtdp_runtime.errors import BackendError, BackendUnavailable, DeviceOutOfMemory

_BINDINGS: Final = "pip install 'mtdp[rtx]', or 'mtdp[gpu]' where TensorRT is wanted"
_DRIVER: Final = (
    "Install NVIDIA's driver (nvidia-smi shows whether it works); without such a GPU use --backend openvino."
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as CUDA counts them; CUDA_VISIBLE_DEVICES hides some."""

    index: int
    name: str
    capability: str  # "8.9"


def load_cudart() -> Any:
    """Import the CUDA runtime's bindings.

    Raises:
        BackendUnavailable: they are not installed.
    """
    try:
        from cuda.bindings import runtime as cudart
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendUnavailable(f"cuda-bindings is not installed ({error})", _BINDINGS) from error
    return cudart


def gpus() -> list[Gpu]:
    """Return the visible GPUs.

    Raises:
        BackendUnavailable: there is none, or no driver.
    """
    cudart = load_cudart()
    status, count = cudart.cudaGetDeviceCount()
    if status != cudart.cudaError_t.cudaSuccess or not count:
        name = status.name if status != cudart.cudaError_t.cudaSuccess else "CUDA counts none"
        raise BackendUnavailable(f"no NVIDIA GPU or driver ({name})", _DRIVER)
    found = []
    for index in range(count):
        properties = call(cudart, cudart.cudaGetDeviceProperties(index))
        name = properties.name.decode("utf-8", "replace").rstrip("\0")
        found.append(Gpu(index, name, f"{properties.major}.{properties.minor}"))
    return found


def select_gpu(index: int) -> None:
    """Make a GPU this thread's own."""
    cudart = load_cudart()
    call(cudart, cudart.cudaSetDevice(index))


def call(cudart: Any, answer: tuple[Any, ...]) -> Any:
    """Return what a CUDA call gave: nothing, a value or a tuple.

    Raises:
        DeviceOutOfMemory: the GPU has no memory left.
        BackendError: anything else went wrong.
    """
    status, *values = answer
    if status == cudart.cudaError_t.cudaErrorMemoryAllocation:
        raise DeviceOutOfMemory("the GPU has too little memory free", "Use a smaller --batch.")
    if status != cudart.cudaError_t.cudaSuccess:
        raise BackendError(f"CUDA: {status.name}", "Run mtdp-doctor; a GPU in a broken state needs a new process.")
    return values[0] if len(values) == 1 else tuple(values)
