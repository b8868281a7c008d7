"""The encoders that labs run, as data (encoders.toml beside this module), validated when it is read."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Final, Literal, cast, get_args

from mtdp.preprocess import INTERPOLATIONS, Preprocessing
from mtdp_export.errors import ExportUsageError

Library = Literal["timm", "transformers", "mtdp", "onnx"]
Commercial = Literal["yes", "no", "unsure"]
COMMERCIAL: Final[Mapping[str, str]] = {"yes": "yes", "no": "no", "unsure": "unsure, read it yourself"}
CLASS_NAMES: Final = ("swiglu_packed", "silu", "conv_stem")  # what an argument may name; `encoder` knows them
_FEATURE: Final = re.compile(r"cls|mean|cls\+mean|pooled|projection|stage[1-9]")
_KEY: Final = re.compile(r"[a-z0-9][a-z0-9.-]*")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
PUBLISHED: Final = "the published weights"
OTHER: Final = "other weights"


@dataclass(frozen=True, slots=True)
class Licence:
    """Of weights: in words, and where the text stands."""

    words: str
    commercial: Commercial  # whether it allows commercial use; unsure: sources contradict each other, or are silent
    text: str  # its address

    def __str__(self) -> str:
        return f"{self.words} (commercial use: {COMMERCIAL[self.commercial]}; {self.text})"


@dataclass(frozen=True, slots=True)
class Published:
    """Where weights were published."""

    repository: str  # of Hugging Face, unless it says otherwise
    file: str
    revision: str  # empty: not known
    sha256: str  # of the file; empty: not known

    def compared(self, sha256: str) -> str:
        """Return what the digest of a file says of it."""
        if not self.sha256:
            return "no digest of the published weights is known to compare with"
        return PUBLISHED if sha256 == self.sha256 else OTHER


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an encoder is built, what it is given and what its feature is: one entry of the catalogue."""

    key: str
    title: str
    library: Library
    arch: str
    arguments: Mapping[str, Any]  # of the constructor
    onnx: str  # for the library "onnx": how its file is made
    parameters_m: float | None  # millions
    preprocessing: Preprocessing
    tile_px: int
    resize_px: int
    feature: str
    features_dim: int
    mpp: tuple[float, ...]  # micrometres per pixel, the default first
    weights: Published
    licence: Licence
    gated: bool
    paper: str
    choice: str  # where sources disagree: which one is followed, and why

    @property
    def line(self) -> str:
        """What to run."""
        if self.library == "onnx":
            mean, std = (" ".join(map(str, values)) for values in (self.preprocessing.mean, self.preprocessing.std))
            resize = ""
            if self.tile_px != self.resize_px:
                how = self.preprocessing.interpolation
                resize = f" --tile-px {self.tile_px} --resize {self.resize_px} --interpolation {how}"
            return f"mtdp-export --onnx FILE.onnx --mean {mean} --std {std} --mpp {self.mpp[0]:g}{resize} --out B"
        return f"mtdp-export {self.key} --weights {self.weights.file} --out B"


@cache
def catalogue() -> Mapping[str, Recipe]:
    """Return every entry by its key, in the file's order."""
    return parse((resources.files("mtdp_export") / "encoders.toml").read_text(encoding="utf-8"))


def parse(text: str) -> Mapping[str, Recipe]:
    """Read and validate a catalogue.

    Raises:
        ValueError: naming the entry and what is wrong with it.
    """
    document = tomllib.loads(text)
    if document.get("schema") != 1:
        raise ValueError("encoders.toml: schema 1 is read here")
    licences = {key: Licence(**values) for key, values in document["licences"].items()}
    recipes = {}
    for key, entry in document["encoders"].items():
        try:
            recipes[key] = _recipe(key, dict(entry), document["statistics"], licences)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"encoders.toml: {key}: {error!r}") from error
    return recipes


def named(name: str) -> Recipe | None:
    """Return the entry of that name, whatever its case."""
    return catalogue().get(name.lower())


