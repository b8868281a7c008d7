"""Which GPUs there are, and how a call to CUDA is judged.

What is relied on, and where it is said (CUDA Runtime API, "Error Handling", "Device Management"; MIG User Guide):

- An error of an earlier kernel or copy comes out of any later call. After such a fault (an illegal address, a failed
  launch) every call of the process fails: nothing is tried again, the run ends, and a new process resumes it.
- A want of memory is no such fault: the process goes on. But the runtime keeps it as the thread's last error until it
  is asked for, so it is asked for (`call`), and a kernel launched later is not blamed.
- A process sees one instance of a GPU that is cut by MIG, whose name tells its size: it counts as another type of GPU,
  and an engine that was tuned on the whole one is not taken (`bundle.engine_key`). CUDA_VISIBLE_DEVICES chooses it.
- CUDA does not survive a fork: the runtime's workers are forked before anything here is imported (`cohort.watchdog`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from mtdp_runtime.errors import BackendError, BackendUnavailable, DeviceOutOfMemory

_BINDINGS: Final = "pip install 'mtdp[rtx]', or 'mtdp[gpu]' where TensorRT is wanted"
_DRIVER: Final = (
    "Install NVIDIA's driver (nvidia-smi shows whether it works); without such a GPU use --backend openvino."
)
_OLD_DRIVER: Final = (
    "Update NVIDIA's driver (580 and later serve CUDA 13; nvidia-smi shows yours), or use --backend openvino."
)
# CUDA 13 has no kernels for GPUs before Turing (its release notes, "Deprecated or Dropped Features").
TOO_OLD: Final = (
    "CUDA 13 begins at compute capability 7.5: use --backend openvino, or onnxruntime-cuda with an onnxruntime-gpu for "
    "CUDA 12."
)
_HIDDEN: Final = (
    "nvidia-smi -L lists what there is: CUDA_VISIBLE_DEVICES may hide it, or MIG is on and has no instance. "
    "Without a GPU use --backend openvino."
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
        raise _no_gpu(cudart, status)
    found = []
    for index in range(count):
        properties = call(cudart, cudart.cudaGetDeviceProperties(index))
        name = properties.name.decode("utf-8", "replace").rstrip("\0")
        found.append(Gpu(index, name, f"{properties.major}.{properties.minor}"))
    return found


def _no_gpu(cudart: Any, status: Any) -> BackendUnavailable:
    """Say why CUDA counts no GPU. A driver's version is 0 where there is none."""
    errors = cudart.cudaError_t
    driver, needed = cudart.cudaDriverGetVersion()[1] or 0, cudart.cudaRuntimeGetVersion()[1] or 0
    if status == errors.cudaErrorInsufficientDriver and driver:
        versions = f"it serves CUDA {_shown(driver)}, this is built for CUDA {_shown(needed)}"
        old = f"NVIDIA's driver is too old: {versions}"
        return BackendUnavailable(old, _OLD_DRIVER)
    hidden = status in (errors.cudaErrorNoDevice, errors.cudaSuccess)
    name = status.name if status != errors.cudaSuccess else "CUDA counts none"
    return BackendUnavailable(f"no NVIDIA GPU or driver ({name})", _HIDDEN if hidden and driver else _DRIVER)


def _shown(version: int) -> str:
    """Return CUDA's number for a version as people write it.

    >>> _shown(12040)
    '12.4'
    """
    return f"{version // 1000}.{version % 1000 // 10}"


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
    if status != cudart.cudaError_t.cudaSuccess:
        cudart.cudaGetLastError()  # it would be found again by whoever launches the next kernel
    if status == cudart.cudaError_t.cudaErrorMemoryAllocation:
        raise DeviceOutOfMemory("the GPU has too little memory free", "Use a smaller --batch.")
    if status != cudart.cudaError_t.cudaSuccess:
        raise BackendError(f"CUDA: {status.name}", "Run mtdp-doctor; a GPU in a broken state needs a new process.")
    return values[0] if len(values) == 1 else tuple(values)
