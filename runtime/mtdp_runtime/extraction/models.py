"""Several models in one pass: every tile is read and decoded once, and each model's rows go to a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.backends import Backend, choose
from mtdp_runtime.bundle import Bundle
from mtdp_runtime.errors import BackendError, UsageError
from mtdp_runtime.extraction.check import Check
from mtdp_runtime.store.writer import FeatureStore


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
def checked(models: Sequence[Model], tiles: int, threads: int) -> Iterator[list[Model]]:
    """Give each model a reference of its own, ONNX Runtime in fp32, that recomputes so many tiles of a slide.

    Raises:
        BackendError: the reference does not run here.
    """
    with ExitStack() as references:
        if not tiles:
            yield list(models)
            return
        reference, _ = choose("onnxruntime")
        engines = [
            references.enter_context(reference.load(model.bundle, "fp32", min(tiles, 16), threads)) for model in models
        ]
        yield [replace(model, check=Check(tiles, engine)) for model, engine in zip(models, engines, strict=True)]


class JoinedEngines:
    """Engines that take the same batch. Each output is named `<number of the engine>/<name>`.

    What `run_pipeline` needs of a backend, and no more: the engines belong to whoever loaded them.
    """

    def __init__(self, engines: Sequence[Backend]) -> None:
        batches = {engine.batch for engine in engines}
        assert len(batches) == 1, batches
        self.batch = batches.pop()
        self.depth = min(engine.depth for engine in engines)
        self._engines = list(engines)
        self._tickets: dict[int, list[int]] = {}
        self._submitted = 0

    def submit(self, tiles: NDArray[np.uint8]) -> int:
        """Queue uint8[batch, tile_px, tile_px, 3] on all of them; leave the array alone until its `result`."""
        ticket = self._submitted
        self._tickets[ticket] = [engine.submit(tiles) for engine in self._engines]
        self._submitted += 1
        return ticket

    def result(self, ticket: int) -> Mapping[str, NDArray[np.float32]]:
        """Wait for the batch on all of them."""
        outputs: dict[str, NDArray[np.float32]] = {}
        for number, (engine, own) in enumerate(zip(self._engines, self._tickets.pop(ticket), strict=True)):
            outputs |= {f"{number}/{name}": values for name, values in engine.result(own).items()}
        return outputs


class JoinedStores:
    """Files that are filled in step from `JoinedEngines`. They may stand at different rows when a run goes on."""

    def __init__(self, stores: Sequence[FeatureStore]) -> None:
        self._stores = list(stores)
        self._rows_done = min(store.rows_done for store in stores)

    @property
    def rows_done(self) -> int:
        """Rows that all of them hold."""
        return self._rows_done

    def append(self, outputs: Mapping[str, NDArray[np.float32]], status: NDArray[np.uint8]) -> None:
        """Write the next rows to each file that lacks them; as `FeatureStore.append`."""
        for number, store in enumerate(self._stores):
            held = store.rows_done - self._rows_done
            if held >= len(status):
                continue
            prefix = f"{number}/"
            own = {
                name.removeprefix(prefix): values[held:] for name, values in outputs.items() if name.startswith(prefix)
            }
            store.append(own, status[held:])
        self._rows_done += len(status)