def nearest(name: str, others: tuple[str, ...] = ()) -> list[str]:
    """Return the names that look most like one that does not exist."""
    return difflib.get_close_matches(name.lower(), [*catalogue(), *others], n=3, cutoff=0.5)


def by_digest(sha256: str) -> Recipe | None:
    """Return the entry whose published weights have that digest."""
    return next((recipe for recipe in catalogue().values() if recipe.weights.sha256 == sha256), None)


def buildable(recipe: Recipe) -> Recipe:
    """Return an entry that this program builds.

    Raises:
        ExportUsageError: it needs its authors' own code.
    """
    if recipe.library == "onnx":
        raise ExportUsageError(
            f"{recipe.key}: {recipe.title} needs its authors' own code, which is not run here",
            f"make an ONNX file with it ({recipe.onnx}), then {recipe.line}",
        )
    return recipe


def _recipe(key: str, entry: dict[str, Any], statistics: Mapping[str, Any], licences: Mapping[str, Licence]) -> Recipe:
    numbers = statistics[entry.pop("statistics")]
    input_px = entry.pop("input_px")
    resize_px = entry.pop("resize_px", input_px)
    preprocessing = Preprocessing(input_px, tuple(numbers["mean"]), tuple(numbers["std"]), entry.pop("interpolation"))
    weights = {"revision": "", "sha256": "", **entry.pop("weights")}
    recipe = Recipe(
        key=key,
        title=entry.pop("title"),
        library=cast(Library, entry.pop("library")),
        arch=entry.pop("arch", ""),
        arguments=entry.pop("arguments", {}),
        onnx=entry.pop("onnx", ""),
        parameters_m=entry.pop("parameters_m", None),
        preprocessing=preprocessing,
        tile_px=entry.pop("tile_px", resize_px),
        resize_px=resize_px,
        feature=entry.pop("feature"),
        features_dim=entry.pop("features_dim"),
        mpp=tuple(float(value) for value in entry.pop("mpp")),
        weights=Published(**weights),
        licence=licences[entry.pop("licence")],
        gated=entry.pop("gated"),
        paper=entry.pop("paper"),
        choice=entry.pop("choice", ""),
    )
    if entry:
        raise ValueError(f"unknown keys: {', '.join(entry)}")
    _check(recipe)
    return recipe


def _check(recipe: Recipe) -> None:
    whole = recipe.library == "onnx"
    arguments = recipe.arguments.values()
    strange = [v for k, v in recipe.arguments.items() if k.endswith("_layer") and v not in CLASS_NAMES]
    for wrong, what in (
        (not _KEY.fullmatch(recipe.key), "a key is of a-z, 0-9, . and -"),
        (recipe.library not in get_args(Library), f"library {recipe.library}"),
        (whole != bool(recipe.onnx) or whole == bool(recipe.arch), "`arch` is of a library, `onnx` of none"),
        (not all(isinstance(value, str | int | float | bool) for value in arguments), "arguments are plain values"),
        (bool(strange), f"no class is called {', '.join(map(str, strange))}"),
        (not _FEATURE.fullmatch(recipe.feature), f"feature {recipe.feature}"),
        (recipe.preprocessing.interpolation not in INTERPOLATIONS, "interpolation"),
        (recipe.preprocessing.image_px > recipe.resize_px, "its centre is larger than the resized tile"),
        (not recipe.mpp or min(recipe.mpp) <= 0 or max(recipe.mpp) > 20, f"mpp {recipe.mpp}"),
        (recipe.licence.commercial not in COMMERCIAL, f"commercial {recipe.licence.commercial}"),
        (bool(recipe.weights.sha256) and not _SHA256.fullmatch(recipe.weights.sha256), "sha256"),
        (not recipe.title or not recipe.paper or not recipe.weights.repository, "an empty text"),
    ):
        if wrong:
            raise ValueError(what)
