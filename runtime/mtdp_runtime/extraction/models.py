"""The models of a run: loaded for the same batches, each with the file that it fills and the check of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mtdp_runtime.backends import Backend, choose
from mtdp_runtime.bundle import Bundle
from mtdp_runtime.errors import BackendError, UsageError
from mtdp_runtime.extraction.check import Check


@dataclass(frozen=True, slots=True)
class Model:
    """A bundle, loaded on an engine."""

    bundle: Bundle
    backend: Backend
    check: Check | None = None  # recomputes some of its rows


@dataclass(frozen=True, slots=True)
class Target:
    """A model and the feature file that it fills."""

    path: Path
    model: Model
    key: str = ""  # stored with the file: what decides it, as far as that is known without a look into the slide


def scale_folder(mpp: float) -> str:
    """Return the name of the folder of a scale, where there are several.

    >>> scale_folder(0.5), scale_folder(2.0)
    ('mpp0.5', 'mpp2')
    """
    return f"mpp{mpp:g}"


def folders(bundles: Sequence[Bundle], out: Path) -> list[Path]:
    """Return where each model's files go: `out` for one model, `out/<model name>` for several.

    Raises:
        UsageError: two models have one name, or a name cannot be that of a folder.
    """
    if len(bundles) == 1:
        return [out]
    names = [bundle.manifest.name for bundle in bundles]
    for name, bundle in zip(names, bundles, strict=True):
        first = bundles[names.index(name)]
        if first is not bundle:
            raise UsageError(
                f"two models are called {name!r}: {first.path} and {bundle.path}", hint="Run them into different --out."
            )
        if name != Path(name).name or name.startswith(".") or "\\" in name:
            raise UsageError(f"{bundle.path}: {name!r} cannot be a folder's name", hint="Run this model on its own.")
    return [out / name for name in names]


@contextmanager
def load_models(
    bundles: Sequence[Bundle], load: Callable[[Bundle, int | None], Backend], batch: int | None
) -> Iterator[list[Model]]:
    """Load every model for the same batches: of the size given, or that the first one takes.

    An engine may take fewer tiles than it was asked for, where the GPU has no room; then all are loaded for that many.

    Raises:
        BackendError: an engine refuses, or takes no size that the others take.
    """
    with ExitStack() as engines:
        loaded: list[Backend] = []
        for bundle in bundles:
            loaded.append(engines.enter_context(load(bundle, loaded[0].batch if loaded else batch)))
        while len({engine.batch for engine in loaded}) > 1:
            smallest = min(engine.batch for engine in loaded)
            engines.close()
            loaded = [engines.enter_context(load(bundle, smallest)) for bundle in bundles]
            if max(engine.batch for engine in loaded) > smallest:
                sizes = ", ".join(f"{engine.name}: {engine.batch}" for engine in loaded)
                raise BackendError(f"the models take no common batch ({sizes})", hint="Give a smaller --batch.")
        yield [Model(bundle, engine) for bundle, engine in zip(bundles, loaded, strict=True)]


@contextmanager
def with_references(models: Sequence[Model], tiles: int, threads: int) -> Iterator[list[Model]]:
    """Give each model a reference of its own, ONNX Runtime in fp32, that recomputes features of so many tiles.

    Raises:
        BackendError: the reference does not run here.
    """
    with ExitStack() as references:
        if not tiles:
            yield list(models)
            return
        reference, _ = choose("onnxruntime")
        engines = [
            references.enter_context(
                reference.load(replace(model.bundle, tokens=False), "fp32", min(tiles, 16), threads)
            )
            for model in models
        ]
        yield [replace(model, check=Check(tiles, engine)) for model, engine in zip(models, engines, strict=True)]
