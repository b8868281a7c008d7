"""Memory between the stages of an export: what one engine took is the next one's room."""

from __future__ import annotations

import ctypes
import gc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def release(network: nn.Module) -> None:
    """Free the numbers of a network that nobody will run again; its shapes and names stay.

    torch's exporter keeps the tensors that it traced, from C++, where no collector sees them: so they are emptied.
    """
    tensors = [*network.parameters(), *network.buffers()]
    network.to("meta")
    for tensor in tensors:
        tensor.data = tensor.data.new_empty(0)
    give_back()


def give_back() -> None:
    """Return freed memory to the system: where glibc keeps what a large network took, two stages add up."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own; other C libraries have none
    if trim is not None:
        trim(0)
