"""Batches in flight on one or several GPUs: who gets which, in what order they come back, and what to do without room.

Nothing here knows CUDA; `Device` is all that is asked of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import DeviceOutOfMemory

T = TypeVar("T")


class Device(Protocol):
    """A GPU with the model loaded and some slots; a slot is a set of buffers for one batch.

    One thread enqueues and another waits.
    """

    slots: int

    def input(self, slot: int) -> NDArray[np.uint8]:
        """The slot's page-locked input, uint8[batch, tile_px, tile_px, 3]."""
        ...

    def enqueue(self, slot: int) -> None:
        """Queue: copy in, infer, copy out. Returns at once; slots run in the order in which they were queued."""
        ...

    def outputs(self, slot: int) -> Mapping[str, NDArray[np.float32]]:
        """Wait for the slot; its page-locked outputs, good until it is enqueued again."""
        ...

    def close(self) -> None:
        """Wait for what is queued and free everything."""
        ...


class Slots:
    """Deals batches to the devices in turn, and to each device's slots in turn."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self._devices = devices
        self.depth = sum(device.slots for device in devices)
        self._submitted = 0
        self._rows: dict[int, int] = {}  # ticket -> rows of its batch, from submit to result

    def submit(self, tiles: NDArray[np.uint8]) -> int:
        """Queue uint8[n, tile_px, tile_px, 3]; fewer rows than the batch are padded. The array is free on return."""
        ticket = self._submitted
        assert len(self._rows) < self.depth, "more batches in flight than there are slots"
        device, slot = self._place(ticket)
        buffer = device.input(slot)
        assert 0 < len(tiles) <= len(buffer), f"{len(tiles)} tiles for a batch of {len(buffer)}"
        buffer[: len(tiles)] = tiles
        buffer[len(tiles) :] = 0
        device.enqueue(slot)
        self._rows[ticket] = len(tiles)
        self._submitted += 1
        return ticket

    def result(self, ticket: int) -> dict[str, NDArray[np.float32]]:
        """Wait for a batch and return copies of its rows, the padding left out. Tickets are asked for in order."""
        assert ticket == min(self._rows), "results are taken in the order of submission"
        device, slot = self._place(ticket)
        outputs = device.outputs(slot)
        kept = {name: values[: self._rows[ticket]].copy() for name, values in outputs.items()}
        del self._rows[ticket]
        return kept

    def close(self) -> None:
        for device in self._devices:
            device.close()

    def _place(self, ticket: int) -> tuple[Device, int]:
        turn, index = divmod(ticket, len(self._devices))
        device = self._devices[index]
        return device, turn % device.slots


def open_all(openers: Sequence[Callable[[], T]], close: Callable[[T], None]) -> list[T]:
    """Open all of them or none: what was opened is closed where one fails."""
    opened: list[T] = []
    try:
        for opener in openers:
            opened.append(opener())
    except BaseException:
        for one in opened:
            close(one)
        raise
    return opened


def with_room(load: Callable[[int], T], batch: int) -> tuple[T, int, str]:
    """Load with that batch, or with half of it, and so on, until the memory is enough.

    Returns:
        What was loaded, its batch, and a note; empty if nothing had to be halved.

    Raises:
        DeviceOutOfMemory: there is no room for one tile.
    """
    smaller = batch
    while True:
        try:
            loaded = load(smaller)
        except DeviceOutOfMemory:
            if smaller == 1:
                raise
            smaller //= 2
            continue
        note = f"batch {smaller}, not {batch}: the GPU has no memory for more" if smaller < batch else ""
        return loaded, smaller, note
