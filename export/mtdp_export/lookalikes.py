"""Which encoders of the catalogue a file of weights looks like."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Final

import torch

from mtdp.errors import MtdpError
from mtdp_export.catalogue import catalogue
from mtdp_export.encoder import build
from mtdp_export.errors import ExportUsageError

_LIKE: Final = 0.98  # of an entry's tensors, by name and shape, that a file must have to look like it


def looks_like(shapes: Mapping[str, torch.Size]) -> list[str]:
    """The entries of the catalogue whose tensors these are, by name and shape, under any prefix."""
    have = {(_end(name), tuple(shape)) for name, shape in shapes.items()}
    found = []
    for key, recipe in catalogue().items():
        if recipe.library not in ("timm", "transformers"):
            continue
        count, ends = _ends(key)
        if ends and len(ends & have) >= _LIKE * len(ends) and abs(count - len(shapes)) <= 0.1 * count:
            found.append(key)
    return found[:3]


@cache
def _ends(key: str) -> tuple[int, frozenset[tuple[str, tuple[int, ...]]]]:
    """How many tensors an entry has, and the ends of their names with their shapes."""
    recipe = catalogue()[key]
    try:
        with torch.device("meta"):  # names and shapes are all that is asked for
            built = build(recipe.library, recipe.arch, recipe.arguments, recipe.feature)
    except (ExportUsageError, MtdpError):
        return 0, frozenset()
    wanted = {n: tuple(t.shape) for n, t in built.trunk.state_dict().items() if "position" not in n}
    return len(wanted), frozenset((_end(name), shape) for name, shape in wanted.items() if name != "pos_embed")


def _end(name: str) -> str:
    return ".".join(name.split(".")[-2:])
