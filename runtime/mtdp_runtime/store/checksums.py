"""Checksums of a feature file: BLAKE2b of 16 bytes, of each dataset and of all attributes, kept in the file.

They are taken of what the run computed, before it went to the disk: what a disk, a cable or a copy changes shows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Final

import h5py
import numpy as np
from numpy.typing import NDArray

ATTRIBUTE: Final = "checksums"
ALGORITHM: Final = "blake2b-128"
ATTRIBUTES: Final = "attributes"  # the checksum of all attributes but the checksums
_BLOCK_BYTES: Final = 1 << 20


def new_digest() -> hashlib.blake2b:
    """Return the start of a checksum."""
    return hashlib.blake2b(digest_size=16)


def digest_of(array: NDArray[Any]) -> str:
    """Return the checksum of an array as it is stored: little-endian, row after row."""
    digest = new_digest()
    digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


class RowDigests:
    """The checksums of the datasets of rows, which grow as rows are written in order."""

    def __init__(self, names: Sequence[str]) -> None:
        self._digests = {name: new_digest() for name in names}

    def update(self, name: str, data: bytes) -> None:
        self._digests[name].update(data)

    def copy(self) -> RowDigests:
        twin = RowDigests(())
        twin._digests = {name: digest.copy() for name, digest in self._digests.items()}
        return twin

    def hex(self) -> dict[str, str]:
        return {name: digest.hexdigest() for name, digest in self._digests.items()}

    def joined(self) -> bytes:
        """Return 32 bytes that stand for all of them."""
        return hashlib.sha256(b"".join(digest.digest() for digest in self._digests.values())).digest()


def digest_of_dataset(dataset: h5py.Dataset) -> str:
    """Return the checksum of a dataset in a file, read in parts."""
    digest = new_digest()
    row_bytes = dataset.dtype.itemsize * int(np.prod(dataset.shape[1:], dtype=np.int64))
    step = max(1, _BLOCK_BYTES // max(1, row_bytes))
    if dataset.chunks is not None:
        step = dataset.chunks[0]
    for start in range(0, len(dataset), step):
        part = dataset[start : start + step]
        digest.update(np.ascontiguousarray(part, part.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def digest_of_attributes(file: h5py.File) -> str:
    """Return the checksum of all attributes of a file and its datasets."""
    holders = {"/": file, **{name: file[name] for name in sorted(file)}}
    facts = {
        where: {key: _plain(value) for key, value in sorted(holder.attrs.items()) if (where, key) != ("/", ATTRIBUTE)}
        for where, holder in holders.items()
    }
    digest = new_digest()
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


def kept(file: h5py.File) -> dict[str, str]:
    """Return the checksums that a file holds; none where it was made before they were kept.

    Raises:
        ValueError, KeyError: they are not readable.
    """
    if ATTRIBUTE not in file.attrs:
        return {}
    sums = json.loads(file.attrs[ATTRIBUTE])[ALGORITHM]
    return {str(name): str(value) for name, value in sums.items()}


def encoded(sums: dict[str, str]) -> str:
    """Return checksums by name as the file keeps them."""
    return json.dumps({ALGORITHM: sums})


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value
