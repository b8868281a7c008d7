"""ONNX Runtime on the CPU: the reference that every other engine is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.backends import Probe
from mtdp_runtime.bundle import Bundle
from mtdp_runtime.errors import BackendError, UsageError

_HINT: Final = "pip install 'mtdp[cpu]'"
_INPUT: Final = "tiles"
# It has no bf16 convolution; fp16 files are computed in fp32.
_PRECISIONS: Final = ("fp32", "fp16", "int8")


class OnnxRuntime:
    """A session; a thread of its own runs the batches, since `run` blocks."""

    def __init__(self, session: Any, name: str, precision: str, batch: int) -> None:
        self.name = name
        self.precision = precision
        self.note = "ONNX Runtime's CPU provider computes an fp16 file in fp32" if precision == "fp16" else ""
        self.batch = batch
        self.depth = 2
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="onnxruntime")
        self._running: dict[int, Future[list[NDArray[np.float32]]]] = {}
        self._submitted = 0

    @classmethod
    def probe(cls) -> Probe:
        try:
            import onnxruntime
        except ImportError as error:
            return Probe("onnxruntime", False, f"not installed ({error})", _HINT)
        return Probe(
            "onnxruntime", True, f"ONNX Runtime {onnxruntime.__version__} on the CPU, fp32", precisions=_PRECISIONS
        )

    @classmethod
    def load(cls, bundle: Bundle, precision: str, batch: int, threads: int) -> Self:
        import onnxruntime

        chosen = "fp32" if precision == "auto" else precision
        if chosen not in _PRECISIONS:
            raise UsageError(
                f"--precision {precision}: ONNX Runtime on a CPU runs {', '.join(_PRECISIONS)}",
                hint="Use --precision fp32.",
            )
        file = bundle.checked(bundle.variant(chosen).file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors share no base class of their own
            raise BackendError(f"ONNX Runtime refuses {file}: {error}", "Try --backend openvino.") from error
        return cls(session, f"onnxruntime {onnxruntime.__version__}", chosen, batch)

    def submit(self, tiles: NDArray[np.uint8]) -> int:
        ticket = self._submitted
        self._running[ticket] = self._worker.submit(self._session.run, None, {_INPUT: tiles})
        self._submitted += 1
        return ticket

    def result(self, ticket: int) -> Mapping[str, NDArray[np.float32]]:
        try:
            values = self._running.pop(ticket).result()
        except Exception as error:  # its errors share no base class of their own
            raise BackendError(f"{self.name} failed on a batch: {error}") from error
        return dict(zip(self._outputs, values, strict=True))

    def close(self) -> None:
        self._worker.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
