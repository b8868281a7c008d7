"""bundle.json as it is read: a value that is not what it must be is refused, with its place and what was expected."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from mtdp_runtime.errors import BundleInvalid

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_LARGEST: Final = 3.5e38  # of a float32: no number of a model is beyond it


@dataclass(frozen=True, slots=True)
class Reader:
    """A JSON object and where it stands, so that each complaint opens with the place."""

    data: Any
    place: str

    def wrong(self, key: str, expected: str, got: object) -> BundleInvalid:
        shown = repr(got) if len(repr(got)) <= 60 else f"{repr(got)[:57]}..."
        return BundleInvalid(f"{self.place}: {key}: {expected}, got {shown}", hint="Copy or export the bundle again.")

    def value(self, key: str) -> Any:
        if not isinstance(self.data, Mapping):
            raise BundleInvalid(f"{self.place}: an object was expected, got {type(self.data).__name__}")
        if key not in self.data:
            raise BundleInvalid(f"{self.place}: {key}: missing", hint="Copy or export the bundle again.")
        return self.data[key]

    def has(self, key: str) -> bool:
        return isinstance(self.data, Mapping) and self.data.get(key) is not None

    def child(self, key: str) -> Reader:
        return Reader(self.value(key), f"{self.place}: {key}")

    def children(self, key: str) -> list[Reader]:
        value = self.value(key)
        if not isinstance(value, list):
            raise self.wrong(key, "a list", value)
        return [Reader(item, f"{self.place}: {key}[{i}]") for i, item in enumerate(value)]

    def text(self, key: str, default: str | None = None) -> str:
        if default is not None and isinstance(self.data, Mapping) and key not in self.data:
            return default
        value = self.value(key)
        if not isinstance(value, str) or not value:
            raise self.wrong(key, "a text", value)
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.value(key)
        if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
            raise self.wrong(key, "a list of texts", value)
        return tuple(value)

    def integer(self, key: str, minimum: int = 0, maximum: float = _LARGEST) -> int:
        value = self.value(key)
        # JSON knows no integers apart from other numbers: 64.0 is 64.
        if not _is_number(value) or value != int(value) or not minimum <= value <= maximum:
            most = f" and at most {maximum}" if maximum != _LARGEST else ""
            raise self.wrong(key, f"an integer of at least {minimum}{most}", value)
        return int(value)

    def number(self, key: str) -> float:
        value = self.value(key)
        if not _is_number(value):
            raise self.wrong(key, "a number", value)
        return float(value)

    def positive(self, key: str) -> float:
        value = self.value(key)
        if not _is_number(value) or value <= 0:
            raise self.wrong(key, "a positive number", value)
        return float(value)

    def rgb(self, key: str, positive: bool = False) -> tuple[float, float, float]:
        value = self.value(key)
        numbers = isinstance(value, list) and len(value) == 3 and all(_is_number(v) for v in value)
        if not numbers or (positive and min(value) <= 0):
            raise self.wrong(key, f"three {'positive ' if positive else ''}numbers", value)
        return (float(value[0]), float(value[1]), float(value[2]))

    def digest(self, key: str) -> str:
        value = self.value(key)
        if not isinstance(value, str) or not _SHA256.fullmatch(value):
            raise self.wrong(key, "64 hex digits", value)
        return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST
