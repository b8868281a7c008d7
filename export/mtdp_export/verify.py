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


def verify_bundle(path: Path, backends: Sequence[str] = ()) -> list[Comparison]:
    """Check every digest, then compare each engine at each precision that it offers.

    A precision that this machine offers but does not take by itself is shown, and not required to pass.

    Args:
        path: the bundle.
        backends: names; every usable one where empty.

    Raises:
        BundleError: a file is not what was exported.
        BackendUnavailable, UsageError: a backend that was named does not run here, or none does.
    """
    bundle = load_bundle(path)
    for variant in bundle.manifest.variants:
        bundle.checked(variant.file)
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
        for precision in backend.probe().precisions:
            with backend.load(bundle, precision, batch, threads) as engine:
                required = precision in ("fp32", default)
                comparisons.append(replace(compare(engine, tiles, expected), required=required))
    return comparisons
