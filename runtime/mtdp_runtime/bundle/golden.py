"""The golden tiles of a bundle, and what the reference gave for them."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.bundle import FEATURES as FEATURES
from mtdp_runtime.bundle import TOKENS as TOKENS
from mtdp_runtime.bundle import Bundle
from mtdp_runtime.errors import BundleInvalid

_MOST_GOLDEN_BYTES: Final = 1 << 30
TILES: Final = "tiles"


def load_golden(path: Path) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.float32]]]:
    """Read golden.npz: the tiles, and by name the outputs that torch gave for them; tokens for the first tiles alone.

    Raises:
        BundleInvalid: it is no such file.
    """
    try:
        # An array's header says its shape before its data are read: what it promises must be in the file.
        with zipfile.ZipFile(path) as members:
            promised_bytes = sum(member.file_size for member in members.infolist())
        if promised_bytes > _MOST_GOLDEN_BYTES:
            raise ValueError(f"{promised_bytes} bytes when unpacked")
        with np.load(path, allow_pickle=False) as archive:
            arrays: dict[str, Any] = {name: archive[name] for name in archive.files}
        tiles = arrays.pop(TILES)
    except (OSError, ValueError, KeyError, EOFError, MemoryError, zlib.error, zipfile.BadZipFile) as error:
        raise BundleInvalid(f"{path}: not golden tiles: {error}", "Copy or export the bundle again.") from error
    wrong = _wrong_arrays(tiles, arrays)
    if wrong:
        raise BundleInvalid(f"{path}: not golden tiles: {wrong}", "Copy or export the bundle again.")
    return tiles, arrays


def _wrong_arrays(tiles: NDArray[Any], outputs: Mapping[str, NDArray[Any]]) -> str:
    """Say what is wrong with the arrays of a golden.npz; empty if nothing is."""
    if tiles.dtype != np.uint8 or tiles.ndim != 4 or tiles.shape[3] != 3 or not tiles.size:
        return f"{TILES} is {shown(tiles)}, not uint8[N, P, P, 3]"
    if FEATURES not in outputs:
        return f"it holds no {FEATURES}"
    for name, values in outputs.items():
        if name == TOKENS:
            if values.dtype != np.float32 or values.ndim != 3 or len(values) > len(tiles) or not values.size:
                return f"{name} is {shown(values)}, not float32[up to {len(tiles)}, T, D]"
        elif values.dtype != np.float32 or values.ndim != 2 or len(values) != len(tiles) or not values.size:
            return f"{name} is {shown(values)}, not float32[{len(tiles)}, ...]"
        if not np.isfinite(values).all():  # it would compare with nothing, and pass unseen
            return f"{name} is not finite"
    return ""


def shown(array: NDArray[Any]) -> str:
    """Return an array's type and shape as a person writes them: `float32[4, 512]`."""
    return f"{array.dtype}[{', '.join(map(str, array.shape))}]"


def golden_of(bundle: Bundle) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.float32]]]:
    """Read a bundle's golden tiles and what the reference gave for them, of the sizes that bundle.json states.

    The tokens are among it where the bundle is asked for them.

    Raises:
        BundleError: golden.npz is not what was exported, or not of this model.
    """
    manifest = bundle.manifest
    path = bundle.checked(manifest.golden)
    tiles, outputs = load_golden(path)
    side = (manifest.tile_px, manifest.tile_px, 3)
    wanted = replace(bundle, tokens=True).outputs
    stored = {name: values.shape[1:] for name, values in outputs.items()}
    if tiles.shape[1:] != side or stored != wanted:
        what, states = (
            ", ".join(f"{name} of {' x '.join(map(str, shape))}" for name, shape in one.items())
            for one in (stored, wanted)
        )
        raise BundleInvalid(
            f"{path}: tiles of {' x '.join(map(str, tiles.shape[1:]))}, {what}; bundle.json states "
            f"{' x '.join(map(str, side))}, {states}",
            "Copy or export the bundle again.",
        )
    for name in bundle.left_out:
        del outputs[name]
    return tiles, outputs
