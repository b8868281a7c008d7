"""Which folders are an OME-Zarr: known by their metadata, before any library is loaded for them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

SUFFIX: Final = ".zarr"
METADATA: Final = ("zarr.json", ".zattrs", ".zgroup")
_MOST_BYTES: Final = 16 << 20  # of metadata


def is_zarr(folder: Path) -> bool:
    """Say whether a folder is a Zarr group or array."""
    return any((folder / name).is_file() for name in (*METADATA, ".zarray"))


def is_image(folder: Path) -> bool:
    """Say whether a folder is an OME-Zarr image, and no other Zarr: a table, a mask, a file of features."""
    told = attributes_of(folder)
    return "multiscales" in told or "bioformats2raw.layout" in told


def attributes_of(folder: Path) -> Mapping[str, Any]:
    """Return what a group says as OME-Zarr: from 0.5 on under the name "ome"; {} where it cannot be read."""
    told: Any = {}
    try:
        for name in ("zarr.json", ".zattrs"):
            path = folder / name
            if path.is_file() and path.stat().st_size <= _MOST_BYTES:
                told = json.loads(path.read_bytes())
                told = told.get("attributes", {}) if name == "zarr.json" else told
                break
        told = told.get("ome", told)
    except (OSError, ValueError, AttributeError):
        return {}
    return told if isinstance(told, Mapping) else {}


def size_bytes_of(folder: Path) -> int:
    """Return the bytes of all files in a folder, which may be a hundred thousand."""
    total, open_folders = 0, [str(folder)]
    while open_folders:
        with os.scandir(open_folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    open_folders.append(entry.path)
                else:
                    total += entry.stat().st_size
    return total
