"""The folder beside a bundle's place in which the bundle is made, until it is whole."""

from __future__ import annotations

import os
from pathlib import Path


def scratch_of(out: Path) -> Path:
    """Return the folder in which this process, or one that it starts, makes the bundle `out`."""
    out = out.absolute()
    return out.with_name(f".{out.name}.{os.getpid()}.partial")
