"""OpenVINO on the CPU: bf16 where that is fast (AMX, or AMD's vector units), fp32 otherwise.

A bundle's own fp16, bf16 and int8 variants run as they are typed, layer by layer: each value is rounded where the
graph says so, and the products are fp32 (int8 for int8). Where bf16 is fast, it is OpenVINO's own, of every layer, and
overrides the fp32 layers of a typed graph.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.backends import Probe, auto_batch, check_outputs
from mtdp_runtime.backends.judged import judged_int8
from mtdp_runtime.backends.openvino_cache import compiled, place_of, read_early
from mtdp_runtime.backends.telemetry import import_openvino
from mtdp_runtime.bundle import FEATURES, TOKENS, Bundle, load_bundle
from mtdp_runtime.bundle.manifest import FileRef
from mtdp_runtime.errors import BackendError, UsageError
from mtdp_runtime.machine import cpuinfo, fast_bf16_units, this_cpu

_HINT: Final = "pip install 'mtdp[cpu]'"
_DEPTH: Final = 2
_FAST_BF16: Final = ("bf16", "fp32", "fp16", "int8")
_SLOW_BF16: Final = ("fp32", "bf16", "fp16", "int8")


class OpenVINO:
    """A model compiled by OpenVINO, with two requests in flight."""

    on_cores: ClassVar[bool] = True

    def __init__(self, model: Any, name: str, precision: str, batch: int) -> None:
        self.name = name
        self.note = ""
        self.precision = precision
        self.batch = batch
        self.depth = _DEPTH
        self._outputs = [(i, _output_name(port.get_names())) for i, port in enumerate(model.outputs)]
        self._requests = [model.create_infer_request() for _ in range(_DEPTH)]
        self._tensor = import_openvino().Tensor
        self._tiles: list[NDArray[np.uint8] | None] = [None] * _DEPTH  # kept alive: the request reads them in place
        self._submitted = 0

    @classmethod
    def probe(cls) -> Probe:
        try:
            core = import_openvino().Core()
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            return Probe("openvino", False, f"not installed ({error})", _HINT)
        if "CPU" not in core.available_devices:
            return Probe("openvino", False, "it finds no CPU device", _HINT)
        device = core.get_property("CPU", "FULL_DEVICE_NAME")
        reason = f"OpenVINO {_version()} on {device}"
        if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            return Probe("openvino", True, f"{reason}, fp32 (the CPU has no bf16)", precisions=("fp32", "fp16", "int8"))
        units = fast_bf16_units(cpuinfo())
        if units:
            return Probe("openvino", True, f"{reason}, bf16 on {units}", "", _FAST_BF16, ("bf16",))
        return Probe("openvino", True, f"{reason}, fp32 (this CPU's bf16 is no faster)", "", _SLOW_BF16, ("bf16",))

    @classmethod
    def auto_batch(cls, threads: int) -> int:
        # What was measured with fast bf16 was measured with 16.
        return 16 if fast_bf16_units(cpuinfo()) else auto_batch(threads)

    @classmethod
    def load(cls, bundle: Bundle, precision: str, batch: int, threads: int) -> Self:
        offered = cls.probe().precisions
        plain = bundle.holds("fp32")
        if precision == "auto" and not plain:
            precision = next((one for one in ("fp16", "bf16") if bundle.holds(one) and one in offered), "fp32")
        if precision == "auto":
            return cls._first_proven(bundle, offered, batch, threads)
        if precision not in offered:
            raise UsageError(
                f"--precision {precision}: OpenVINO on this machine runs {', '.join(offered)}",
                hint=f"Use --precision {offered[0]}, or leave it out.",
            )
        return cls._compile(bundle, precision, batch, threads)

    @classmethod
    def _first_proven(cls, bundle: Bundle, offered: Sequence[str], batch: int, threads: int) -> Self:
        """Load in the first precision below fp32 in which this model, on this machine, repeats its golden features.

        bf16 where it is fast here; then int8, where the bundle holds one that a probe on a labelled task has judged
        (`judged_int8`); fp32 where neither passes.
        """
        tried = cls._below_fp32(bundle, offered)
        notes: list[str] = []
        for precision in tried:
            engine, lacks = cls._proven(bundle, precision, batch, threads)
            if engine is None:
                all_the_same = f"(--precision {precision} takes it all the same)"
                notes.append(f"not {precision}: this model in {precision} {lacks} {all_the_same}")
                continue
            if precision == "int8":
                notes.append(f"int8: {judged_int8(bundle.manifest)} (--precision fp32 leaves it)")
            break
        else:
            engine = cls._compile(bundle, "fp32", batch, threads)
        assert engine is not None
        engine.note = "; ".join(notes)
        return engine

    @classmethod
    def _below_fp32(cls, bundle: Bundle, offered: Sequence[str]) -> list[str]:
        tried = [one for one in ("bf16",) if offered[0] == one]
        return tried + [one for one in ("int8",) if one in offered and judged_int8(bundle.manifest)]

    @classmethod
    def _facts_of_a_proof(cls, bundle: Bundle, precision: str, batch: int, threads: int) -> tuple[str | int, ...]:
        facts = (bundle.digest, precision, batch, threads, cls.probe().reason)
        return (*facts, TOKENS) if TOKENS in bundle.outputs else facts

    @classmethod
    def read_early(cls, folder: Path, precision: str, batch: int | None, threads: int) -> None:
        """Begin to read the compiled model of an earlier start, in a thread; `load` takes it, where it is the one.

        It never compiles, proves, writes or raises.
        """

        def find() -> tuple[Any, Path, Mapping[str, str | int]]:
            bundle, size = load_bundle(folder), batch or cls.auto_batch(threads)
            chosen = precision if precision != "auto" else cls._chosen_before(bundle, size, threads)
            stored, converts = cls._stored(bundle, chosen)
            shape = [size, bundle.manifest.tile_px, bundle.manifest.tile_px, 3]
            config = _properties(converts, threads)
            place = place_of(stored.sha256, shape, config, this_cpu(cpuinfo()), bundle.left_out)
            return import_openvino().Core(), place, config

        read_early(find)

    @classmethod
    def _chosen_before(cls, bundle: Bundle, batch: int, threads: int) -> str:
        """Return the precision that `auto` takes, by the proofs that are kept."""
        from mtdp_runtime.backends.proof import lacks
        from mtdp_runtime.backends.proof_cache import recall

        for precision in cls._below_fp32(bundle, cls.probe().precisions):
            found = recall(cls._facts_of_a_proof(bundle, precision, batch, threads))
            if found is not None and not lacks(found, bundle, precision):
                return precision
        return "fp32"

    @classmethod
    def _stored(cls, bundle: Bundle, precision: str) -> tuple[FileRef, bool]:
        """Return the file of a precision, and whether OpenVINO makes bf16 of it."""
        typed = bundle.holds(precision) or precision != "bf16"
        stored = bundle.variant(precision if typed else "fp32").file
        return stored, precision == "bf16" and (not typed or cls.probe().precisions[0] == "bf16")

    @classmethod
    def _proven(cls, bundle: Bundle, precision: str, batch: int, threads: int) -> tuple[Self | None, str]:
        """Return the model loaded in a precision; None, and what it lacks, where it does not prove itself in it."""
        from mtdp_runtime.backends.proof import lacks, replay
        from mtdp_runtime.backends.proof_cache import recall, remember

        facts = cls._facts_of_a_proof(bundle, precision, batch, threads)
        found = recall(facts)
        if found is None or not lacks(found, bundle, precision):
            engine = cls._compile(bundle, precision, batch, threads)
            if found is None:
                found = replay(engine, bundle)
                remember(facts, found)
            if not lacks(found, bundle, precision):
                return engine, ""
            engine.close()
        return None, lacks(found, bundle, precision)

    @classmethod
    def _compile(cls, bundle: Bundle, precision: str, batch: int, threads: int) -> Self:
        stored, converts = cls._stored(bundle, precision)
        file = bundle.checked(stored)
        try:
            tile_px = bundle.manifest.tile_px
            model = compiled(
                import_openvino().Core(),
                file,
                stored.sha256,
                [batch, tile_px, tile_px, 3],
                _properties(converts, threads),
                this_cpu(cpuinfo()),
                bundle.left_out,
            )
        except RuntimeError as error:
            raise BackendError(f"OpenVINO refuses {file}: {_last_line(error)}", "Try --backend onnxruntime.") from error
        engine = cls(model, f"openvino {_version()}", precision, batch)
        check_outputs(bundle, [name for _, name in engine._outputs])
        return engine

    def submit(self, tiles: NDArray[np.uint8]) -> int:
        ticket = self._submitted
        slot = ticket % _DEPTH
        self._tiles[slot] = tiles
        self._requests[slot].set_input_tensor(self._tensor(tiles, shared_memory=True))
        self._requests[slot].start_async()
        self._submitted += 1
        return ticket

    def result(self, ticket: int) -> Mapping[str, NDArray[np.float32]]:
        request = self._requests[ticket % _DEPTH]
        try:
            request.wait()
        except RuntimeError as error:
            raise BackendError(f"{self.name} failed on a batch: {_last_line(error)}") from error
        return {name: np.array(request.get_output_tensor(i).data, np.float32) for i, name in self._outputs}

    def close(self) -> None:
        for request in self._requests:
            request.wait()
        self._requests = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _properties(bf16: bool, threads: int) -> dict[str, str | int]:
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }


def _output_name(names: Collection[str]) -> str:
    """Of the names that OpenVINO merged into one, the one that a bundle knows."""
    ours = {name for name in names if name in (FEATURES, TOKENS) or name.startswith("probabilities_")}
    return min(ours or names)


def _version() -> str:
    from importlib.metadata import version

    return version("openvino")


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
