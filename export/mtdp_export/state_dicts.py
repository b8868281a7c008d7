"""The tensors of one network out of a file of weights, whatever it was wrapped in.

Known wrappings come off and are named: dictionaries around the tensors ({teacher: ...}), a prefix of the names
(`module.backbone.`) together with all that does not have it (heads, a text tower), what torch's wrappers put between
(`_orig_mod.`), chunks of blocks, and what the network's own library knows how to rename (`checkpoint_filter_fn` of
timm). Of several networks that fit, a teacher is taken before its student, and an average before what it is of; where
nothing tells them apart the file is refused. Then every tensor must fit.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from mtdp.errors import WeightsError

_CHUNK: Final = re.compile(r"(^|\.)blocks\.\d+\.(\d+)\.")
_BETWEEN: Final = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_SHARD: Final = re.compile(r"(^|[._])flat_param(_\d+)?$")
_CLASSIFIERS: Final = ("head.", "fc.", "classifier.", "head_dist.", "fc_norm_head.", "pooler.")
_HEADS: Final = (
    "dino_head.",
    "ibot_head.",
    "decoder_",
    "mask_token",
)  # of self-supervised training
# Which of two networks is meant where both fit: what their authors, and timm, evaluate.
_AVERAGES: Final = ("teacher", "ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "params_ema")
_BETTER: Final = (("base_encoder", "momentum_encoder"), ("encoder_q", "encoder_k"))
_NEARLY: Final = 0.9  # of the largest one's tensors, where names say nothing: another network as large
_HARDLY: Final = 0.2  # of the network's names: with fewer nothing fits, which the strict check says
_DEEPEST: Final = 6
_UNKNOWN: Final = torch.Size([-1])  # of no tensor
_SAVE: Final = "save model.state_dict()"
Tensors = dict[str, torch.Tensor]


class Misfit(WeightsError):
    """Tensors of another network."""


@dataclass(slots=True)
class Unwrapped:
    """The tensors of a network, and what was done to get at them, in words."""

    tensors: Tensors
    done: list[str] = field(default_factory=list)


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
        Misfit: with the first missing, unexpected and misshapen names.
        WeightsError: there are no weights in it, or nothing says which.
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
    strange = [n for n in tensors if n not in wanted]
    unexpected = [n for n in strange if not n.startswith((*_CLASSIFIERS, *_HEADS))]
    if len(unexpected) < len(strange):
        found.done.append(f"{len(strange) - len(unexpected)} tensors of heads left out")
    misshapen = [n for n in wanted if n in tensors and tensors[n].shape != wanted[n].shape]
    if absent or unexpected or misshapen:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in (("missing", absent), ("unexpected", unexpected), ("of another shape", misshapen))
            if names
        ]
        raise Misfit(f"{path} does not fit {arch}: {'; '.join(parts)}", "check the name against the file")
    fitting = {name: tensors[name] for name in wanted if name in tensors}
    _check_numbers(fitting, wanted, path)
    plain = {n: (t.float() if t.is_floating_point() else t).contiguous() for n, t in fitting.items()}
    trunk.load_state_dict(plain, strict=False, assign=True)
    return found.done


def _check_numbers(fitting: Tensors, wanted: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuse tensors whose values are not the network's: quantised ones, empty places, what is no number.

    Raises:
        WeightsError: naming the first.
    """
    for name, tensor in fitting.items():
        floats = tensor.is_floating_point()
        if wanted[name].is_floating_point() and (not floats or tensor.element_size() == 1):
            kind = str(tensor.dtype).removeprefix("torch.")
            said = f"{path} holds {kind} numbers in {name}: quantised weights"
            raise WeightsError(said, "give the weights that were quantised")
        if tensor.layout != torch.strided or tensor.is_meta:
            kind = "no values" if tensor.is_meta else "a sparse tensor"
            raise WeightsError(f"{path} holds {kind} in {name}", "save the tensors with their values, and dense")
        if floats and not torch.isfinite(tensor).all():
            said = f"{path} holds values in {name} that are no finite numbers"
            raise WeightsError(said, "the file is damaged, or its training diverged: give another one")


