"""Decoded tiles of a file, each decoded once while it is needed, in bounded memory that is used again.

A fresh array of a tile's size costs a third of what decoding into it does: the kernel clears its pages, again and
again. So the memory of a dropped tile becomes the next one's; a tile that somebody still reads is never dropped.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Condition
from typing import Final

import numpy as np
from numpy.typing import NDArray

Key = tuple[int, int, int]  # level, reduction by the decoder, number of the tile in the level
Decode = Callable[[Key, NDArray[np.uint8]], None]

_SPARE: Final = 8  # dropped tiles whose memory is kept, beyond the limit


@dataclass(slots=True)
class _Entry:
    tile: NDArray[np.uint8]
    users: int = 1
    ready: bool = False
    error: BaseException | None = None


class TileCache:
    """The tiles used last. Any number of threads may ask; the first to ask for a tile decodes it, the others wait."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._tiles: OrderedDict[Key, _Entry] = OrderedDict()
        self._spare: list[NDArray[np.uint8]] = []
        self._changed = Condition()
        self._waiting = 0

    def limit(self, limit_bytes: int) -> None:
        """Hold no more than this from now on."""
        self._limit_bytes = limit_bytes

    def acquire(self, key: Key, shape: tuple[int, int, int], decode: Decode) -> NDArray[np.uint8]:
        """Return uint8[shape], not to be changed, and kept as it is until `release`.

        An error of `decode` goes to all who wait, and is not remembered; nothing is to be released then.
        """
        with self._changed:
            entry = self._tiles.get(key)
            if entry is not None:
                self._tiles.move_to_end(key)
                entry.users += 1
                while not entry.ready:
                    self._waiting += 1
                    self._changed.wait()
                    self._waiting -= 1
                if entry.error is not None:
                    raise entry.error
                return entry.tile
            entry = self._tiles[key] = _Entry(self._memory(shape))
        try:
            decode(key, entry.tile)
        except BaseException as error:
            entry.error = error
            with self._changed:
                entry.ready = True
                self._bytes -= entry.tile.nbytes
                del self._tiles[key]
                self._changed.notify_all()
            raise
        with self._changed:
            entry.ready = True
            if self._waiting:
                self._changed.notify_all()
        return entry.tile

    def release(self, key: Key) -> None:
        """Say that the tile is not looked at any more."""
        with self._changed:
            self._tiles[key].users -= 1

    def holds(self, key: Key) -> bool:
        """Tell whether the tile is here, or on its way."""
        return key in self._tiles

    def _memory(self, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
        """Return memory for a tile; the oldest tiles that nobody looks at make room."""
        needed = shape[0] * shape[1] * shape[2]
        while self._bytes + needed > self._limit_bytes:
            oldest = next((key for key, entry in self._tiles.items() if not entry.users), None)
            if oldest is None:
                break
            dropped = self._tiles.pop(oldest).tile
            self._bytes -= dropped.nbytes
            if len(self._spare) < _SPARE:
                self._spare.append(dropped)
        self._bytes += needed
        while self._spare:
            tile = self._spare.pop()
            if tile.shape == shape:
                return tile
        return np.empty(shape, np.uint8)
