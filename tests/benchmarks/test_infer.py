"""benchmarks/infer.py: what runs of a network, and that a way which fails costs its own row."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np

from support import script

infer = script("infer")
BUNDLES = {"fp32": Path("fp32")}


def test_a_transformer_is_compiled_and_has_no_second_layout() -> None:
    names = [way.name for way in infer.ways_of("timm:vit_small_patch16_224", 2, BUNDLES)]
    assert {"torch fp32, as built", "torch fp32, compiled", "onnxruntime fp32", "openvino fp32"} <= set(names)
    assert "torch fp32, channels last" not in names
    assert "openvino int8" not in names  # nothing was quantised
    names = [way.name for way in infer.ways_of("resnet50", 2, BUNDLES | {"int8": Path("int8")})]
    assert {"torch fp32, channels last", "openvino int8"} <= set(names)


def test_a_way_that_fails_says_why() -> None:
    ours, theirs = multiprocessing.Pipe()
    infer.serve(theirs, infer.Way("onnxruntime", "fp32", "/nowhere", "resnet18", 1), np.zeros((1, 8, 8, 3), np.uint8))
    assert "/nowhere" in ours.recv()


def test_the_table_compares_with_torchs_fastest() -> None:
    rates = {"a": {"torch fp32, as built": 2.0, "torch bf16, compiled": 4.0, "openvino bf16": 10.0}}
    rates["b"] = {"torch fp32, as built": 1.0}
    header, *rows = [line.split(" | ") for line in infer.table(rates).splitlines()]
    assert [cell.strip() for cell in header[1:]] == ["a", "b"]
    assert [cell.strip() for cell in rows[2]] == ["openvino bf16", "10.0 (2.50)", "-"]


def test_without_torch_there_is_a_rate_and_no_comparison() -> None:
    assert infer.table({"a": {"openvino fp32": 3.0}}).splitlines()[1].endswith("| 3.0 (nan)")
