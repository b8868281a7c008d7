"""Decoded tiles of a file, each decoded once while it is needed, in bounded memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock

import numpy as np
from numpy.typing import NDArray

Key = tuple[int, int]  # level, number of the tile in it


class TileCache:
    """The tiles used last. Any number of threads may ask; the first to ask for a tile decodes it, the others wait."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._tiles: OrderedDict[Key, Future[NDArray[np.uint8]]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Key, decode: Callable[[Key], NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Return the tile, not to be changed. An error of `decode` goes to all who wait, and is not remembered."""
        with self._lock:
            future = self._tiles.get(key)
            if future is not None:
                self._tiles.move_to_end(key)
            else:
                mine: Future[NDArray[np.uint8]] = Future()
                self._tiles[key] = mine
        if future is not None:
            return future.result()
        try:
            tile = decode(key)
        except BaseException as error:
            with self._lock:
                del self._tiles[key]
            mine.set_exception(error)
            raise
        mine.set_result(tile)
        with self._lock:
            self._bytes += tile.nbytes
            self._evict()
        return tile

    def _evict(self) -> None:
        for key, future in list(self._tiles.items()):
            if self._bytes <= self._limit_bytes:
                return
            if future.done():
                del self._tiles[key]
                self._bytes -= future.result().nbytes
