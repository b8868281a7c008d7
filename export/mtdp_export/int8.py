"""The int8 variant: NNCF places Q/DQ pairs by what tissue tiles show; it ships only where it is faster and as good.

By NNCF. On a ResNet-50 of random weights ONNX Runtime's own quantiser was as near to fp32, and its graphs as fast
(benchmarks/int8.py).
"""

from __future__ import annotations

import contextlib
import io
import logging
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from mtdp_export.attention import attention
from mtdp_export.errors import ExportError
from mtdp_export.model_store import LARGEST_INSIDE, load_light, size_bytes
from mtdp_export.typed import KERNELS, low_types
from mtdp_runtime.backends import Backend, backend_class, probe_all
from mtdp_runtime.backends.telemetry import forbid_reports
from mtdp_runtime.bundle import Bundle, load_bundle
from mtdp_runtime.bundle.golden import FEATURES, load_golden
from mtdp_runtime.bundle.manifest import PRECISIONS
from mtdp_runtime.errors import BackendError, UsageError
from mtdp_runtime.machine import usable_cores

if TYPE_CHECKING:
    from mtdp.tasks import Task

CALIBRATION_TILES: Final = 64
LARGEST_PROBE_LOSS: Final = 0.005
# What part of a channel's size goes from the activations into the weights: SmoothQuant's alpha. NNCF's 0.95 binds a
# transformer to the tissue that calibrated it: on another organ a real ViT-S/14 is far off with it (test_transformers).
_SMOOTHING: Final = 0.5
_BATCH: Final = 8
_ROUNDS: Final = 7


@dataclass(frozen=True, slots=True)
class Speed:
    """A short paired timing: every engine takes each batch in turn."""

    engine: str
    batch_s: float
    other: str  # the best of the other precisions
    other_batch_s: float
    times_as_fast: float  # the median of the pairs

    def __str__(self) -> str:
        return (
            f"int8 on {self.engine}: {self.batch_s * 1e3:.0f} ms a batch of {_BATCH}; the best other, {self.other}: "
            f"{self.other_batch_s * 1e3:.0f} ms; {self.times_as_fast:.2f} times as fast (a short timing, "
            f"{_ROUNDS} pairs)"
        )


@dataclass(frozen=True, slots=True)
class Probe:
    """The same linear probe on the features of both."""

    task: str
    metric: str
    test_images: int
    int8: float
    fp32: float

    def __str__(self) -> str:
        return (
            f"probe on {self.task}, {self.test_images} test images, {self.metric}: int8 {self.int8:.4f}, "
            f"fp32 {self.fp32:.4f}"
        )


def write_int8(model_file: Path, out: Path, tiles: NDArray[np.uint8]) -> None:
    """Quantise an fp32 graph: kernels in int8, normalisation of the pixels and heads in fp32.

    Args:
        model_file: the fp32 graph.
        out: file to write.
        tiles: uint8[N, P, P, 3] of tissue.

    Raises:
        ExportError: NNCF is not installed, or cannot quantise this graph.
    """
    from mtdp_export.graph import without_traces

    nncf = _nncf()
    if size_bytes(load_light(model_file)) > LARGEST_INSIDE:
        raise ExportError("int8: NNCF takes no graph of more than 2 GB", "Leave --precision int8 out.")
    model = onnx.load(model_file)
    rows = [tiles[i : i + 1] for i in range(len(tiles))]
    name = model.graph.input[0].name
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
            quantised = nncf.quantize(
                model,
                nncf.Dataset(rows, lambda row: {name: row}),
                preset=nncf.QuantizationPreset.MIXED,
                **_of_transformers(nncf) if attention(model).mixes else {},
                target_device=nncf.TargetDevice.CPU,
                subset_size=len(rows),
                ignored_scope=nncf.IgnoredScope(names=kept_wide(model), validate=False),
            )
    except Exception as error:  # its errors share no base class of their own
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ExportError(f"int8: NNCF cannot quantise this graph: {reason}", "Leave --precision int8 out.") from error
    without_traces(quantised)
    onnx.checker.check_model(quantised, full_check=True)
    out.write_bytes(quantised.SerializeToString(deterministic=True))


def _of_transformers(nncf: Any) -> dict[str, Any]:
    """Attention is quantised otherwise than convolutions: without it a real ViT-S/14 keeps a cosine of 0.94."""
    from nncf.quantization.advanced_parameters import AdvancedSmoothQuantParameters

    smoothing = AdvancedSmoothQuantParameters(matmul=_SMOOTHING)
    return {
        "model_type": nncf.ModelType.TRANSFORMER,
        "advanced_parameters": nncf.AdvancedQuantizationParameters(smooth_quant_alphas=smoothing),
    }


