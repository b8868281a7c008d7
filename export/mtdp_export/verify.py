"""Replays a bundle's golden tiles on this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mtdp_export.parity import Comparison, compare
from mtdp_runtime.backends import AUTO, backend_class, choose, probe_all
from mtdp_runtime.bundle import load_bundle
from mtdp_runtime.proof import load_golden


def verify_bundle(path: Path, backends: Sequence[str] = (), trust_engines: bool = False) -> list[Comparison]:
    """Check every digest, then compare each engine at each precision that it offers.

    A precision that this machine offers but does not take by itself is shown, and not required to pass.

    Args:
        path: the bundle.
        backends: names; every usable one where empty.
        trust_engines: run the engines that the bundle brings, where they fit; they are code.

    Raises:
        BundleError: a file is not what was exported.
        BackendUnavailable, UsageError: a backend that was named does not run here, or none does.
    """
    bundle = load_bundle(path, trust_engines)
    for file in (part.file for parts in (bundle.manifest.variants, bundle.manifest.engines) for part in parts):
        bundle.checked(file)
    tiles, expected = load_golden(bundle.checked(bundle.manifest.golden))
    for name in backends or (AUTO,):
        choose(name)
    names = list(backends) or [probe.name for probe in probe_all() if probe.usable]
    comparisons = []
    for name in names:
        backend = backend_class(name)
        batch, threads = min(8, len(tiles)), len(os.sched_getaffinity(0))
        with backend.load(bundle, "auto", batch, threads) as engine:
            default = engine.precision
        probe = backend.probe()
        held = {variant.precision for variant in bundle.manifest.variants}
        for precision in probe.precisions:
            if probe.from_variants and precision not in held:
                continue
            with backend.load(bundle, precision, batch, threads) as engine:
                required = precision in ("fp32", default)
                comparisons.append(replace(compare(engine, tiles, expected), required=required))
    return comparisons


def engines_not_run(path: Path, trust_engines: bool) -> dict[str, str]:
    """Return, by file, why an engine of the bundle is not run here; one that may be run is left out."""
    bundle = load_bundle(path)
    probes = {probe.name: probe for probe in probe_all()}
    reasons = {}
    for engine in bundle.manifest.engines:
        probe = probes[engine.key.library]
        if not probe.usable:
            reasons[engine.file.file] = probe.reason
        elif not trust_engines:
            reasons[engine.file.file] = "engines are code; --trust-engines runs it where it fits this GPU"
    return reasons
