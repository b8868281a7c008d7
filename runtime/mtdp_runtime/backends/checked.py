"""What an engine returns, looked at once a batch: a wrong width would be written over its neighbours in the file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.bundle import Bundle
from mtdp_runtime.errors import BackendError


class _Engine(Protocol):
    name: str
    batch: int
    depth: int

    def submit(self, tiles: NDArray[np.uint8]) -> int: ...

    def result(self, ticket: int) -> Mapping[str, NDArray[np.float32]]: ...


class CheckedEngine:
    """An engine whose outputs are those that are asked of the model, as its manifest states them, or an error."""

    def __init__(self, engine: _Engine, bundle: Bundle) -> None:
        self.batch = engine.batch
        self.depth = engine.depth
        self._engine = engine
        self._model = bundle.manifest.name
        self._shapes = bundle.outputs

    def submit(self, tiles: NDArray[np.uint8]) -> int:
        return self._engine.submit(tiles)

    def result(self, ticket: int) -> Mapping[str, NDArray[np.float32]]:
        """Wait for a batch and return its outputs.

        Raises:
            BackendError: one is missing, or has another shape or type than the manifest states.
        """
        outputs = self._engine.result(ticket)
        for name, shape in self._shapes.items():
            expected = f"float32{[self.batch, *shape]}"
            values = outputs.get(name)
            got = "nothing" if values is None else f"{values.dtype}{list(values.shape)}"
            if got != expected:
                raise BackendError(
                    f"{self._model}: {self._engine.name} gives {got} as {name}, {expected} is stated",
                    "The model file and bundle.json do not belong together: export the bundle again.",
                )
        return outputs
