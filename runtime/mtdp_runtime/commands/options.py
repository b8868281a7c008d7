"""Options that several commands have, read from their text."""

from __future__ import annotations

from typing import Final

from mtdp_runtime.errors import UsageError

AUTO: Final = "auto"


def count_or_auto(option: str, text: str) -> int | None:
    """Return the number that an option says; None for `auto`.

    Raises:
        UsageError: it is neither.
    """
    if text == AUTO:
        return None
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise UsageError(f"{option} {text!r}: not a number", hint=f"A whole number from 1 on, or {AUTO}.")
    return int(text)
