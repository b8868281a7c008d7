"""Why slides failed, told once for all that failed of the same."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Final

from mtdp_runtime.store import run_log

FOUND_EARLIER: Final = " (an earlier run found this; --retry-failed tries it again)"  # at the end of a message
_NUMBER: Final = re.compile(r"\b(?:0x)?[0-9][0-9a-f.]*\b")


@dataclass(frozen=True, slots=True)
class FailedSlide:
    """A slide that failed, as run.jsonl tells it."""

    slide: str  # its path
    name: str  # of its output, without extension
    message: str
    hint: str = ""
    mask: str = ""  # the path of its mask, where it was given one
    coords: str = ""  # and of its list of tiles


@dataclass(frozen=True, slots=True)
class Cause:
    """What several slides failed of."""

    text: str  # the message of the first, without the names of its slide, mask and tiles
    hint: str
    slides: tuple[str, ...]  # file names, in the order of the run


def by_cause(failed: Iterable[FailedSlide]) -> list[Cause]:
    """Group failed slides: alike are a hint, and a message but for names and numbers; most slides first."""
    causes: dict[tuple[str, str], Cause] = {}
    for one in failed:
        text = _without_names(plain_message(one.message), one)
        alike = (_NUMBER.sub("#", text), _NUMBER.sub("#", _without_names(one.hint, one)))
        first = causes.get(alike, Cause(text, one.hint, ()))
        causes[alike] = replace(first, slides=(*first.slides, PurePath(one.slide).name))
    return sorted(causes.values(), key=lambda cause: -len(cause.slides))


def plain_message(message: str) -> str:
    """Return a message in one line, without what says that an earlier run found it."""
    return " ".join(message.removesuffix(FOUND_EARLIER).split())


def _without_names(text: str, one: FailedSlide) -> str:
    """Return a message without what names this slide, its mask or its tiles.

    >>> _without_names("/x/a.svs: 3 of its 7 tiles, says /x/a.svs", FailedSlide("/x/a.svs", "a", ""))
    '3 of its 7 tiles, says <slide>'
    """
    for path, word in ((one.slide, "<slide>"), (one.mask, "<mask>"), (one.coords, "<coords>")):
        if path:
            for name in (run_log.absolute(path), path, PurePath(path).name):
                text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", word, text)
    text = re.sub(rf"(?<=[/.]){re.escape(one.name)}(?=\.\w)", "<slide>", text)  # of what is made of it
    return text.removeprefix("<slide>: ")
