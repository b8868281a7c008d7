"""Text as a terminal may show it."""

from __future__ import annotations

import unicodedata


def printable(text: object) -> str:
    r"""Return text for one line of a terminal: what would command the terminal, or reorder the line, is escaped.

    >>> printable("a\x1b[2J\n.svs")
    'a\\x1b[2J\\n.svs'
    """
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else ascii(c)[1:-1] for c in str(text))
