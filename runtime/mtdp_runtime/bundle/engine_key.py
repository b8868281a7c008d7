"""What an engine was built for, and whether that is what is wanted here.

An engine is compiled code for a GPU: it runs where it was built for, or not at all. Its key stands beside it as JSON.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

TENSORRT: Final = "tensorrt"
TENSORRT_RTX: Final = "tensorrt-rtx"
LIBRARIES: Final = (TENSORRT, TENSORRT_RTX)
HARDWARE: Final = ("none", "same-compute-capability", "ampere-plus")
# TensorRT-RTX builds for 8.0 and everything later unless it is told otherwise (its guide, "CPU-Only AOT").
RTX_DEFAULT: Final = ("8.0+",)
# Counts up when build.py sets other flags: an engine of an earlier recipe is another engine.
RECIPE: Final = 1
_CAPABILITY: Final = re.compile(r"\d{1,2}\.\d\+?")


@dataclass(frozen=True, slots=True)
class EngineKey:
    """Everything that decides whether an engine may be used."""

    library: str  # tensorrt or tensorrt-rtx
    version: str  # of the library
    model_sha256: str  # of the ONNX file
    precision: str
    tile_px: int
    batch: tuple[int, int, int]  # smallest, best, largest
    capabilities: tuple[str, ...]  # compute capabilities, "8.9"; "8.0+": that and later ones
    gpu: str = ""  # name of the GPU that it was tuned on; empty where it was built without one
    hardware: str = "none"  # one of HARDWARE: what other GPUs it may run on
    version_compatible: bool = False  # may run on a later release of the same major version
    system: str = f"{platform.system()}-{platform.machine()}".lower()
    recipe: int = RECIPE  # by which flags of ours it was built

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: Any) -> EngineKey:
        """Parse a key. Fields that are not known here are ignored, as everywhere in bundle.json.

        Raises:
            ValueError: it is none; the text says what was expected.
        """
        names = [f.name for f in fields(cls)]
        if not isinstance(document, Mapping) or not {"recipe", *document} >= set(names):
            raise ValueError(f"an object with the fields {', '.join(names)}")
        # The first keys do not say their recipe: it is the first one.
        values = {"recipe": 1, **{name: document[name] for name in names if name in document}}
        batch, capabilities = values.pop("batch"), values.pop("capabilities")
        if not isinstance(batch, list | tuple) or len(batch) != 3 or not all(type(n) is int and n > 0 for n in batch):
            raise ValueError("batch: three positive integers")
        if not isinstance(capabilities, list | tuple) or not all(
            isinstance(c, str) and _CAPABILITY.fullmatch(c) for c in capabilities
        ):
            raise ValueError('capabilities: a list like ["8.6", "8.9"]')
        key = cls(batch=(batch[0], batch[1], batch[2]), capabilities=tuple(capabilities), **values)
        if {type(key.tile_px), type(key.recipe)} != {int} or type(key.version_compatible) is not bool:
            raise ValueError("tile_px, recipe: integers; version_compatible: true or false")
        if not all(
            isinstance(text, str)
            for text in (key.library, key.version, key.model_sha256, key.precision, key.gpu, key.hardware, key.system)
        ):
            raise ValueError("texts for library, version, model_sha256, precision, gpu, hardware, system")
        if key.library not in LIBRARIES or key.hardware not in HARDWARE:
            raise ValueError(f"library: one of {', '.join(LIBRARIES)}; hardware: one of {', '.join(HARDWARE)}")
        return key

    @property
    def digest(self) -> str:
        """64 hex digits; two keys have the same only if they are equal."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    @property
    def stem(self) -> str:
        """A file name that a person can read and that no other key has."""
        return f"{self.library}-{self.version}-{self.precision}-b{self.batch[2]}-{self.digest[:16]}"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to run, and where."""

    library: str
    version: str
    model_sha256: str
    precision: str
    tile_px: int
    batch: int
    gpu: str
    capability: str  # of that GPU, "8.9"

    def own_key(self) -> EngineKey:
        """The key of an engine built here for exactly this."""
        batch = (self.batch, self.batch, self.batch)
        return EngineKey(
            self.library,
            self.version,
            self.model_sha256,
            self.precision,
            self.tile_px,
            batch,
            (self.capability,),
            self.gpu,
        )


def misfit(key: EngineKey, wanted: Wanted) -> str:
    """Say why an engine must not be used for what is wanted; empty if it may."""
    system = f"{platform.system()}-{platform.machine()}".lower()
    pairs = (
        ("library", key.library, wanted.library),
        ("model", key.model_sha256, wanted.model_sha256),
        ("precision", key.precision, wanted.precision),
        ("tile_px", key.tile_px, wanted.tile_px),
        ("system", key.system, system),
        ("recipe", key.recipe, RECIPE),
    )
    for name, built_for, here in pairs:
        if built_for != here:
            return f"built for {name} {_short(built_for)}, here it is {_short(here)}"
    if not key.batch[0] <= wanted.batch <= key.batch[2]:
        return f"built for batches of {key.batch[0]} to {key.batch[2]}, {wanted.batch} is wanted"
    if key.version != wanted.version and not (key.version_compatible and _later(key.version, wanted.version)):
        return f"built with {key.library} {key.version}, here is {wanted.version}"
    return _gpu_misfit(key, wanted)


def _gpu_misfit(key: EngineKey, wanted: Wanted) -> str:
    if key.hardware == "ampere-plus":
        fits = number(wanted.capability) >= (8, 0)
    else:
        fits = any(_covers(capability, wanted.capability) for capability in key.capabilities)
    if not fits:
        capabilities = "8.0+" if key.hardware == "ampere-plus" else ", ".join(key.capabilities)
        return f"built for compute capability {capabilities}, {wanted.gpu} has {wanted.capability}"
    # An engine that was tuned on a GPU is that GPU's own, unless it was built to be compatible.
    if key.gpu and key.hardware == "none" and key.gpu != wanted.gpu:
        return f"built for {key.gpu}, this is {wanted.gpu}"
    return ""


def _covers(built_for: str, capability: str) -> bool:
    return number(capability) >= number(built_for) if built_for.endswith("+") else capability == built_for


def number(capability: str) -> tuple[int, int]:
    """Return "8.9" or "8.9+" as (8, 9)."""
    major, _, minor = capability.removesuffix("+").partition(".")
    return int(major), int(minor)


def _later(built_with: str, here: str) -> bool:
    """Whether `here` is a later release of the same major version."""
    ours, theirs = ([int(part) for part in re.findall(r"\d+", version)] for version in (built_with, here))
    return ours[:1] == theirs[:1] and theirs >= ours


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text
