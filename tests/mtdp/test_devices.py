"""What a machine offers: cores, and the precision that it is fast in."""

from __future__ import annotations

import os

import pytest
import torch

from mtdp.devices import choose_precision, usable_cores
from mtdp.errors import UsageError


def test_usable_cores_are_those_of_the_process() -> None:
    assert usable_cores() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("capability", "precision"),
    [((6, 1), "fp32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((12, 0), "bf16")],
    ids=["Pascal", "Volta", "Turing", "Ampere", "Blackwell"],
)
def test_auto_on_a_gpu_is_the_precision_that_its_tensor_cores_have(
    capability: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What PyTorch says of each GPU is written out here: none was asked."""

    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or capability >= (8, 0)

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision("auto", torch.device("cuda")) == precision
    assert choose_precision("fp16", torch.device("cuda")) == "fp16"


@pytest.mark.parametrize(
    ("flags", "precision"),
    [("avx512_fp16 amx_fp16", "fp32"), ("avx512_fp16 amx_fp16 amx_bf16", "bf16"), ("", "fp32")],
)
def test_auto_on_a_cpu_is_never_fp16(flags: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtdp.devices._cpuinfo", lambda: f"flags : {flags}")
    assert choose_precision("auto", torch.device("cpu")) == precision


def test_a_precision_that_is_none_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="'int8' is unknown"):
        choose_precision("int8", torch.device("cpu"))
