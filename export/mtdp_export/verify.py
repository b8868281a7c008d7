"""Replays a bundle's golden tiles on this machine: each variant on each engine, in a process of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mtdp_export.errors import ParityFailure
from mtdp_export.isolated import goes_on, limited
from mtdp_export.memory import give_back
from mtdp_export.model_store import load_light
from mtdp_export.parity import CannotRun, Comparison, Refused, Row, compare, compare_outputs, judged
from mtdp_export.rounding import in_fp32, run
from mtdp_runtime.backends import AUTO, Backend, backend_class, choose, probe_all
from mtdp_runtime.bundle import Bundle
from mtdp_runtime.bundle.golden import golden_of
from mtdp_runtime.bundle.hub import bundle_of
from mtdp_runtime.bundle.manifest import PRECISIONS
from mtdp_runtime.errors import BackendError, UsageError
from mtdp_runtime.machine import usable_cores

# Fp16 and bf16 as typed, whatever the engines here make of them.
_AS_TYPED: Final = "as typed"
_LOW: Final = ("fp16", "bf16")


def verify_bundle(
    path: Path | str, backends: Sequence[str] = (), trust_engines: bool = False, limit_s: float = math.inf
) -> list[Row]:
    """Check every digest, then compare each engine at each precision that it offers.

    A precision that this machine offers but does not take by itself is shown, and not required to pass. An engine that
    refuses a variant, or gives what is not finite, is a row as well: it is required to run what it offers.

    Args:
        path: the bundle: a folder, or its name on the hub, with a commit that was fetched.
        backends: names; every usable one where empty.
        trust_engines: run the engines that the bundle brings, where they fit; they are code.
        limit_s: what one engine may take with one variant.

    Raises:
        BundleError: a file is not what was exported.
        BackendUnavailable, UsageError: a backend that was named does not run here, or none does.
        Stalled: an engine took longer than `limit_s`.
        ExportError: an engine crashed.
    """
    return limited(f"the parity check of {path}", limit_s, replay, path, tuple(backends), trust_engines)


def require_engine(name: str) -> None:
    """Load an engine's library and do nothing with it.

    Raises:
        BackendUnavailable: it does not run here.
    """
    choose(name)


def replay(path: Path | str, backends: Sequence[str], trust_engines: bool = False) -> list[Row]:
    """Do what `verify_bundle` says, in this process."""
    goes_on()
    bundle = replace(bundle_of(path, trust_engines), tokens=True)  # those that it has
    engines = bundle.manifest.engines if engines_are_here(bundle) else ()
    for file in (part.file for parts in (bundle.manifest.variants, engines) for part in parts):
        bundle.checked(file)
    tiles, expected = golden_of(bundle)
    for name in backends or (AUTO,):
        choose(name)
    names = list(backends) or [probe.name for probe in probe_all() if probe.usable]
    rows: list[Row] = []
    for precision in PRECISIONS:
        if bundle.holds(precision) and precision in _LOW and "onnxruntime" in names:
            rows.append(_as_typed(bundle, precision, tiles, expected))
        for name in names:
            rows += _on_engine(backend_class(name), name, bundle, precision, tiles, expected)
            give_back()
    return rows


def _on_engine(
    backend: type[Backend],
    name: str,
    bundle: Bundle,
    precision: str,
    tiles: NDArray[np.uint8],
    expected: Mapping[str, NDArray[np.float32]],
) -> list[Row]:
    goes_on()
    probe = backend.probe()
    held = bundle.holds(precision)
    if precision not in probe.precisions:
        reason = f"this engine runs {', '.join(probe.precisions)} here"
        return [CannotRun(name, precision, reason)] if held else []
    if not held and precision not in probe.converts:
        return []
    batch, threads = min(8, len(tiles)), usable_cores()
    # An engine that converts by itself, and prefers it, overrides the types of the graph; `auto` proves it before use.
    overridden = precision in probe.converts and precision == probe.precisions[0]
    required = held and not overridden
    try:
        with backend.load(bundle, precision, batch, threads) as engine:
            try:
                comparison = compare(engine, tiles, expected)
            except ParityFailure as error:
                return [Refused(engine.name, precision, str(error), required, engine.note)]
            found = judged(comparison, bundle.manifest)
            return [replace(found, required=required, note=engine.note, library=name)]
    except (BackendError, UsageError) as error:  # of this engine alone: the others are to be seen
        return [CannotRun(name, precision, str(error), required)]


def _as_typed(
    bundle: Bundle, precision: str, tiles: NDArray[np.uint8], expected: Mapping[str, NDArray[np.float32]]
) -> Comparison | Refused:
    import onnxruntime

    goes_on()
    model = in_fp32(load_light(bundle.path / bundle.variant(precision).file.file))
    name = f"{_AS_TYPED} (onnxruntime {onnxruntime.__version__})"
    try:
        return judged(
            compare_outputs(name, precision, run(model, tiles, folder=bundle.path), expected), bundle.manifest
        )
    except ParityFailure as error:
        return Refused(name, precision, str(error))


def engines_are_here(bundle: Bundle) -> bool:
    """Whether its engines lie in its folder: of the hub they are fetched only where they are trusted."""
    return not bundle.source or bundle.trust_engines


def engines_not_run(bundle: Bundle) -> dict[str, str]:
    """Return, by file, why an engine of the bundle is not run here; one that may be run is left out."""
    probes = {probe.name: probe for probe in probe_all()}
    reasons = {}
    for engine in bundle.manifest.engines:
        probe = probes[engine.key.library]
        if not probe.usable:
            reasons[engine.file.file] = probe.reason
        elif not bundle.trust_engines:
            reasons[engine.file.file] = "engines are code; --trust-engines runs it where it fits this GPU"
    return reasons
