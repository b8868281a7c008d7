"""One batch for several engines and their files: every tile is read and decoded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.pipeline.run import Engine, RowStore


class JoinedEngines:
    """Engines that take the same batch. Each output is named `<number of the engine>/<name>`.

    What `run_pipeline` needs of a backend, and no more: the engines belong to whoever loaded them.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
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

    def __init__(self, stores: Sequence[RowStore]) -> None:
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
