"""A file of weights, read by what its bytes are, whatever its name ends in. None of its code runs."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
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


def _refuse_what_is_no_weights(path: Path, start: bytes) -> None:
    """Refuse what a failed download leaves.

    Raises:
        WeightsError: it is empty, a web page, a pointer, or a text.
    """
    size_bytes, begins = path.stat().st_size, start.removeprefix(_BOM).lstrip().lower()
    if not size_bytes:
        raise WeightsError(f"{path} is empty", _AGAIN)
    if begins.startswith(_LFS):
        raise WeightsError(
            f"{path} is a pointer of Git LFS, not the weights", "git lfs pull, or download the file itself"
        )
    if begins.startswith(_HTML):
        raise WeightsError(
            f"{path} is a web page, not weights", "log in and accept the licence there, then download the file again"
        )
    shown = start.decode("utf-8", errors="replace")
    if size_bytes <= _LONGEST_TEXT and all(c.isprintable() or c.isspace() for c in shown) and "\ufffd" not in shown:
        words = " ".join(shown.split())[:80]
        raise WeightsError(
            f"{path} is a text, not weights: {words}", "if it is what a server answered, do as it says, then try again"
        )
