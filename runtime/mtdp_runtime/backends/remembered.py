"""What a proof found on this machine, remembered: at every start it would cost as much as loading the model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

from mtdp_runtime.errors import BackendError
from mtdp_runtime.trt.files import cache_folder, private_folder, read_with_digest, save_with_digest


def recall(facts: Sequence[str | int]) -> float | None:
    """Return the smallest cosine that was found under the same facts; None where there is none to rely on."""
    path = _path(facts)
    try:
        private_folder(path.parent)  # what others may write decides nothing
        content, _ = read_with_digest(path)
        cosine = json.loads(content)["cosine"]
    except (BackendError, ValueError, KeyError, TypeError):
        return None
    return float(cosine) if isinstance(cosine, float) and math.isfinite(cosine) else None


def remember(facts: Sequence[str | int], cosine: float) -> None:
    """Keep a result; where it cannot be kept, the proof is done again next time."""
    path = _path(facts)
    with contextlib.suppress(BackendError, OSError):
        private_folder(path.parent)
        save_with_digest(path, json.dumps({"facts": list(facts), "cosine": cosine}).encode())


def _path(facts: Sequence[str | int]) -> Path:
    digest = hashlib.sha256(json.dumps(list(facts)).encode()).hexdigest()
    return cache_folder().with_name("proofs") / f"{digest}.json"
