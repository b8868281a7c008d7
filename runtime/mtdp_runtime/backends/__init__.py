"""Inference engines behind one small protocol. A library is imported only when its backend is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.bundle import Bundle
from mtdp_runtime.errors import BackendError, BackendUnavailable, BundleInvalid, DeviceOutOfMemory, UsageError

# The ladder: `auto` climbs down it.
BACKENDS: Final = {
    "tensorrt": "mtdp_runtime.backends.tensorrt.backend:TensorRT",
    "tensorrt-rtx": "mtdp_runtime.backends.tensorrt.backend:TensorRTRTX",
    "onnxruntime-tensorrt": "mtdp_runtime.backends.onnxruntime:OnnxRuntimeTensorRT",
    "onnxruntime-cuda": "mtdp_runtime.backends.onnxruntime:OnnxRuntimeCuda",
    "openvino": "mtdp_runtime.backends.openvino:OpenVINO",
    "onnxruntime": "mtdp_runtime.backends.onnxruntime:OnnxRuntime",
}
AUTO: Final = "auto"
# It builds an engine at each start, and what it can run the rungs above it run, too.
_ONLY_BY_NAME: Final = ("onnxruntime-tensorrt",)


@dataclass(frozen=True, slots=True)
class Probe:
    """What a backend says of itself on this machine."""

    name: str
    usable: bool
    reason: str  # what makes it usable (version, device), or what is missing
    hint: str = ""  # the line that would make it usable
    precisions: tuple[str, ...] = ()  # what it can run, best first
    converts: tuple[str, ...] = ()  # those of them that it makes from the fp32 graph; others need their variant


def lacking(name: str, missing: list[tuple[str, str]]) -> Probe:
    """Describe a backend that does not run here: all that is missing, each with the line that brings it."""
    return Probe(name, False, "; ".join(what for what, _ in missing), "; then ".join(line for _, line in missing))


class Backend(Protocol):
    """A model, loaded. A context manager: leaving gives the memory back.

    One thread submits and one thread takes results, in the order of submission; never more than `depth` batches
    may be in flight.
    """

    on_cores: ClassVar[bool]  # whether it computes on the cores that read, too
    name: str  # with version, as it is stored with the features
    precision: str  # what is computed in: fp32, bf16, fp16 or int8
    batch: int  # the one batch size that it takes
    depth: int  # batches that may be in flight
    note: str  # what a person should know of how it was loaded; mostly empty

    @classmethod
    def probe(cls) -> Probe:
        """Say whether this machine can run it. Never raises."""
        ...

    @classmethod
    def auto_batch(cls, threads: int) -> int:
        """Return the batch for `auto`: of this machine and these threads always the same number.

        A run that goes on must compute each row in the company that it would have had.
        """
        ...

    @classmethod
    def load(cls, bundle: Bundle, precision: str, batch: int, threads: int) -> Self:
        """Load the bundle's model.

        Args:
            bundle: the model; the digest of the variant's file is checked before the engine sees it.
            precision: one of `Probe.precisions`, or `auto`: the first of them that proves itself on this machine.
            batch: tiles in each batch.
            threads: CPU threads for inference.

        Raises:
            BundleDigestMismatch: the model file was changed.
            UsageError: this precision cannot be had here.
            BackendError: the engine refuses the model.
        """
        ...

    def submit(self, tiles: NDArray[np.uint8]) -> int:
        """Queue uint8[batch, tile_px, tile_px, 3]; leave the array alone until its `result`."""
        ...

    def result(self, ticket: int) -> Mapping[str, NDArray[np.float32]]:
        """Wait for a batch and return its outputs by name: features float32[batch, D], probabilities_* [batch, C].

        And tokens [batch, T, D], where the bundle is asked for them: `Bundle.outputs`.

        The arrays are the caller's to keep.
        """
        ...

    def close(self) -> None:
        """Free the engine. Batches in flight are waited for."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


B = TypeVar("B", bound=Backend)


def backend_class(name: str, ladder: Mapping[str, str] = BACKENDS) -> type[Backend]:
    """Import the class behind a name."""
    module, _, attribute = ladder[name].partition(":")
    found: Any = getattr(importlib.import_module(module), attribute)
    return found  # type: ignore[no-any-return]


def probe_all() -> list[Probe]:
    """Ask every backend, in the order of preference."""
    return [backend_class(name).probe() for name in BACKENDS]


def choose(name: str) -> tuple[type[Backend], str]:
    """Return the backend to use and the reason, stated for the log.

    Raises:
        UsageError: no backend has this name.
        BackendUnavailable: it, or for `auto` every one of them, does not run here.
    """
    chosen, reason = next(_rungs(name, BACKENDS))
    return backend_class(chosen.name), reason


