"""Rungs of a ladder that behave as machines do: absent, broken when loaded, without a precision, or fine."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from mtdp_runtime.backends import Probe, first_that_loads, variant_precisions
from mtdp_runtime.bundle import Bundle
from mtdp_runtime.errors import BackendError, UsageError


class Fine:
    name: ClassVar[str] = "fine"
    note = ""

    @classmethod
    def probe(cls) -> Probe:
        return Probe(cls.name, True, f"{cls.name} 1.0 on a test", precisions=("fp32",))

    @classmethod
    def load(cls, bundle: Bundle, precision: str, batch: int, threads: int) -> Self:
        return cls()

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None: ...


class Absent(Fine):
    name = "absent"

    @classmethod
    def probe(cls) -> Probe:
        return Probe(cls.name, False, "not installed", "pip install it")

    @classmethod
    def load(cls, *arguments: Any) -> Self:
        raise AssertionError("a backend that is not usable was loaded")


class Broken(Fine):
    name = "broken"

    @classmethod
    def load(cls, *arguments: Any) -> Self:
        raise BackendError("its library cannot build this model")


class Picky(Fine):
    name = "picky"

    @classmethod
    def load(cls, *arguments: Any) -> Self:
        raise UsageError("it has no such precision")


class Choosy(Fine):
    """Offers three precisions and proves itself in the last alone."""

    name = "choosy"

    @classmethod
    def probe(cls) -> Probe:
        return Probe(cls.name, True, "choosy 1.0", precisions=("fp16", "bf16", "fp32"))

    def __init__(self, precision: str = "fp32") -> None:
        self.note = "engine built now"
        self.precision = precision

    @classmethod
    def load(cls, bundle: Bundle, precision: str, batch: int, threads: int) -> Self:
        return first_that_loads(variant_precisions(bundle, precision, cls.probe()), cls.at)

    @classmethod
    def at(cls, precision: str) -> Self:
        if precision != "fp32":
            raise BackendError(f"it does not compute this model in {precision}")
        return cls(precision)


class NeverAsked(Fine):
    name = "never-asked"

    @classmethod
    def probe(cls) -> Probe:
        raise AssertionError("a rung was probed though a better one had been taken")
