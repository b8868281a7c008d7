"""ONNX Runtime: on the CPU the reference for every other engine; on NVIDIA GPUs through its CUDA or TensorRT provider.

ONNX Runtime falls back to its CPU provider with no more than a warning. Here it may not: each session names its
providers, forbids the CPU for any node, and is asked afterwards what it runs on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import redirect_stdout
from importlib import metadata
from typing import Any, ClassVar, Final, Self

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.backends import Probe, auto_batch, check_outputs, first_that_loads, lacking, variant_precisions
from mtdp_runtime.bundle import Bundle
from mtdp_runtime.errors import BackendError, BackendUnavailable, DeviceOutOfMemory, UsageError

_HINT: Final = "pip install 'mtdp[cpu]'"
_GPU_HINT: Final = "pip uninstall onnxruntime onnxruntime-gpu, pip install 'mtdp[gpu]'"
_INPUT: Final = "tiles"
# It has no bf16 convolution; fp16 files are computed in fp32.
_PRECISIONS: Final = ("fp32", "fp16", "int8")
# fp32 means fp32. By default cuDNN's algorithms are timed at each start and the fastest is taken: a run that goes on
# would take others, and round otherwise. The heuristic knows no clock (ONNX Runtime, "CUDA Execution Provider").
_CUDA: Final = ("CUDAExecutionProvider", {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"})
# With onnxruntime or onnxruntime-gpu uninstalled beside the other, an empty module stays: it has no attributes.
_NOT_THERE: Final = (ImportError, AttributeError, OSError)


class OnnxRuntime:
    """A session; a thread of its own runs the batches, since `run` blocks."""

    on_cores: ClassVar[bool] = True

    def __init__(
        self, session: Any, name: str, batch: int, precision: str = "fp32", left_out: Sequence[str] = ()
    ) -> None:
        self.name = name
        self.precision = precision
        self.note = ""
        self.batch = batch
        self.depth = 2
        self._session = session
        self._outputs = [output.name for output in session.get_outputs() if output.name not in left_out]
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="onnxruntime")
        self._running: dict[int, Future[list[NDArray[np.float32]]]] = {}
        self._submitted = 0

    @classmethod
    def probe(cls) -> Probe:
        try:
            import onnxruntime

            version = onnxruntime.__version__
        except _NOT_THERE as error:
            return Probe("onnxruntime", False, f"not installed ({error})", _HINT)
        return Probe("onnxruntime", True, f"ONNX Runtime {version} on the CPU, fp32", precisions=_PRECISIONS)

    @classmethod
    def auto_batch(cls, threads: int) -> int:
        return auto_batch(threads)

    @classmethod
    def load(cls, bundle: Bundle, precision: str, batch: int, threads: int) -> Self:
        import onnxruntime

        chosen = variant_precisions(bundle, precision, cls.probe())[0] if precision == "auto" else precision
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
        check_outputs(bundle, [output.name for output in session.get_outputs()])
        engine = cls(session, f"onnxruntime {onnxruntime.__version__}", batch, chosen, bundle.left_out)
        engine.note = "ONNX Runtime's CPU provider computes an fp16 file in fp32" if chosen == "fp16" else ""
        return engine

    def submit(self, tiles: NDArray[np.uint8]) -> int:
        ticket = self._submitted
        self._running[ticket] = self._worker.submit(self._session.run, self._outputs, {_INPUT: tiles})
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
        self._session = None  # gives its memory back

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class OnnxRuntimeCuda(OnnxRuntime):
    """ONNX Runtime's CUDA provider on the first visible GPU."""

    on_cores: ClassVar[bool] = False
    rung: ClassVar[str] = "onnxruntime-cuda"
    providers: ClassVar[tuple[tuple[str, dict[str, str]], ...]] = (_CUDA,)

    @classmethod
    def probe(cls) -> Probe:
        from mtdp_runtime.backends.gpus import gpus

        missing = []
        if not _installed("onnxruntime-gpu"):
            replaced = "pip uninstall onnxruntime, " if _installed("onnxruntime") else ""
            missing.append(("onnxruntime-gpu is not installed", f"{replaced}pip install 'mtdp[gpu]'"))
        try:
            gpu = gpus()[0]
        except BackendError as error:  # a GPU in a broken state counts as none
            missing.append((str(error), error.hint))
        if missing:
            return lacking(cls.rung, missing)
        wanted = cls.providers[0][0]
        try:
            import onnxruntime

            version, there = onnxruntime.__version__, wanted in onnxruntime.get_available_providers()
        except _NOT_THERE as error:
            return Probe(cls.rung, False, f"onnxruntime-gpu cannot be loaded ({error})", _GPU_HINT)
        if not there:
            return Probe(cls.rung, False, f"ONNX Runtime {version} is installed without its {wanted}", _GPU_HINT)
        reason = f"ONNX Runtime {version}, {wanted}, on {gpu.name}"
        # No int8: it would run in fp32 on CUDA, and TensorRT refuses its zero points (see backends.tensorrt).
        return Probe(cls.rung, True, reason, precisions=("fp16", "fp32"))

    @classmethod
    def auto_batch(cls, threads: int) -> int:
        return 64

    @classmethod
    def load(cls, bundle: Bundle, precision: str, batch: int, threads: int) -> Self:
        probe = cls.probe()
        if not probe.usable:
            raise BackendUnavailable(f"backend {cls.rung} is not usable here: {probe.reason}", probe.hint)
        tried = variant_precisions(bundle, precision, probe)
        return first_that_loads(tried, lambda one: cls._with_room(bundle, one, batch))

    @classmethod
    def _with_room(cls, bundle: Bundle, chosen: str, batch: int) -> Self:
        """Load at one precision, with as large a batch as the GPU has memory for: the proof runs one."""
        from mtdp_runtime.backends.tensorrt.slots import with_room

        engine, _, halved = with_room(lambda size: cls._load_at(bundle, chosen, size), batch)
        engine.note = halved
        return engine

    def result(self, ticket: int) -> Mapping[str, NDArray[np.float32]]:
        from mtdp_runtime.backends.gpus import TOO_OLD
        from mtdp_runtime.backends.tensorrt.library import says_out_of_memory

        try:
            return super().result(ticket)
        except BackendError as error:
            text = " ".join(str(error).split())
            if says_out_of_memory(text):
                raise DeviceOutOfMemory(text, "Use a smaller --batch.") from error
            raise BackendError(text, TOO_OLD if "no kernel image" in text else error.hint) from error

    @classmethod
    def _load_at(cls, bundle: Bundle, chosen: str, batch: int) -> Self:
        """Load at one precision and prove it."""
        import onnxruntime

        from mtdp_runtime.backends.proof import lacks, replay

        file = bundle.checked(bundle.variant(chosen).file)
        with redirect_stdout(sys.stderr):  # it prints what it does not find, and stdout may be JSON
            onnxruntime.preload_dlls()  # CUDA and cuDNN of the Python packages
        session = strict_session(file, cls.providers)
        engine = cls(session, f"{cls.rung} {onnxruntime.__version__}", batch, chosen, bundle.left_out)
        try:
            shortfall = lacks(replay(engine, bundle), bundle, chosen)
            if shortfall:
                raise BackendError(
                    f"{engine.name} does not compute this model: it {shortfall} ({chosen})",
                    "Use another --precision or --backend.",
                )
        except BaseException:
            engine.close()
            raise
        return engine


