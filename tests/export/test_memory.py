"""An export gives back what it no longer needs."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from mtdp_export.graph import Deployed, export_light
from mtdp_export.memory import release
from mtdp_export.pixels import Stated
from mtdp_export.source import open_source


def _large_storages() -> set[int]:
    """The addresses of all kernels in memory that a collector can see."""
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return {
        each.untyped_storage().data_ptr()
        for each in tensors
        if each.device.type == "cpu" and not torch._is_functional_tensor(each) and type(each) in _PLAIN
        if each.untyped_storage().nbytes() > 100_000
    }


_PLAIN = (torch.Tensor, torch.nn.Parameter)


@pytest.mark.filterwarnings("ignore")  # of torch's own modules, when a collector looks at their attributes
def test_a_network_that_is_written_leaves_no_weights_in_memory(tmp_path: Path) -> None:
    before = _large_storages()
    source = open_source("resnet18", "random", 64, False, stated=Stated(None, None, None, None, None, None))
    export_light(Deployed(source.network, source.pixels).eval(), {"name": "n", "arch": "a"}, tmp_path)
    assert _large_storages() - before
    release(source.network)
    assert not _large_storages() - before
    assert all(each.is_meta for each in source.network.parameters())
