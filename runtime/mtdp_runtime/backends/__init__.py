"""Inference engines behind one small protocol. A library is imported only when its backend is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.bundle import Bundle
from mtdp_runtime.errors import BackendUnavailable, UsageError

# In the order in which `auto` prefers them.
BACKENDS: Final = {
    "openvino": "mtdp_runtime.backends.openvino:OpenVINO",
    "onnxruntime": "mtdp_runtime.backends.onnxruntime:OnnxRuntime",
}
AUTO: Final = "auto"


@dataclass(frozen=True, slots=True)
class Probe:
    """What a backend says of itself on this machine."""

    name: str
    usable: bool
    reason: str  # what makes it usable (version, device), or what is missing
    hint: str = ""  # the line that would make it usable
    precisions: tuple[str, ...] = ()  # what it can run, best first
    converts: tuple[str, ...] = ()  # those of them that it makes from the fp32 graph; others need their variant


class Backend(Protocol):
    """A model, loaded. A context manager: leaving gives the memory back.

    One thread submits and one thread takes results, in the order of submission; never more than `depth` batches
    may be in flight.
    """

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

        The arrays are the caller's to keep.
        """
        ...

    def close(self) -> None:
        """Free the engine. Batches in flight are waited for."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


def backend_class(name: str) -> type[Backend]:
    """Import the class behind a name of `BACKENDS`."""
    module, _, attribute = BACKENDS[name].partition(":")
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
    if name == AUTO:
        probes = probe_all()
        skipped = "".join(f"; {p.name} not usable: {p.reason}" for p in probes if not p.usable)
        for probe in probes:
            if probe.usable:
                better = "".join(f"; not {p.name}: {p.reason}" for p in probes[: probes.index(probe)])
                return backend_class(probe.name), f"the best here: {probe.reason}{better}"
        raise BackendUnavailable(f"no inference engine is usable here{skipped}", hint=probes[0].hint)
    if name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}", hint=f"One of {AUTO}, {', '.join(BACKENDS)}.")
    probe = backend_class(name).probe()
    if not probe.usable:
        raise BackendUnavailable(f"backend {name} is not usable here: {probe.reason}", hint=probe.hint)
    return backend_class(name), f"asked for: {probe.reason}"