class OnnxRuntimeTensorRT(OnnxRuntimeCuda):
    """ONNX Runtime's TensorRT provider; what TensorRT does not take runs on CUDA. It builds at each start."""

    rung: ClassVar[str] = "onnxruntime-tensorrt"
    providers: ClassVar[tuple[tuple[str, dict[str, str]], ...]] = (
        ("TensorrtExecutionProvider", {}),
        _CUDA,
    )

    @classmethod
    def _load_at(cls, bundle: Bundle, chosen: str, batch: int) -> Self:
        # This provider has no option for it, and TensorRT's own default rounds fp32 products to TF32 from Ampere on.
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
        return super()._load_at(bundle, chosen, batch)


def _installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def strict_session(file: Any, providers: tuple[tuple[str, dict[str, str]], ...]) -> Any:
    """Open a session that runs on these providers alone, or not at all.

    Raises:
        BackendError: it would run on others, or refuses the model.
    """
    import onnxruntime

    names = [name for name, _ in providers]
    missing = [name for name in names if name not in onnxruntime.get_available_providers()]
    if missing:
        raise BackendUnavailable(f"ONNX Runtime is installed without its {', '.join(missing)}", _GPU_HINT)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.use_deterministic_compute = True
    if "CPUExecutionProvider" not in names:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = onnxruntime.InferenceSession(file, options, providers=list(providers))
        session.disable_fallback()
    except Exception as error:  # its errors share no base class of their own
        raise BackendError(
            f"ONNX Runtime cannot run {file} on {', '.join(names)}: {' '.join(str(error).split())}",
            "mtdp-doctor says what is missing; CUDA and cuDNN must be those that this onnxruntime-gpu was built for.",
        ) from error
    got = session.get_providers()
    if got[: len(names)] != names:
        raise BackendError(
            f"ONNX Runtime chose {', '.join(got)} for {file}, not {', '.join(names)}",
            "CUDA and cuDNN must be those that this onnxruntime-gpu was built for.",
        )
    return session
