"""Whether the segments of a level can be decoded at all: asked when a slide is opened.

A kind that is never decoded (JPEG of 12 bits, say) is the whole slide's fault, to be named at once; damage is a
segment's own. So a few segments are decoded: one that decodes settles it; where none does, a kind that one of them
named is the answer, and mere damage is left to be told tile by tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

PROBES: Final = 8


class UnknownKind(ValueError):
    """Data, whole as far as can be seen, of a kind that is not decoded here; the message names the kind."""


def probe(sizes_bytes: Sequence[int], decode: Callable[[int], object]) -> None:
    """Decode segments until one is whole: the first ones that have bytes, then some from all over the level.

    Raises:
        UnknownKind: none of those tried decodes, and one is of a kind that is never decoded.
    """
    unknown: UnknownKind | None = None
    for number in _chosen([number for number, size in enumerate(sizes_bytes) if size]):
        try:
            decode(number)
        except UnknownKind as error:
            unknown = unknown or error
        except Exception:  # damage: each codec has errors of its own  # noqa: S112
            continue
        else:
            return
    if unknown is not None:
        raise unknown


def _chosen(numbers: list[int]) -> list[int]:
    """Return at most PROBES of them: half from the beginning, half spread over the rest.

    >>> _chosen(list(range(5, 15)))
    [5, 6, 7, 8, 9, 10, 12, 14]
    """
    first, rest = numbers[: PROBES // 2], numbers[PROBES // 2 :]
    most = PROBES - len(first)
    if len(rest) <= most:
        return first + rest
    return first + [rest[i * (len(rest) - 1) // (most - 1)] for i in range(most)]