def unwrap(loaded: Mapping[str, Any], wanted: Mapping[str, torch.Tensor], path: Path) -> Unwrapped:
    """Take dictionaries, a prefix and chunks of blocks off, as the tensors that the network wants tell.

    Raises:
        WeightsError: there are no tensors, or two networks fit and nothing says which one is meant.
    """
    places = list(_places(loaded))
    if not places:
        kinds = ", ".join(f"{name} ({type(value).__name__})" for name, value in list(loaded.items())[:4]) or "nothing"
        raise WeightsError(f"{path} is not a plain state dict: no tensors are in it, but {kinds}", _SAVE)
    if any(_SHARD.search(name) for _, tensors in places for name in tensors):
        raise WeightsError(
            f"{path} is a part of a sharded training state (flat_param): names and shapes of its tensors are lost",
            "save it in the training program with StateDictType.FULL_STATE_DICT",
        )
    # By name and shape: beside a distilled network its teacher may lie, of the same names. By name where no shape fits.
    known: dict[str, torch.Size | None] = {_joined(name): tensor.shape for name, tensor in wanted.items()}
    candidates = [c for place, tensors in places for c in _candidates(place, tensors, known)]
    if not any(c.fits for c in candidates):
        known = dict.fromkeys(known)
        candidates = [c for place, tensors in places for c in _candidates(place, tensors, known)]
    chosen, others = _chosen(candidates, len(known), path)
    tensors, prefix = chosen.tensors, chosen.prefix
    done = [f"taken out of {{{key}: ...}}" for key in chosen.place]
    if len(tensors) != len({_BETWEEN.sub("", name) for name in tensors}):
        raise WeightsError(f"{path}: two of its tensors have one name once wrappers are taken off", _SAVE)
    if any(_BETWEEN.search(name) for name in tensors):
        tensors = {_BETWEEN.sub("", name): tensor for name, tensor in tensors.items()}
        done.append("torch's wrappers taken off")
    if prefix:
        rest = [name for name in tensors if not name.startswith(prefix)]
        tensors = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        done.append(f"prefix {prefix} taken off" + (f", {len(rest)} other tensors left out" if rest else ""))
    if others:
        done.append(f"{chosen.name} taken, and not {' or '.join(others)}, which would fit as well")
    if any(_CHUNK.search(n) for n in tensors) and not any(_CHUNK.search(n) for n in wanted):
        tensors = {_joined(name): tensor for name, tensor in tensors.items()}
        done.append("chunks of blocks joined")
    return Unwrapped(tensors, done)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """Tensors that may be those of the network: where they lie, and under which prefix."""

    place: tuple[str, ...]  # the keys of the dictionaries around them
    tensors: Tensors
    prefix: str
    fits: int  # how many of them the network knows

    @property
    def name(self) -> str:
        return "".join(f"{key}: " for key in self.place) + (f"{self.prefix}*" if self.prefix else "...")

    @property
    def parts(self) -> set[str]:
        return {*self.place, *self.prefix.split(".")}

    def equals(self, other: _Candidate) -> bool:
        mine, theirs = self.own(), other.own()
        return mine.keys() == theirs.keys() and all(_same(tensor, theirs[name]) for name, tensor in mine.items())

    def own(self) -> Tensors:
        named = {_BETWEEN.sub("", name): tensor for name, tensor in self.tensors.items()}
        return {n.removeprefix(self.prefix): t for n, t in named.items() if n.startswith(self.prefix)}


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def largest(loaded: Mapping[str, Any]) -> Tensors:
    """Return the tensors of the largest network in a file, by their names there; none where there are none."""
    return max((tensors for _, tensors in _places(loaded)), key=len, default={})


def _places(loaded: Mapping[str, Any], around: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensors]]:
    """Every dictionary that holds tensors by name, and the keys that lead to it."""
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    if tensors and all(isinstance(name, str) for name in loaded):
        yield around, tensors
    for key, value in loaded.items():
        if isinstance(value, Mapping) and len(around) < _DEEPEST and not str(key).startswith("optim"):
            yield from _places(value, (*around, str(key)))


def _candidates(
    place: tuple[str, ...], tensors: Tensors, known: Mapping[str, torch.Size | None]
) -> Iterator[_Candidate]:
    """The prefixes under which tensors are that the network knows; what all share where it knows none of them."""
    counts: dict[str, int] = {"": 0}
    for name, tensor in tensors.items():
        plain = _BETWEEN.sub("", name)
        for prefix in _prefixes(plain):
            shape = known.get(_joined(plain[len(prefix) :]), _UNKNOWN)
            counts[prefix] = counts.get(prefix, 0) + (shape is None or shape == tensor.shape)
    most = max(counts.values())
    if not most:  # names that only its library knows
        shared = {name.split(".", 1)[0] for name in tensors}
        alike = len(shared) == 1 and all("." in name for name in tensors)
        yield _Candidate(place, tensors, f"{shared.pop()}." if alike else "", 0)
        return
    for prefix, count in counts.items():
        if count == most:
            yield _Candidate(place, tensors, prefix, count)


def _chosen(candidates: list[_Candidate], wanted: int, path: Path) -> tuple[_Candidate, list[str]]:
    """Return the network that is meant, and the names of others that would fit; of `wanted` tensors.

    Raises:
        WeightsError: nothing tells which.
    """
    most = max(c.fits for c in candidates)
    largest = max(len(c.tensors) for c in candidates)
    fitting = [c for c in candidates if (c.fits == most if most else len(c.tensors) >= _NEARLY * largest)]
    left = _preferred(fitting)
    left = [c for i, c in enumerate(left) if not any(c.equals(before) for before in left[:i])]
    if len(left) > 1 and max(most, 0 if most else largest) >= _HARDLY * wanted:
        names = " and ".join(c.name for c in left[:3])
        raise WeightsError(
            f"{path} holds {len(left)} networks that fit, with other values, and nothing says which is meant: {names}",
            "write the one that you mean to a file of its own: torch.save({name: tensor, ...}, 'weights.pth')",
        )
    best = left[0]
    return best, [c.name for c in fitting if c is not best and not c.equals(best)]


def _preferred(fitting: list[_Candidate]) -> list[_Candidate]:
    averages = [c for c in fitting if c.parts & set(_AVERAGES)]
    fitting = averages or fitting
    for better, worse in _BETTER:
        if any(better in c.parts for c in fitting):
            fitting = [c for c in fitting if worse not in c.parts]
    return fitting


def _joined(name: str) -> str:
    return _CHUNK.sub(r"\1blocks.\2.", name)


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
        raise Misfit(
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
