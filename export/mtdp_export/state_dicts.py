"""A file of weights as the tensors of one network, whatever it was wrapped in.

Known wrappings come off and are named: dictionaries around the tensors ({teacher: ...}), a prefix of the names
(`module.backbone.`) together with all that does not have it (heads, a text tower), chunks of blocks, and what the
network's own library knows how to rename (`checkpoint_filter_fn` of timm). Then every tensor must fit.
"""

from __future__ import annotations

import argparse
import pickle
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from mtdp.errors import WeightsError

_WRAPPERS: Final = ("teacher", "state_dict", "model", "model_state_dict", "module", "encoder", "backbone")
_CHUNK: Final = re.compile(r"(^|\.)blocks\.\d+\.(\d+)\.")
_CLASSIFIERS: Final = ("head.", "fc.", "classifier.", "head_dist.", "fc_norm_head.", "pooler.")
_HTML: Final = (b"<!doctype", b"<html", b"<?xml")
_LFS: Final = b"version https://git-lfs"
Tensors = dict[str, torch.Tensor]


@dataclass(slots=True)
class Unwrapped:
    """The tensors of a network, and what was done to get at them, in words."""

    tensors: Tensors
    done: list[str] = field(default_factory=list)


def read_state(path: Path) -> dict[str, Any]:
    """Read a .safetensors file, or a pickle of tensors, without running any code that it may hold.

    Raises:
        WeightsError: it is something else.
    """
    with path.open("rb") as stream:
        start = stream.read(64).lstrip().lower()
    if start.startswith(_LFS):
        raise WeightsError(
            f"{path} is a pointer of Git LFS, not the weights", "git lfs pull, or download the file itself"
        )
    if start.startswith(_HTML):
        raise WeightsError(
            f"{path} is a web page, not weights", "log in and accept the licence there, then download the file again"
        )
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        with torch.serialization.safe_globals(_HARMLESS):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|global) ['`]?([\w.]+)", str(error))
        what = f"it holds code ({named[1]})" if named else "it is no plain pickle of tensors"
        raise WeightsError(
            f"{path} cannot be read as weights: {what}, and a pickle's code is not run",
            "where you trust it: python -c \"import torch; m = torch.load('FILE', weights_only=False); torch.save("
            "{k: v for k, v in (m if isinstance(m, dict) else m.state_dict()).items()}, 'weights.pth')\"",
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        reason = str(error).split("\n", 1)[0] or type(error).__name__
        raise WeightsError(
            f"{path} cannot be read as weights: {reason}", "give a .safetensors file or a state dict (.pth)"
        ) from error
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path} is not a state dict but a {type(loaded).__name__}", "save model.state_dict()")
    return dict(loaded)


# Data that training scripts pickle beside their tensors; making one runs nothing.
_HARMLESS: Final[list[Any]] = [
    argparse.Namespace,
    np.dtype,
    *[type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int32, np.int64, np.bool_)],
    np.float64(0).__reduce__()[0],  # numpy's own function that makes a scalar
]


def fit(
    trunk: nn.Module,
    loaded: Mapping[str, Any],
    path: Path,
    arch: str,
    *,
    ignore: Collection[str] = (),
    unused: tuple[str, ...] = (),
) -> list[str]:
    """Put a file's tensors into a network in fp32, in place; return what was taken off, in words.

    Args:
        trunk: may be on the meta device: the tensors take the place of its own.
        loaded: what `read_state` gave.
        path: for messages.
        arch: for messages.
        ignore: names of tensors of the network that a file need not hold.
        unused: beginnings of names that a file may hold and the feature does not need: later stages, a text tower.

    Raises:
        WeightsError: with the first missing, unexpected and misshapen names.
    """
    wanted = trunk.state_dict()
    found = unwrap(loaded, wanted, path)
    _check_patches(found.tensors, wanted, path, arch)
    tensors = {n: t for n, t in _by_library(trunk, found).items() if not n.endswith("position_ids")}
    left = [name for name in tensors if name.startswith(unused) and name not in wanted] if unused else []
    if left:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in left}
        found.done.append(f"{len(left)} tensors left out, which the feature does not need")
    absent = [n for n in wanted if n not in tensors and not n.endswith("num_batches_tracked") and n not in ignore]
    unexpected = [n for n in tensors if n not in wanted and not n.startswith(_CLASSIFIERS) and n != "mask_token"]
    misshapen = [n for n in wanted if n in tensors and tensors[n].shape != wanted[n].shape]
    if absent or unexpected or misshapen:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in (("missing", absent), ("unexpected", unexpected), ("of another shape", misshapen))
            if names
        ]
        raise WeightsError(f"{path} does not fit {arch}: {'; '.join(parts)}", "check the name against the file")
    fitting = {name: tensors[name] for name in wanted if name in tensors}
    plain = {n: (t.float() if t.is_floating_point() else t).contiguous() for n, t in fitting.items()}
    trunk.load_state_dict(plain, strict=False, assign=True)
    return found.done


