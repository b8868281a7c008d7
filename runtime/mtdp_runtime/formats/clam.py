"""CLAM's feature bag: a `.pt` file that `torch.load` reads, written without torch.

The file is a ZIP of uncompressed entries: `data.pkl`, which rebuilds a tensor of a storage named 0, and `data/0`, the
numbers. The pickle is written out opcode by opcode, since it may name nothing but what `torch.load(weights_only=True)`
allows. CLAM trains on this file alone and knows no bad tiles, so it holds the rows whose status is good.
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Final

import numpy as np

from mtdp_runtime.store.reader import open_features

_ROWS: Final = 4096


def write_pt(h5: Path, target: Path) -> None:
    """Write the good rows' features as one tensor, float32[N, D]."""
    with open_features(h5) as file, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        features, good = file.features, file.good
        rows, columns = int(good.sum()), features.shape[1]
        # A name that is no UTF-8 cannot stand in a ZIP; torch takes whatever stands there.
        root = h5.stem.strip(".").encode("utf-8", "backslashreplace").decode() or "archive"
        # A ZipInfo has no time of its own: the same features make the same bytes.
        archive.writestr(zipfile.ZipInfo(f"{root}/data.pkl"), _tensor_pickle(rows, columns))
        archive.writestr(zipfile.ZipInfo(f"{root}/byteorder"), "little")
        with archive.open(zipfile.ZipInfo(f"{root}/data/0"), "w", force_zip64=True) as stream:
            for start in range(0, len(good), _ROWS):
                part = features[start : start + _ROWS][good[start : start + _ROWS]]
                stream.write(np.ascontiguousarray(part, dtype="<f4").tobytes())
        archive.writestr(zipfile.ZipInfo(f"{root}/version"), "3\n")


def _tensor_pickle(rows: int, columns: int) -> bytes:
    """Return the protocol-2 pickle of a contiguous float32 tensor on the CPU, with no gradient."""
    storage = (
        b"("
        + _text("storage")
        + b"ctorch\nFloatStorage\n"
        + _text("0")
        + _text("cpu")
        + _integer(rows * columns)
        + b"t"
    )
    shape = _integer(rows) + _integer(columns) + b"\x86"
    stride = _integer(columns) + _integer(1) + b"\x86"
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = b"(" + storage + b"Q" + _integer(0) + shape + stride + b"\x89" + hooks + b"t"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R."


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    """LONG1: any size."""
    data = value.to_bytes((value.bit_length() // 8) + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data