def kept_wide(model: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes that stay in fp32: normalisation of the pixels, and heads."""
    types = low_types(model, "fp16", ())
    wide = KERNELS | {"Add", "Cast", "Div", "Mul", "Sub", "Transpose"}
    return [n.name for n in model.graph.node if types[n.name] == "fp32" and n.op_type in wide]


def time_int8(path: Path) -> Speed:
    """Time int8 against every other precision of a bundle, on every engine here that takes it.

    Int8 is a variant for CPUs: a GPU beside them, which does not run it, says nothing of what it is worth there.

    Raises:
        ExportError: no engine here runs int8, or none runs anything else.
    """
    bundle = load_bundle(path)
    tiles, _ = load_golden(path / bundle.manifest.golden.file)
    batch = np.ascontiguousarray(np.resize(tiles, (_BATCH, *tiles.shape[1:])))
    with ExitStack() as loaded:
        engines: dict[tuple[str, str], Backend] = {}
        for probe in (probe for probe in probe_all() if "int8" in probe.precisions):
            for precision in PRECISIONS:
                if precision in probe.precisions and (bundle.holds(precision) or precision in probe.converts):
                    with contextlib.suppress(BackendError, UsageError):  # its refusal is a row of the parity check
                        engine = backend_class(probe.name).load(bundle, precision, _BATCH, _threads())
                        engines[probe.name, precision] = loaded.enter_context(engine)
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in engines}
        for _ in range(_ROUNDS + 1):
            for key, engine in engines.items():
                start = time.perf_counter()
                engine.result(engine.submit(batch))
                seconds[key].append(time.perf_counter() - start)
    medians = {key: statistics.median(times[1:]) for key, times in seconds.items()}  # the first one warms up
    ours = min((key for key in medians if key[1] == "int8"), key=medians.__getitem__, default=None)
    if ours is None:
        raise ExportError("int8: no engine here runs it", "pip install 'mtdp[cpu]'")
    other = min((key for key in medians if key[1] != "int8"), key=medians.__getitem__, default=None)
    if other is None:
        raise ExportError("int8: no engine here runs another precision to time it against", "mtdp-doctor shows why.")
    pairs = [theirs / mine for mine, theirs in zip(seconds[ours][1:], seconds[other][1:], strict=True)]
    return Speed(ours[0], medians[ours], f"{other[1]} on {other[0]}", medians[other], statistics.median(pairs))


def load_probe_task(path: Path) -> Task:
    """Load the task that judges int8.

    Raises:
        MtdpError: it cannot be used, or has no test split.
    """
    from mtdp.errors import TaskError
    from mtdp.tasks import load_task

    task = load_task(path)
    if not task.of(("test",)):
        raise TaskError(f"{path} has no test split", "a probe is scored on images that were not used for fitting")
    return task


def probe_int8(path: Path, engine: str, task_path: Path) -> Probe:
    """Fit and score the same probe on a real task, with the features of int8 and of fp32, from one engine.

    Raises:
        MtdpError: the task cannot be used.
    """
    from mtdp.transfer import judge_features

    task = load_probe_task(task_path)
    samples = task.of(("train", "val", "test"))
    bundle = load_bundle(path)
    scores = {}
    for precision in ("int8", "fp32"):
        features = _features(bundle, engine, precision, samples)
        scores[precision] = judge_features(features, task, precision).score
    return Probe(task.name, task.metric, len(task.of(("test",))), scores["int8"], scores["fp32"])


def _features(bundle: Bundle, engine: str, precision: str, samples: Any) -> NDArray[np.float32]:
    from mtdp.augment import evaluation_view
    from mtdp.images import ImageCache
    from mtdp.sampling import in_order

    manifest = bundle.manifest
    features = np.empty((len(samples), manifest.features_dim), np.float32)
    cache = ImageCache(manifest.tile_px, 0, manifest.interpolation)
    row = 0
    with backend_class(engine).load(bundle, precision, _BATCH, _threads()) as backend:
        for images in in_order(samples, cache, evaluation_view, _BATCH):
            batch = np.zeros((_BATCH, manifest.tile_px, manifest.tile_px, 3), np.uint8)
            batch[: len(images)] = images.numpy()
            features[row : row + len(images)] = backend.result(backend.submit(batch))[FEATURES][: len(images)]
            row += len(images)
    return features


def _nncf() -> Any:
    forbid_reports()  # NNCF, too, would report each use to its maker
    try:
        import nncf
    except ImportError as error:
        raise ExportError("int8: NNCF is not installed", "pip install 'mtdp[export]'") from error
    nncf.set_log_level(logging.ERROR)
    return nncf


def _threads() -> int:
    return usable_cores()
