"""Numbers and names as a person reads them: bytes, seconds, and what fits into a line of the terminal."""

from __future__ import annotations

import unicodedata
from typing import Final

_KILO: Final = 1000
_ELLIPSIS: Final = "…"


def size(size_bytes: float) -> str:
    """Return bytes in the largest unit that leaves a number from 1 on.

    >>> size(0), size(999), size(3_140_000), size(25e9)
    ('0 bytes', '999 bytes', '3.1 MB', '25 GB')
    """
    if size_bytes < _KILO:
        return f"{size_bytes:.0f} bytes"
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        size_bytes /= _KILO
        if size_bytes < 999.5 or unit == "PB":
            break
    return f"{size_bytes:.1f} {unit}" if size_bytes < 9.95 else f"{size_bytes:.0f} {unit}"


def duration(seconds: float) -> str:
    """Return seconds as a person says them, two units at most.

    >>> duration(0.4), duration(42.3), duration(300), duration(5400), duration(200_000)
    ('under 1 s', '42 s', '5 min', '1 h 30 min', '2 d 8 h')
    """
    if seconds < 1:
        return "under 1 s"
    if seconds < 89.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {rest} min" if rest else f"{hours} h"
    days, hours = divmod(round(minutes / 60), 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def cells(text: str) -> int:
    """Return how many columns of a terminal a text takes: an East Asian letter takes two, an accent on top none.

    >>> cells("slide"), cells("切片")
    (5, 4)
    """
    return sum(map(_cells, text))


def _cells(letter: str) -> int:
    if unicodedata.combining(letter):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def shorten(name: str, columns: int) -> str:
    """Return a name of at most so many columns; the middle is left out, since names differ at both ends.

    >>> shorten("TCGA-02-0001-01Z-00-DX1.83fce43e.svs", 20)
    'TCGA-02-00…ce43e.svs'
    """
    if cells(name) <= columns:
        return name
    room = columns - 1
    if room < 1:
        return _ELLIPSIS[:columns]
    head = _first(name, room - room // 2)
    tail = _first(name[::-1], room - cells(head))[::-1]
    return f"{head}{_ELLIPSIS}{tail}"


def _first(text: str, columns: int) -> str:
    taken = 0
    for index, letter in enumerate(text):
        taken += _cells(letter)
        if taken > columns:
            return text[:index]
    return text