def unwrap(loaded: Mapping[str, Any], wanted: Collection[str], path: Path) -> Unwrapped:
    """Take dictionaries, a prefix and chunks of blocks off, as the names that the network wants tell.

    Raises:
        WeightsError: there are no tensors.
    """
    done: list[str] = []
    while not any(isinstance(value, torch.Tensor) for value in loaded.values()) or _wraps(loaded):
        key = next((key for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)), None)
        if key is None:
            raise WeightsError(f"{path} is not a plain state dict: no tensors are in it", "save model.state_dict()")
        loaded = loaded[key]
        done.append(f"taken out of {{{key}: ...}}")
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    prefix = _prefix(tensors, wanted)
    if prefix:
        rest = [name for name in tensors if not name.startswith(prefix)]
        tensors = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        done.append(f"prefix {prefix} taken off" + (f", {len(rest)} other tensors left out" if rest else ""))
    if tensors and any(_CHUNK.search(n) for n in tensors) and not any(_CHUNK.search(n) for n in wanted):
        tensors = {_CHUNK.sub(r"\1blocks.\2.", name): tensor for name, tensor in tensors.items()}
        done.append("chunks of blocks joined")
    return Unwrapped(tensors, done)


def _wraps(loaded: Mapping[str, Any]) -> bool:
    return any(isinstance(loaded.get(key), Mapping) for key in _WRAPPERS)


def _prefix(tensors: Mapping[str, Any], wanted: Collection[str]) -> str:
    """The prefix under which most names are that the network knows, none where it knows as many without."""
    known = set(wanted) | {_CHUNK.sub(r"\1blocks.\2.", name) for name in wanted}
    counts: dict[str, int] = {"": 0}
    for name in tensors:
        for prefix in _prefixes(name):
            rest = _CHUNK.sub(r"\1blocks.\2.", name[len(prefix) :])
            counts[prefix] = counts.get(prefix, 0) + (rest in known)
    best = max(counts, key=lambda prefix: (counts[prefix], -len(prefix)))
    if counts[best]:
        return best
    # Names that only its library knows: what all share.
    shared = {name.split(".", 1)[0] for name in tensors}
    return f"{shared.pop()}." if len(shared) == 1 and all("." in name for name in tensors) else ""


def _prefixes(name: str) -> Iterator[str]:
    yield ""
    parts = name.split(".")
    for count in range(1, min(len(parts), 5)):
        yield ".".join(parts[:count]) + "."


def _check_patches(
    tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], path: Path, arch: str
) -> None:
    """Refuse a patch embedding of another size: timm's filter would resample it, and that would be another encoder."""
    name = "patch_embed.proj.weight"
    if name in tensors and name in wanted and tensors[name].dim() == 4 and tensors[name].shape != wanted[name].shape:
        raise WeightsError(
            f"{path} does not fit {arch}: 1 of another shape ({name}: {list(tensors[name].shape)}, not "
            f"{list(wanted[name].shape)})",
            "check the name against the file",
        )


def _by_library(trunk: nn.Module, found: Unwrapped) -> Tensors:
    """Rename by the filter of the network's own module of timm; a table of positions of another size is resampled."""
    if hasattr(trunk, "from_pretrained"):
        return _by_transformers(trunk, found.tensors)
    rename = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    if rename is None:
        return found.tensors
    before = {name: tuple(tensor.shape) for name, tensor in found.tensors.items()}
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            tensors: Tensors = rename(found.tensors, trunk)
    except (KeyError, RuntimeError, ValueError, AttributeError, AssertionError):
        return found.tensors  # the strict check says what does not fit
    if not any(name in before for name in tensors):
        found.done.append("names turned into timm's")
    old, new = before.get("pos_embed"), tensors.get("pos_embed")
    if old is not None and new is not None and old[-2:] != tuple(new.shape[-2:]):
        found.done.append(f"the table of {old[-2]} positions resampled to {new.shape[-2]}, as timm does")
    return tensors


def _by_transformers(trunk: Any, tensors: Tensors) -> Tensors:
    """Load as transformers does: its names have changed, and it knows those of published files.

    Returns:
        By the network's own names what fits; an empty tensor under a name that does not.
    """
    import transformers

    said: Any = transformers.utils.logging  # without annotations
    said.set_verbosity_error()
    said.disable_progress_bar()
    options = {"add_pooling_layer": False} if getattr(trunk, "pooler", trunk) is None else {}
    loaded, info = type(trunk).from_pretrained(
        None,
        config=trunk.config,
        state_dict=tensors,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )
    missing = set(info["missing_keys"])
    misshapen = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    fitting = {name: t for name, t in loaded.state_dict().items() if name not in missing | misshapen}
    return {**fitting, **{name: torch.empty(0) for name in misshapen | set(info["unexpected_keys"])}}


def _is_zip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"
