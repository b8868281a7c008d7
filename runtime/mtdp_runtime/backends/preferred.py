"""Which of the two CPU engines is faster in fp32, measured once for a model on a machine, and kept.

Neither is faster for every network and CPU (benchmarks/RESULTS.md). A measurement at each start would cost more than it
brings, decide by noise, and let two runs of one cohort round differently. So `mtdp-bench` measures, in pairs, when it
is asked to measure what `auto` takes, and what it found holds from then on, until a library, the model, the batch, the
threads or the CPU is another. Without it `auto` takes OpenVINO. A partial file of the other engine is begun anew.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from mtdp_runtime.backends import Backend, backend_class
from mtdp_runtime.backends.proof_cache import place
from mtdp_runtime.backends.speed import infer_rate
from mtdp_runtime.bundle import Bundle
from mtdp_runtime.errors import BackendError, UsageError
from mtdp_runtime.files import private_folder, read_with_digest, save_with_digest
from mtdp_runtime.machine import cpuinfo, this_cpu

FIRST: Final = "openvino"  # taken where nothing was measured, or where it makes no difference
OTHER: Final = "onnxruntime"
_PAIRS: Final = 5
_LEAST_BATCHES: Final = 2
_CLEARLY: Final = 1.03  # times as fast, below which it is no reason to leave the first


def recall(bundle: Bundle, batch: int, threads: int) -> tuple[str, str]:
    """Return the engine that was found to be faster and how it was found; two empty texts where nothing is kept."""
    try:
        path = place("preferred", _facts(bundle, batch, threads), "json")
        private_folder(path.parent)  # what others may write decides nothing
        content, _ = read_with_digest(path)
        document = json.loads(content)
        engine, pairs = document["engine"], [float(ratio) for ratio in document["ratios"]]
    except (BackendError, PackageNotFoundError, ValueError, KeyError, TypeError):
        return "", ""
    return (engine, in_words(pairs)) if engine in (FIRST, OTHER) and pairs else ("", "")


def decide(bundle: Bundle, first: Backend, threads: int) -> tuple[str, str]:
    """Measure both in pairs, keep which is faster, and return it with how it was found; what is kept stays.

    Args:
        bundle: the model.
        first: OpenVINO, with the model loaded in fp32.
        threads: of both.
    """
    kept = recall(bundle, first.batch, threads)
    if kept[0]:
        return kept
    try:
        other = backend_class(OTHER).load(bundle, "fp32", first.batch, threads)
    except (BackendError, UsageError):
        return "", ""
    tiles = _LEAST_BATCHES * first.batch
    with other:
        # Each takes the first turn as often as the other, but for one: what warms up or cools down hits both.
        ratios = []
        for turn in range(_PAIRS):
            engines = (first, other) if turn % 2 else (other, first)
            rates = {engine.name: infer_rate(engine, tiles, bundle.manifest.tile_px) for engine in engines}
            ratios.append(rates[other.name] / rates[first.name])
    engine = winner(ratios)
    path = place("preferred", _facts(bundle, first.batch, threads), "json")
    with contextlib.suppress(BackendError, OSError):  # where it cannot be kept, the first stays
        private_folder(path.parent)
        save_with_digest(path, json.dumps({"engine": engine, "ratios": ratios}).encode())
    return recall(bundle, first.batch, threads)


def winner(ratios: Sequence[float]) -> str:
    """Return the engine to take, by how many times as fast the other was in each pair: it must be so in all of them.

    >>> winner([1.2, 1.05, 1.1]), winner([1.2, 0.99, 1.3]), winner([1.01, 1.02, 1.01])
    ('onnxruntime', 'openvino', 'openvino')
    """
    return OTHER if min(ratios) > 1 and statistics.median(ratios) >= _CLEARLY else FIRST


def in_words(ratios: Sequence[float]) -> str:
    """Say what was measured.

    >>> in_words([1.2, 1.05, 1.1])
    'ONNX Runtime was 1.10 times as fast as OpenVINO in fp32, 1.05 to 1.20 in 3 pairs'
    """
    spread = f"{min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} pairs"
    return f"ONNX Runtime was {statistics.median(ratios):.2f} times as fast as OpenVINO in fp32, {spread}"


def _facts(bundle: Bundle, batch: int, threads: int) -> list[str | int]:
    return [bundle.digest, batch, threads, version("openvino"), version("onnxruntime"), this_cpu(cpuinfo())]
