"""`auto` for threads and batches: what the process may use, and a fixed number."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mtdp_runtime.backends import BACKENDS, auto_batch, backend_class, load
from mtdp_runtime.bundle import load_bundle
from mtdp_runtime.commands.options import count_or_auto
from mtdp_runtime.errors import UsageError
from mtdp_runtime.machine import usable_cores
from support import extract


@pytest.mark.parametrize(
    ("quota", "share"),
    [("max 100000", 64), ("100000 100000", 1), ("150000 100000", 2), ("1000 100000", 1), ("nonsense", 64), ("1 0", 64)],
)
def test_a_containers_share_counts_where_it_is_less_than_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, share: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    file = tmp_path / "cpu.max"
    file.write_text(quota + "\n")
    assert usable_cores(file) == share
    assert usable_cores(tmp_path / "absent") == 64


def test_a_count_is_a_number_or_auto() -> None:
    assert count_or_auto("--batch", "auto") is None
    assert count_or_auto("--batch", "32") == 32
    for text in ("0", "-1", "1.5", "", "all", "\u00b2"):
        with pytest.raises(UsageError, match="--batch"):
            count_or_auto("--batch", text)


def test_every_rung_has_a_batch_of_its_own(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [auto_batch(threads) for threads in (1, 2, 3, 4, 8, 64)] == [4, 4, 6, 8, 16, 16]
    monkeypatch.setattr("mtdp_runtime.backends.openvino.cpuinfo", lambda: "avx512f")
    cpu = {"openvino": 6, "onnxruntime": 6}
    assert {name: backend_class(name).auto_batch(3) for name in BACKENDS} == dict.fromkeys(BACKENDS, 64) | cpu
    for name in cpu:
        with load(name, load_bundle(tiny_bundle), "fp32", None, 1)[0] as engine:
            assert engine.batch == 4
    monkeypatch.setattr("mtdp_runtime.backends.openvino.cpuinfo", lambda: "amx_bf16")
    assert backend_class("openvino").auto_batch(3) == 16


def test_a_wrong_count_is_said_before_any_work(tmp_path: Path) -> None:
    result = extract(tmp_path / "absent.svs", "--out", tmp_path / "o", "--threads", "many")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: --threads 'many': not a number",
        "hint: A whole number from 1 on, or auto.",
    ]
