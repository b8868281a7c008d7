"""What `auto` takes on a CPU: int8 only where a task judged it; the engine that was measured to be faster, and kept."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtdp_runtime.backends import Backend, load, preferred
from mtdp_runtime.backends.judged import judged_int8
from mtdp_runtime.backends.openvino import OpenVINO
from mtdp_runtime.bundle import Bundle, file_ref, load_bundle, write_manifest
from mtdp_runtime.bundle.golden import load_golden
from mtdp_runtime.bundle.manifest import Parity, Variant
from mtdp_runtime.commands import bench

SLOW_BF16 = replace(OpenVINO.probe(), precisions=("fp32", "bf16", "fp16", "int8"))
FAST_BF16 = replace(SLOW_BF16, precisions=("bf16", "fp32", "fp16", "int8"))


@pytest.fixture(autouse=True)
def _slow_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU whose bf16 is no faster, whatever this one is, and an empty cache."""
    monkeypatch.setenv("MTDP_CACHE", str(tmp_path / "cache" / "mtdp"))
    monkeypatch.setattr(OpenVINO, "probe", lambda: SLOW_BF16)
    monkeypatch.setattr(OpenVINO, "auto_batch", lambda threads: 4)


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return load_bundle(tiny_bundle)


class TestInt8:
    def with_int8(
        self, bundle: Bundle, folder: Path, int8: float | None, fp32: float | None, wrong: bool = False
    ) -> Bundle:
        """The bundle with an int8 variant that a probe gave this score; its file is the fp32 graph, or a wrong one."""
        shutil.copytree(bundle.path, folder)
        shutil.copy(folder / "model.fp32.onnx", folder / "model.int8.onnx")
        golden = bundle.manifest.golden
        if wrong:  # what was exported is another network's
            tiles, outputs = load_golden(folder / "golden.npz")
            np.savez(folder / "golden.npz", tiles=tiles, features=outputs["features"][:, ::-1])
            golden = file_ref(folder, "golden.npz")
        parity = Parity("openvino", 4, 0.995, 0.998, 0.1, probe_score=int8, probe_score_fp32=fp32)
        variants = (*bundle.manifest.variants, Variant("int8", file_ref(folder, "model.int8.onnx"), parity))
        write_manifest(folder, replace(bundle.manifest, variants=variants, golden=golden))
        return load_bundle(folder)

    @pytest.mark.parametrize(
        ("int8", "fp32", "taken"),
        [
            (0.9, 0.9, "int8"),
            (0.95, 0.9, "int8"),
            (0.896, 0.9, "int8"),
            (0.89, 0.9, "fp32"),
            (None, None, "fp32"),
            (0.9, None, "fp32"),
            (float("nan"), 0.9, "fp32"),
        ],
    )
    def test_auto_takes_it_where_a_probe_lost_at_most_half_a_point(
        self, bundle: Bundle, tmp_path: Path, int8: float | None, fp32: float | None, taken: str
    ) -> None:
        with_it = self.with_int8(bundle, tmp_path / "b", None, None)
        (plain, low) = with_it.manifest.variants
        low = replace(low, parity=replace(low.parity, probe_score=int8, probe_score_fp32=fp32))
        with_it = replace(with_it, manifest=replace(with_it.manifest, variants=(plain, low)))
        assert bool(judged_int8(with_it.manifest)) == (taken == "int8")
        with OpenVINO.load(with_it, "auto", 4, 1) as engine:
            assert engine.precision == taken
            assert (f"a probe scores {int8:.3f} on it, {fp32:.3f} in fp32" in engine.note) if taken == "int8" else True

    def test_it_must_repeat_the_golden_features_here_at_each_start(self, bundle: Bundle, tmp_path: Path) -> None:
        wrong = self.with_int8(bundle, tmp_path / "b", 0.9, 0.9, wrong=True)
        for _ in range(2):  # the second time by what is kept of the first
            with OpenVINO.load(wrong, "auto", 4, 1) as engine:
                assert engine.precision == "fp32"
                assert engine.note.startswith("not int8: this model in int8 has a cosine of")

    def test_bf16_that_is_fast_comes_before_it_and_fp32_is_what_is_left(
        self, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[str] = []

        def fails(bundle: Bundle, precision: str, batch: int, threads: int) -> tuple[None, str]:
            asked.append(precision)
            return None, "fails"

        monkeypatch.setattr(OpenVINO, "probe", lambda: FAST_BF16)
        monkeypatch.setattr(OpenVINO, "_proven", fails)
        with OpenVINO.load(self.with_int8(bundle, tmp_path / "b", 0.9, 0.9), "auto", 4, 1) as engine:
            assert (asked, engine.precision) == (["bf16", "int8"], "fp32")
            assert engine.note.count("fails (--precision") == 2

    def test_what_was_asked_for_is_had(self, bundle: Bundle, tmp_path: Path) -> None:
        with OpenVINO.load(self.with_int8(bundle, tmp_path / "b", 0.9, 0.9), "fp32", 4, 1) as engine:
            assert engine.precision == "fp32"


def rates(monkeypatch: pytest.MonkeyPatch, *ratios: float) -> list[str]:
    """Let ONNX Runtime be so many times as fast in each pair; the returned list gets who was measured."""
    measured: list[str] = []

    def rate(engine: Backend, tiles: int, tile_px: int) -> float:
        measured.append(engine.name.split()[0])
        return ratios[(len(measured) - 1) // 2] if measured[-1] == "onnxruntime" else 1.0

    monkeypatch.setattr(preferred, "infer_rate", rate)
    return measured


class TestTheFasterEngine:
    def measure(self, bundle: Bundle) -> tuple[str, str]:
        with OpenVINO.load(bundle, "fp32", 4, 1) as engine:
            return preferred.decide(bundle, engine, 1)

    def test_without_a_measurement_it_is_openvino_and_nothing_is_measured(
        self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        measured = rates(monkeypatch)
        with load("auto", bundle, "auto", None, 1)[0] as engine:
            assert engine.name.startswith("openvino")
        assert not measured

    def test_what_was_measured_is_taken_and_said(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        rates(monkeypatch, 1.1, 1.2, 1.15, 1.1, 1.3)
        assert self.measure(bundle)[0] == "onnxruntime"
        engine, reason = load("auto", bundle, "auto", None, 1)
        with engine:
            assert (engine.name.split()[0], engine.precision, engine.batch) == ("onnxruntime", "fp32", 4)
        assert reason == (
            "measured here by mtdp-bench: ONNX Runtime was 1.15 times as fast as OpenVINO in fp32, "
            "1.10 to 1.30 in 5 pairs"
        )

    def test_it_is_decided_once(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        rates(monkeypatch, 1.1, 1.2, 1.15, 1.1, 1.3)
        first = self.measure(bundle)
        measured = rates(monkeypatch, 0.5, 0.5, 0.5, 0.5, 0.5)
        assert self.measure(bundle) == first
        assert not measured, "a cohort's engine would change with the machine's load"

    @pytest.mark.parametrize(("batch", "threads", "precision"), [(8, 1, "auto"), (4, 2, "auto"), (4, 1, "fp16")])
    def test_another_batch_or_other_threads_or_a_precision_by_name_are_another_matter(
        self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, batch: int, threads: int, precision: str
    ) -> None:
        rates(monkeypatch, 2.0, 2.0, 2.0, 2.0, 2.0)
        self.measure(bundle)
        monkeypatch.setattr(Bundle, "holds", lambda self, one: one == "fp32" or one == precision)
        monkeypatch.setattr(Bundle, "variant", lambda self, one: self.manifest.variants[0])
        with load("auto", bundle, precision, batch, threads)[0] as engine:
            assert engine.name.startswith("openvino")

    def test_openvino_by_name_is_openvino(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        rates(monkeypatch, 2.0, 2.0, 2.0, 2.0, 2.0)
        self.measure(bundle)
        with load("openvino", bundle, "auto", 4, 1)[0] as engine:
            assert engine.name.startswith("openvino")

    @pytest.mark.parametrize("damage", [b"", b"{}", b'{"engine": "rm", "ratios": [1]}', b'{"engine": "onnxruntime"}'])
    def test_a_kept_decision_that_is_damaged_decides_nothing(
        self, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes
    ) -> None:
        from mtdp_runtime.files import save_with_digest

        rates(monkeypatch, 2.0, 2.0, 2.0, 2.0, 2.0)
        self.measure(bundle)
        (kept,) = (tmp_path / "cache" / "mtdp" / "preferred").iterdir()
        kept.write_bytes(kept.read_bytes()[:-1])
        assert preferred.recall(bundle, 4, 1) == ("", "")
        save_with_digest(kept, damage)
        assert preferred.recall(bundle, 4, 1) == ("", "")

    @given(st.lists(st.floats(0.5, 2), min_size=5, max_size=5))
    def test_the_other_must_be_faster_in_every_pair_and_clearly(self, ratios: list[float]) -> None:
        taken = preferred.winner(ratios)
        assert taken == ("onnxruntime" if min(ratios) > 1 and sorted(ratios)[2] >= 1.03 else "openvino")

    def test_the_bench_measures_it_and_says_so(self, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
        with OpenVINO.load(bundle, "fp32", 4, 1) as engine:
            found = bench._what_auto_takes(bundle, engine, 1)
        assert found["auto_takes"] in ("openvino", "onnxruntime")
        assert json.loads(json.dumps(found))["auto_reason"].endswith("in 5 pairs")
