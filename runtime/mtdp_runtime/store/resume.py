"""The rows of a partial file that can be gone on with: those whose checksum is right, and no others.

They are copied to the file of the run that goes on, so what an earlier owner may still write reaches nobody.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.store import disk
from mtdp_runtime.store.checksums import RowDigests
from mtdp_runtime.store.layout import STATUS, Layout, TileStatus, fingerprint
from mtdp_runtime.store.progress import read_progress

_COPY_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Taken:
    """Rows from the first on, copied."""

    status: NDArray[np.uint8]  # of each
    digests: RowDigests


def key_of(layout: Layout, places: Mapping[str, disk.Place]) -> bytes:
    """Return 32 bytes: a partial file with another key holds rows of something else, or in other places."""
    facts = [fingerprint(layout.made_of), layout.resume_key, layout.features_dtype]
    facts += [repr(sorted(layout.outputs.items())), repr(sorted(places.items()))]
    facts += [] if layout.tokens is None else [repr(layout.tokens)]
    digest = hashlib.sha256(json.dumps(facts).encode())
    digest.update(disk.rows_bytes(layout.coords))
    return digest.digest()


def take_rows(old: int, new: int, places: Mapping[str, disk.Place], key: bytes, hint: bytes) -> Taken | None:
    """Copy the good rows of one file to another; None where it holds none of this key.

    Args:
        old: descriptor of the partial file.
        new: descriptor of the file that takes its place.
        places: where the rows lie in both.
        key: as `key_of` gives it.
        hint: of the slide's size and times. Where the old file has another one, the slide may be another: rows are
            taken up to the first bad one, which is tried again.

    Raises:
        OSError: a disk fails.
    """
    found, its_hint = read_progress(old, key)
    room = len(places[STATUS].offsets) * places[STATUS].rows_per_chunk if places else 0
    for committed in found:
        if not 0 < committed.rows <= room:
            continue
        status = np.frombuffer(disk.read_rows(old, places[STATUS], 0, committed.rows), np.uint8)
        bad = np.flatnonzero(status != TileStatus.GOOD)
        keep = int(bad[0]) if len(bad) and hint != its_hint else committed.rows
        digests = RowDigests(tuple(places))
        _copy(old, new, places, digests, 0, keep)
        kept = digests.copy()
        _copy(old, new, places, digests, keep, committed.rows)
        if digests.joined() == committed.digest:
            return Taken(status[:keep], kept)
    return None


def _copy(old: int, new: int, places: Mapping[str, disk.Place], digests: RowDigests, start: int, stop: int) -> None:
    """Copy rows, but for their status, which is written when all of it is known to be right."""
    for name, place in places.items():
        step = max(1, _COPY_BYTES // place.row_bytes)
        for row in range(start, stop, step):
            data = disk.read_rows(old, place, row, min(step, stop - row))
            digests.update(name, data)
            if name != STATUS:
                disk.write_rows(new, place, row, data)
