"""Batches on devices: dealt in turn, returned in order, padded, halved where there is no room."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mtdp_runtime.backends.tensorrt.slots import Slots, open_all, with_room
from mtdp_runtime.errors import BackendError, DeviceOutOfMemory

BATCH, TILE_PX = 4, 2


class FakeDevice:
    """Computes a batch only when it is waited for, from what then lies in its buffers, as a late GPU would."""

    slots = 2

    def __init__(self) -> None:
        self.inputs = [np.full((BATCH, TILE_PX, TILE_PX, 3), 99, np.uint8) for _ in range(self.slots)]
        self.results = [{"features": np.empty((BATCH, 2), np.float32)} for _ in range(self.slots)]
        self.queued: list[int] = []
        self.history: list[int] = []
        self.closed = False

    def input(self, slot: int) -> NDArray[np.uint8]:
        assert slot not in self.queued, "a buffer was written while its batch was in flight"
        return self.inputs[slot]

    def enqueue(self, slot: int) -> None:
        self.queued.append(slot)
        self.history.append(slot)

    def outputs(self, slot: int) -> Mapping[str, NDArray[np.float32]]:
        assert self.queued[0] == slot, "waited for out of order"
        self.queued.pop(0)
        tiles = self.inputs[slot].astype(np.float32)
        company = np.full(BATCH, tiles.sum())
        self.results[slot]["features"][:] = np.stack([tiles[:, 0, 0, 0], company], axis=1)
        return self.results[slot]

    def close(self) -> None:
        self.closed = True


def batch_of(number: int, rows: int = BATCH) -> NDArray[np.uint8]:
    tiles = np.zeros((rows, TILE_PX, TILE_PX, 3), np.uint8)
    tiles[:, 0, 0, 0] = (number * BATCH + np.arange(rows)) % 251
    return tiles


@given(st.integers(1, 4), st.lists(st.integers(1, BATCH), max_size=20), st.data())
def test_rows_come_back_in_order_whatever_is_in_flight(devices: int, sizes: list[int], data: st.DataObject) -> None:
    slots = Slots([FakeDevice() for _ in range(devices)])
    assert slots.depth == 2 * devices
    in_flight: list[tuple[int, int, int]] = []

    def take() -> None:
        ticket, number, rows = in_flight.pop(0)
        got = slots.result(ticket)["features"]
        tiles = batch_of(number, rows)
        assert got.shape == (rows, 2)
        np.testing.assert_array_equal(got[:, 0], tiles[:, 0, 0, 0])
        assert (got[:, 1] == tiles.astype(np.float32).sum()).all()  # padding is zeros: it adds nothing

    for number, rows in enumerate(sizes):
        while in_flight and (len(in_flight) == slots.depth or data.draw(st.booleans())):
            take()
        in_flight.append((slots.submit(batch_of(number, rows)), number, rows))
    while in_flight:
        take()


def test_results_are_the_callers_to_keep() -> None:
    slots = Slots([FakeDevice()])
    first = slots.result(slots.submit(batch_of(0)))["features"]
    before = first.copy()
    for number in range(1, 5):
        slots.result(slots.submit(batch_of(number)))
    np.testing.assert_array_equal(first, before)


def test_each_device_and_each_slot_has_its_turn() -> None:
    devices = [FakeDevice() for _ in range(3)]
    slots = Slots(devices)
    tickets = [slots.submit(batch_of(n)) for n in range(6)]
    for ticket in tickets:
        slots.result(ticket)
    assert [device.history for device in devices] == [[0, 1]] * 3


def test_a_seventh_batch_on_six_slots_is_our_mistake() -> None:
    slots = Slots([FakeDevice() for _ in range(3)])
    for number in range(6):
        slots.submit(batch_of(number))
    with pytest.raises(AssertionError, match="more batches in flight"):
        slots.submit(batch_of(6))


class Closing:
    def __init__(self, log: list[str], name: str, fails: bool) -> None:
        if fails:
            raise DeviceOutOfMemory("full")
        self.log, self.name = log, name
        log.append(f"open {name}")

    def close(self) -> None:
        self.log.append(f"close {self.name}")


def test_devices_open_all_or_none() -> None:
    log: list[str] = []
    openers = [partial(Closing, log, "a", False), partial(Closing, log, "b", False), partial(Closing, log, "c", True)]
    with pytest.raises(DeviceOutOfMemory):
        open_all(openers, Closing.close)
    assert log == ["open a", "open b", "close a", "close b"]


@given(st.integers(1, 600), st.integers(1, 600))
def test_without_room_the_batch_is_halved_and_that_is_said(batch: int, room: int) -> None:
    tried: list[int] = []

    def load(size: int) -> str:
        tried.append(size)
        if size > room:
            raise DeviceOutOfMemory("full")
        return "loaded"

    loaded, size, note = with_room(load, batch)
    assert loaded == "loaded"
    assert size == tried[-1] <= room
    assert all(smaller == larger // 2 for larger, smaller in pairwise(tried))
    assert note == ("" if size == batch else f"batch {size}, not {batch}: the GPU has no memory for more")


def test_no_room_for_one_tile_is_an_error_and_other_errors_are_not_retried() -> None:
    def full(size: int) -> str:
        raise DeviceOutOfMemory("full")

    def broken(size: int) -> str:
        assert size == 8, "tried again"
        raise BackendError("broken")

    with pytest.raises(DeviceOutOfMemory):
        with_room(full, 8)
    with pytest.raises(BackendError, match="broken"):
        with_room(broken, 8)