def load(
    name: str,
    bundle: Bundle,
    precision: str,
    batch: int | None,
    threads: int,
    ladder: Mapping[str, str] = BACKENDS,
    *,
    batch_threads: int = 0,
) -> tuple[Backend, str]:
    """Load the model on the backend of that name, or for `auto` on the first rung of the ladder that takes it.

    A batch of None is the rung's own, for `batch_threads`, or `threads` where that is 0.

    Returns:
        The engine, and why it is this one: every rung that could have run and failed is named with its reason.

    Raises:
        UsageError, BackendError: as `choose` and `Backend.load` raise them; for `auto`, that of the highest rung.
    """
    first: BackendError | UsageError | None = None
    failed = ""
    for probe, reason in _rungs(name, ladder):
        try:
            rung = backend_class(probe.name, ladder)
            whole = batch_threads or threads  # several workers choose as one with all their threads would
            size = batch or rung.auto_batch(whole)
            if name == AUTO and ladder is BACKENDS and precision in (AUTO, "fp32"):
                measured = _measured_faster(probe.name, bundle, size, threads, whole)
                if measured is not None:
                    return measured
            return rung.load(bundle, precision, size, threads), f"{reason}{failed}"
        except (BackendError, UsageError) as error:
            first = first or error
            failed += f"; {probe.name} failed: {error}"
    assert first is not None
    raise first


def _measured_faster(
    rung: str, bundle: Bundle, batch: int, threads: int, measured_threads: int
) -> tuple[Backend, str] | None:
    """Load ONNX Runtime in OpenVINO's place, where that was measured to be faster here; None where it was not."""
    from mtdp_runtime.backends import preferred

    if rung != preferred.FIRST:
        return None
    engine, why = preferred.recall(bundle, batch, measured_threads)
    if engine != preferred.OTHER:
        return None
    try:
        return backend_class(engine).load(bundle, "fp32", batch, threads), f"measured here by mtdp-bench: {why}"
    except (BackendError, UsageError):
        return None  # as if nothing had been measured


def _rungs(name: str, ladder: Mapping[str, str]) -> Iterator[tuple[Probe, str]]:
    """Yield what to try, best first, each with the reason to state for it; a rung is probed when its turn comes."""
    if name != AUTO:
        if name not in ladder:
            raise UsageError(f"unknown backend {name!r}", hint=f"One of {AUTO}, {', '.join(ladder)}.")
        probe = backend_class(name, ladder).probe()
        if not probe.usable:
            raise BackendUnavailable(f"backend {name} is not usable here: {probe.reason}", hint=probe.hint)
        yield probe, f"asked for: {probe.reason}"
        return
    skipped: list[Probe] = []
    usable = 0
    for rung in ladder:
        if rung in _ONLY_BY_NAME:
            continue
        probe = backend_class(rung, ladder).probe()
        if probe.usable:
            usable += 1
            names = ", ".join(p.name for p in skipped)
            yield probe, f"the best here: {probe.reason}" + (f"; not {names} (mtdp-doctor says why)" if names else "")
        else:
            skipped.append(probe)
    if not usable:
        reasons = "".join(f"; {p.name} not usable: {p.reason}" for p in skipped)
        raise BackendUnavailable(f"no inference engine is usable here{reasons}", hint="pip install 'mtdp[cpu]'")


def variant_precisions(bundle: Bundle, precision: str, probe: Probe) -> list[str]:
    """Return the precisions to try, best first, for a backend whose precisions are those of the bundle's graphs.

    `auto` tries those that the bundle holds, but int8 only where it was asked for by name.

    Raises:
        UsageError: the backend cannot run it, or the bundle does not hold it.
    """
    if precision != AUTO:
        if precision not in probe.precisions:
            raise UsageError(
                f"--precision {precision}: {probe.name} on this machine runs {', '.join(probe.precisions)}",
                hint=f"Use --precision {probe.precisions[0]}, or leave it out.",
            )
        return [bundle.variant(precision).precision]
    held = [variant.precision for variant in bundle.manifest.variants]
    usable = [one for one in probe.precisions if one in held and one != "int8"]
    if not usable:
        by_name = ", or use --precision int8" if "int8" in probe.precisions and "int8" in held else ""
        raise UsageError(
            f"{bundle.path}: {probe.name} runs {', '.join(probe.precisions)}, this bundle has {', '.join(held)}",
            hint=f"Export it with mtdp-export --precision fp16{by_name}.",
        )
    return usable


def first_that_loads(precisions: Sequence[str], load_at: Callable[[str], B]) -> B:
    """Load at the first precision that the engine takes and proves itself in; its note tells of the others.

    Raises:
        BackendError: none does; it is the error of the first. A lack of the backend itself, or of memory, is raised at
            once: another precision does not cure it.
    """
    failures: list[tuple[str, BackendError]] = []
    for precision in precisions:
        try:
            engine = load_at(precision)
        except (BackendUnavailable, DeviceOutOfMemory):
            raise
        except BackendError as error:
            failures.append((precision, error))
            continue
        notes = [f"not {failed}: {error}" for failed, error in failures]
        engine.note = "; ".join([*notes, *([engine.note] if engine.note else [])])
        return engine
    raise failures[0][1]


def check_outputs(bundle: Bundle, names: Collection[str]) -> None:
    """Refuse a model file that lacks an output which bundle.json states.

    Raises:
        BundleInvalid: naming the output.
    """
    for wanted in bundle.outputs:
        if wanted not in names:
            raise BundleInvalid(
                f"{bundle.path}: the model has no output {wanted} (it has {', '.join(names)})", "Export it again."
            )


def auto_batch(threads: int) -> int:
    """Return how many tiles a CPU takes at a time: two per thread, from 4 to 16.

    The rate hardly depends on it (benchmarks/RESULTS.md), but where it is small the first rows come sooner, and a slide
    of three tiles costs less. It follows from the threads alone, and is not tuned: the last digits of a feature depend
    on the company that its tile had, and the same command should give the same bytes.
    """
    return max(4, min(16, 2 * threads))
