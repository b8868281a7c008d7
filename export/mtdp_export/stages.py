"""What an export is doing, said while it works: some stages take minutes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from mtdp_export.isolated import goes_on
from mtdp_runtime.printable import printable

Loudness = Literal["quiet", "stages", "timed"]


@dataclass(frozen=True, slots=True)
class Stages:
    """Names each stage on stderr as it begins; "timed" says afterwards what it took."""

    loudness: Loudness = "quiet"

    @contextmanager
    def stage(self, what: str) -> Iterator[None]:
        """Say what is being done.

        Args:
            what: in the form "tracing the network to ONNX".
        """
        goes_on()
        what = printable(what)
        if self.loudness != "quiet":
            print(f"{what} ...", file=sys.stderr, flush=True)
        start = time.monotonic()
        yield
        if self.loudness == "timed":
            print(f"{what}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
