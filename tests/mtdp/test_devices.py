"""What a machine offers: cores, and the precision that it is fast in."""

from __future__ import annotations

import os

import pytest
import torch

from mtdp.devices import choose_precision, usable_cores


def test_usable_cores_are_those_of_the_process() -> None:
    assert usable_cores() == len(os.sched_getaffinity(0))


def test_a_gpu_that_only_emulates_bf16_trains_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert choose_precision("auto", torch.device("cuda")) == "fp32"
