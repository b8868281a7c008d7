"""Whether the head of a Ray cluster is there: asked before Ray asks, which would take minutes, or end the process."""

from __future__ import annotations

import socket
import time
from typing import Final

from mtdp_runtime.errors import BackendError

_REACH_S: Final = 5.0
_LOOK_EVERY_S: Final = 5.0
GONE_S: Final = 40.0  # a new head may take its place until then; Ray itself ends this process after 60


class Head:
    """The cluster's head, as far as it can be reached; None: one that dies with us."""

    def __init__(self, address: str | None) -> None:
        self.there, self.gone = True, False
        self._address, self._seen_s, self._looked_s = address, time.monotonic(), 0.0

    def look(self, now_s: float) -> None:
        """Look now and then whether it is there.

        Raises:
            BackendError: it has not been for long.
        """
        if self._address is None or now_s < self._looked_s + _LOOK_EVERY_S:
            return
        self._looked_s = now_s
        try:
            look_for(self._address)
        except OSError:
            self.there, self.gone = False, now_s - self._seen_s > GONE_S
        else:
            self.there, self._seen_s = True, now_s
        if self.gone:
            raise BackendError(
                f"the Ray cluster is gone: nobody listens at {self._address}",
                hint="Start it again; the same command goes on.",
            )


def look_for(address: str | None) -> None:
    """Make sure that somebody listens at HOST:PORT: Ray itself would try for minutes.

    Raises:
        OSError: nobody does.
    """
    host, _, port = (address or "").rpartition(":")
    if "/" in host or not (host and port.isdecimal()):
        return  # auto, and what else Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH_S).close()
    except (OverflowError, ValueError):
        raise OSError(f"there is no port {port}") from None
