"""What a proof found on this machine, remembered: at every start it would cost as much as loading the model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mtdp_runtime.backends.proof import Replayed
from mtdp_runtime.errors import BackendError
from mtdp_runtime.files import cache_folder, private_folder, read_with_digest, save_with_digest


def recall(facts: Sequence[str | int]) -> Replayed | None:
    """Return what was found under the same facts; None where there is nothing to rely on."""
    path = place("proofs", facts, "json")
    try:
        private_folder(path.parent)  # what others may write decides nothing
        content, _ = read_with_digest(path)
        document = json.loads(content)
        numbers = [document["cosine"], document["probability_error"], document["length_error"]]
        numbers += [document.get("tokens_cosine", 1.0), document.get("tokens_length_error", 0.0)]  # not in the first
    except (BackendError, ValueError, KeyError, TypeError):
        return None
    fine = all(isinstance(number, float) and math.isfinite(number) for number in numbers)
    return Replayed(*numbers) if fine else None


def remember(facts: Sequence[str | int], found: Replayed) -> None:
    """Keep a result; where it cannot be kept, the proof is done again next time."""
    path = place("proofs", facts, "json")
    with contextlib.suppress(BackendError, OSError):
        private_folder(path.parent)
        save_with_digest(path, json.dumps({"facts": list(facts), **asdict(found)}).encode())


def place(kind: str, facts: Sequence[str | int], suffix: str) -> Path:
    """Return the file of the machine's cache that is for these facts, and for no others."""
    digest = hashlib.sha256(json.dumps(list(facts)).encode()).hexdigest()
    return cache_folder().with_name(kind) / f"{digest}.{suffix}"
