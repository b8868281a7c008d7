"""What an engine returns, looked at once a batch: a wrong width would be written over its neighbours in the file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.bundle.manifest import Manifest
from mtdp_runtime.errors import BackendError


class _Engine(Protocol):
    name: str
    batch: int
    depth: int

    def submit(self, tiles: NDArray[np.uint8]) -> int: ...

    def result(self, ticket: int) -> Mapping[str, NDArray[np.float32]]: ...


class CheckedEngine:
    """An engine whose outputs are those that the model's manifest states, or an error."""

    def __init__(self, engine: _Engine, manifest: Manifest) -> None:
        self.batch = engine.batch
        self.depth = engine.depth
        self._engine = engine
        self._model = manifest.name
        self._columns = {"features": manifest.features_dim}
        self._columns |= {head.output: len(head.class_names) for head in manifest.heads}

    def submit(self, tiles: NDArray[np.uint8]) -> int:
        return self._engine.submit(tiles)

    def result(self, ticket: int) -> Mapping[str, NDArray[np.float32]]:
        """Wait for a batch and return its outputs.

        Raises:
            BackendError: one is missing, or has another shape or type than the manifest states.
        """
        outputs = self._engine.result(ticket)
        for name, columns in self._columns.items():
            expected = f"float32{[self.batch, columns]}"
            values = outputs.get(name)
            got = "nothing" if values is None else f"{values.dtype}{list(values.shape)}"
            if got != expected:
                raise BackendError(
                    f"{self._model}: {self._engine.name} gives {got} as {name}, {expected} is stated",
                    "The model file and bundle.json do not belong together: export the bundle again.",
                )
        return outputs
