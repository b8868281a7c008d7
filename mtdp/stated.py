"""Whether what a foreign file states has the form that we write: before anything is built from it.

A shape is a type, `None`, a tuple of alternatives, a list of one shape, or a dict: of keys (one that ends in "?" may be
missing; others may be more) or, with the one key `str`, of any names. `float` takes finite numbers, also whole ones.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final

LARGEST: Final = 2**53  # of whole numbers: JSON's readers agree on them to here
_NAMES: Final = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false", None: "null"}
_SHOWN: Final = 60  # characters of a value that a message shows


def parsed(text: str | bytes) -> Any:
    """Return a JSON document.

    Raises:
        ValueError: it is none, or nested beyond reason.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def misfit(value: Any, shape: Any, at: str = "") -> str:
    """Say where a value does not have a shape, and what stands there; empty where it fits.

    >>> misfit({"iteration": "many"}, {"iteration": int})
    "iteration is 'many', not a whole number"
    >>> misfit({"heads": {"a": [1]}}, {"heads": {str: [str]}})
    'heads.a[0] is 1, not text'
    """
    if isinstance(shape, tuple):
        found = [misfit(value, one, at) for one in shape]
        return "" if "" in found else found[0]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{at} is {_shown(value)}, not a list"
        return next(filter(None, (misfit(one, shape[0], f"{at}[{i}]") for i, one in enumerate(value))), "")
    if isinstance(shape, dict):
        return _misfit_of_keys(value, shape, at)
    return "" if _is(value, shape) else f"{at or 'the document'} is {_shown(value)}, not {_NAMES[shape]}"


def _misfit_of_keys(value: Any, shape: dict[Any, Any], at: str) -> str:
    if not isinstance(value, dict):
        return f"{at or 'the document'} is {_shown(value)}, not an object"
    if str in shape:
        return next(filter(None, (misfit(one, shape[str], f"{at}.{key}") for key, one in value.items())), "")
    for key, wanted in shape.items():
        name = key.removesuffix("?")
        inner = f"{at}.{name}" if at else name
        if name not in value:
            if not key.endswith("?"):
                return f"{inner} is missing"
            continue
        found = misfit(value[name], wanted, inner)
        if found:
            return found
    return ""


def _is(value: Any, kind: Any) -> bool:
    if kind is None:
        return value is None
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _small(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST
    return isinstance(value, kind)


def _small(value: float) -> bool:
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= LARGEST


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST:
        return "too large"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
