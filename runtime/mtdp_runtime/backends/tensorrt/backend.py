"""TensorRT and TensorRT-RTX on NVIDIA GPUs, at the precision of the bundle's graphs.

All visible GPUs of the first one's type work on the same slide, batch by batch in turn; CUDA_VISIBLE_DEVICES chooses.
Whatever an engine's origin, it must repeat the model's golden features here before it computes a slide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final, Self

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.backends import Probe, first_that_loads, lacking, variant_precisions
from mtdp_runtime.backends.gpus import TOO_OLD, Gpu, gpus, load_cudart
from mtdp_runtime.backends.tensorrt.build import BuildOptions, build_engine
from mtdp_runtime.backends.tensorrt.cuda import CudaDevice
from mtdp_runtime.backends.tensorrt.engine_source import obtain
from mtdp_runtime.backends.tensorrt.library import LIBRARY
from mtdp_runtime.backends.tensorrt.slots import Slots, open_all, with_room
from mtdp_runtime.bundle import Bundle
from mtdp_runtime.bundle.engine_key import TENSORRT, TENSORRT_RTX, Wanted, number
from mtdp_runtime.errors import BackendError, BackendUnavailable
from mtdp_runtime.files import cache_folder

_TURING: Final = (7, 5)
_AMPERE: Final = (8, 0)


class TensorRT:
    """The model on the GPUs, two batches in flight on each."""

    library: ClassVar[str] = TENSORRT
    on_cores: ClassVar[bool] = False

    def __init__(self, slots: Slots, name: str, precision: str, batch: int) -> None:
        self.name = name
        self.precision = precision
        self.batch = batch
        self.depth = slots.depth
        self.note = ""
        self._slots = slots

    @classmethod
    def probe(cls) -> Probe:
        library = LIBRARY[cls.library]
        missing = [] if library.installed else [(f"{library.name} is not installed", library.install)]
        found: list[Gpu] = []
        try:
            found = gpus()
        except BackendError as error:  # a GPU in a broken state counts as none
            missing.append((str(error), error.hint))
        try:
            version = library.version if library.installed else ""
        except (BackendError, AttributeError) as error:  # what an incomplete removal leaves is found, and is empty
            missing.append((f"{library.name} cannot be loaded: {error}", library.install))
        if missing:
            return lacking(cls.library, missing)
        gpu = found[0]
        if number(gpu.capability) < _TURING:
            why = f"{gpu.name} has compute capability {gpu.capability}, 7.5 is needed"
            return Probe(cls.library, False, why, TOO_OLD)
        count = f"{len(found)} x " if len(found) > 1 else ""
        # No int8: its graphs have zero points other than 0 (values after a Relu fill all of uint8): the parser refuses.
        precisions = ("fp16", "bf16", "fp32") if number(gpu.capability) >= _AMPERE else ("fp16", "fp32")
        return Probe(
            cls.library,
            True,
            f"{library.name} {version} on {count}{gpu.name}",
            precisions=precisions,
        )

    @classmethod
    def auto_batch(cls, threads: int) -> int:
        return 64

    @classmethod
    def load(cls, bundle: Bundle, precision: str, batch: int, threads: int) -> Self:
        probe = cls.probe()
        if not probe.usable:
            raise BackendUnavailable(f"backend {cls.library} is not usable here: {probe.reason}", probe.hint)
        tried = variant_precisions(bundle, precision, probe)
        return first_that_loads(tried, lambda one: cls._load_at(bundle, one, batch))

    @classmethod
    def _load_at(cls, bundle: Bundle, precision: str, batch: int) -> Self:
        """Load at one precision, on all GPUs, and prove it."""
        found = gpus()
        alike = [gpu for gpu in found if (gpu.name, gpu.capability) == (found[0].name, found[0].capability)]
        others = [gpu.name for gpu in found if gpu not in alike]

        def at_batch(size: int) -> tuple[list[CudaDevice], list[str]]:
            notes: list[str] = []
            openers = [lambda gpu=gpu: cls._open(bundle, precision, size, gpu, notes) for gpu in alike]
            return open_all(openers, CudaDevice.close), notes

        (devices, notes), size, halved = with_room(at_batch, batch)
        name = f"{cls.library} {LIBRARY[cls.library].version} ({alike[0].name})"
        engine = cls(Slots(devices), name, precision, size)
        notes += [halved] if halved else []
        notes += [f"not used, as another type of GPU would round differently: {', '.join(others)}"] if others else []
        engine.note = "; ".join(dict.fromkeys(notes))
        try:
            engine._prove(bundle, len(devices))
        except BaseException:
            engine.close()
            raise
        return engine

    @classmethod
    def _open(cls, bundle: Bundle, precision: str, batch: int, gpu: Gpu, notes: list[str]) -> CudaDevice:
        """Load the engine on one GPU, from wherever it comes."""
        variant, tile_px = bundle.variant(precision), bundle.manifest.tile_px
        wanted = Wanted(
            cls.library,
            LIBRARY[cls.library].version,
            variant.file.sha256,
            precision,
            tile_px,
            batch,
            gpu.name,
            gpu.capability,
        )
        key, folder = wanted.own_key(), cache_folder()
        options = BuildOptions(
            key.batch,
            capabilities=("current",) if cls.library == TENSORRT_RTX else (),
            timing_cache=folder / f"{key.library}-{key.version}-{gpu.name.replace(' ', '-')}.timing",
        )
        cudart, trt = load_cudart(), LIBRARY[cls.library].load()
        kernels = folder / f"{key.stem}.jit"
        device, said = obtain(
            bundle,
            wanted,
            folder,
            lambda: build_engine(cls.library, bundle.checked(variant.file), tile_px, options, gpu.index),
            lambda plan: CudaDevice(
                cls.library,
                gpu,
                plan,
                batch=batch,
                tile_px=tile_px,
                kernels=kernels,
                cudart=cudart,
                trt=trt,
                left_out=bundle.left_out,
            ),
        )
        notes += [*said, *device.notes]
        return device

    def _prove(self, bundle: Bundle, devices: int) -> None:
        """Replay the golden tiles, often enough that every GPU has a turn.

        Raises:
            BackendError: what comes out is not what the network computes.
        """
        from mtdp_runtime.backends.proof import lacks, replay

        for _ in range(devices):
            shortfall = lacks(replay(self, bundle), bundle, self.precision)
            if shortfall:
                raise BackendError(
                    f"{self.name} does not compute this model: it {shortfall} ({self.precision})",
                    f"Delete {cache_folder()} and try again, or use another --precision or --backend.",
                )

    def submit(self, tiles: NDArray[np.uint8]) -> int:
        return self._slots.submit(tiles)

    def result(self, ticket: int) -> Mapping[str, NDArray[np.float32]]:
        return self._slots.result(ticket)

    def close(self) -> None:
        self._slots.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class TensorRTRTX(TensorRT):
    """The same with TensorRT-RTX, whose engines are compiled without a GPU and finished on it."""

    library: ClassVar[str] = TENSORRT_RTX
