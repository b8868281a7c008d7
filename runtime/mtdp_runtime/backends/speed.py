"""Tiles per second of an engine alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

import numpy as np

from mtdp_runtime.backends import Backend

_LEAST_S: Final = 1.0  # of measuring the engine
_MOST_BATCHES: Final = 50


def infer_rate(engine: Backend, tiles: int, tile_px: int) -> float:
    """Run the model on so many tiles of noise, after a batch to warm up, with nothing to wait for; return tiles/s.

    Batches overlap as they do in a run. What is left of the tiles after whole batches is not run.
    """
    shape = (engine.batch, tile_px, tile_px, 3)
    batches = [np.random.default_rng(i).integers(0, 256, shape, np.uint8) for i in range(engine.depth)]
    count = max(1, tiles // engine.batch)
    engine.result(engine.submit(batches[0]))
    tickets: list[int] = []
    start = time.perf_counter()
    for i in range(count):
        if len(tickets) == engine.depth:
            engine.result(tickets.pop(0))
        tickets.append(engine.submit(batches[i % engine.depth]))
    for ticket in tickets:
        engine.result(ticket)
    return count * engine.batch / (time.perf_counter() - start)


@dataclass(frozen=True, slots=True)
class EngineSpeed:
    """Tiles a second of the engine alone, and over how many that was measured."""

    engine: str
    tiles_per_s: float
    tiles: int


def engine_speed(backend: Backend, tile_px: int) -> EngineSpeed:
    """Run tiles of noise for about a second, after one batch to warm up; batches overlap as they do in a run.

    Raises:
        BackendError: the engine fails.
    """
    batch = np.random.default_rng(0).integers(0, 256, (backend.batch, tile_px, tile_px, 3), np.uint8)
    backend.result(backend.submit(batch))
    waiting: list[int] = []
    submitted = done = 0
    start = time.perf_counter()
    while not done or (time.perf_counter() - start < _LEAST_S and submitted < _MOST_BATCHES):
        while len(waiting) < backend.depth:
            waiting.append(backend.submit(batch))
            submitted += 1
        backend.result(waiting.pop(0))
        done += 1
    for ticket in waiting:
        backend.result(ticket)
        done += 1
    tiles = done * backend.batch
    return EngineSpeed(f"{backend.name}, {backend.precision}", tiles / (time.perf_counter() - start), tiles)
