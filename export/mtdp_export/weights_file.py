"""A file of weights, read by what its bytes are, whatever its name ends in. None of its code runs."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from mtdp.errors import WeightsError

_HTML: Final = (b"<!doctype", b"<html", b"<?xml")
_LFS: Final = b"version https://git-lfs"
_BOM: Final = b"\xef\xbb\xbf"
_OTHERS: Final = {  # what begins so, and what to do with it
    b"\x1f\x8b": ("compressed by gzip", "gunzip it, and give what comes out"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "unzstd it, and give what comes out"),
    b"BZh": ("compressed by bzip2", "bunzip2 it, and give what comes out"),
    b"\xfd7zXZ": ("compressed by xz", "unxz it, and give what comes out"),
    b"7z\xbc\xaf": ("an archive of 7-Zip", "unpack it, and give the file of weights in it"),
    b"\x89HDF": ("an HDF5 file, as Keras writes them", "give the weights of a network of PyTorch"),
    b"\x08": ("no pickle; it begins like an ONNX file", "an ONNX file is brought by --onnx, without SOURCE"),
}
_SHARDS: Final = '"weight_map"'
_LONGEST_TEXT: Final = 1 << 20  # bytes
_AGAIN: Final = "download it again, and compare its size with the one that is stated there"
# Data that training scripts pickle beside their tensors; making one runs nothing.
_HARMLESS: Final[list[Any]] = [
    argparse.Namespace,
    np.dtype,
    *[type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int32, np.int64, np.bool_)],
    np.float64(0).__reduce__()[0],  # numpy's own function that makes a scalar
]


def read_state(path: Path) -> dict[str, Any]:
    """Read safetensors, or a pickle of tensors, without running any code that it may hold.

    Raises:
        WeightsError: it is something else.
    """
    with path.open("rb") as stream:
        start = stream.read(256)
    _refuse_what_is_no_weights(path, start)
    if start.startswith(b"PK\x03\x04"):
        _check_archive(path)
    pickled = start[:2] in (b"PK", b"\x80\x02")
    try:
        if not pickled and (start[8:9] == b"{" or path.suffix == ".safetensors"):
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings(), path.open("rb") as stream:
            warnings.simplefilter("ignore")  # of programs, which are refused below
            named_so = path.suffix == ".safetensors"  # by that name torch would take it for such a file
            mapped = start.startswith(b"PK\x03\x04") and not named_so
            loaded = torch.load(stream if named_so else path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|global) ['`]?([\w.]+)", str(error))
        what = f"it holds code ({named[1]})" if named else "it is no plain pickle of tensors"
        raise WeightsError(
            f"{path} cannot be read as weights: {what}, and a pickle's code is not run",
            "where you trust it: python -c \"import torch; m = torch.load('FILE', weights_only=False); torch.save("
            "{k: v for k, v in (m if isinstance(m, dict) else m.state_dict()).items()}, 'weights.pth')\"",
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError, KeyError, OverflowError) as error:
        reason = str(error).split("\n", 1)[0].split(". ", 1)[0] or type(error).__name__
        if "TorchScript" in str(error):
            raise WeightsError(
                f"{path} is a TorchScript archive, a program, and no code of it is run",
                "where you trust it: python -c \"import torch; torch.save(torch.jit.load('FILE').state_dict(), "
                "'weights.pth')\"",
            ) from error
        raise WeightsError(f"{path} cannot be read as weights, or is cut: {reason}", _AGAIN) from error
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path} is not a state dict but a {type(loaded).__name__}", "save model.state_dict()")
    return dict(loaded)


def refuse_failed_download(path: Path, start: bytes, what: str = "weights") -> None:
    """Refuse a file that is empty, a web page or a pointer, by its first bytes; `what` it should be.

    Raises:
        WeightsError: it is.
    """
    begins = start.removeprefix(_BOM).lstrip().lower()
    if not start:
        raise WeightsError(f"{path} is empty", _AGAIN)
    if begins.startswith(_LFS):
        raise WeightsError(f"{path} is a pointer of Git LFS, not {what}", "git lfs pull, or download the file itself")
    if begins.startswith(_HTML):
        raise WeightsError(
            f"{path} is a web page, not {what}", "log in and accept the licence there, then download the file again"
        )


def _refuse_what_is_no_weights(path: Path, start: bytes) -> None:
    """Refuse what a failed download leaves, and files of another kind.

    Raises:
        WeightsError: it is empty, a web page, a pointer, a text, compressed, or of another program.
    """
    refuse_failed_download(path, start)
    for magic, (what, hint) in _OTHERS.items():
        if start.startswith(magic) and start[8:9] != b"{":  # the length of safetensors' header may look like it
            raise WeightsError(f"{path} is {what}", hint)
    shown = start.decode("utf-8", errors="replace")
    if (
        path.stat().st_size <= _LONGEST_TEXT
        and all(c.isprintable() or c.isspace() for c in shown)
        and "\ufffd" not in shown
    ):
        if _SHARDS in shown:
            raise WeightsError(
                f"{path} is the index of weights that lie in several files",
                "join them: load them with the library that wrote them, then model.save_pretrained(FOLDER, "
                "max_shard_size='100GB')",
            )
        words = " ".join(shown.split())[:80]
        raise WeightsError(
            f"{path} is a text, not weights: {words}", "if it is what a server answered, do as it says, then try again"
        )


def _check_archive(path: Path) -> None:
    """Compare what lies in torch's archive with the checksums in it: mapped into memory, nothing else would.

    Raises:
        WeightsError: it is cut, damaged, or an archive of something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if not any(name.endswith("data.pkl") for name in names):
                raise WeightsError(
                    f"{path} is an archive of other files: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}",
                    "unpack it, and give the file of weights in it",
                )
            wrong = [name for name in names if not _is_whole(archive, name)]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise WeightsError(f"{path} cannot be read as weights, or is cut: {error}", _AGAIN) from error
    if wrong and len(wrong) < len(names):  # torch can be told to write no checksums: then none is right
        raise WeightsError(f"{path} is damaged: {wrong[0]} in it is not what its checksum says", _AGAIN)


def _is_whole(archive: zipfile.ZipFile, name: str) -> bool:
    try:
        with archive.open(name) as stream:
            while stream.read(1 << 22):
                pass
    except (zipfile.BadZipFile, zlib.error, EOFError):
        return False
    return True
