"""BreakHis by patient, on a miniature of its download."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from mtdp.breakhis import PatientScores, finetune_folds, load_folds, patient_accuracies, probe_folds, table, with_val
from mtdp.cli import app
from mtdp.errors import TaskError, UsageError
from mtdp.finetune import FinetuneConfig, FinetuneResult
from mtdp.tasks import Sample, Task
from mtdp.transfer import Colours, ProbeResult, Source

PATIENTS = [(kind, f"14-{number}{kind}") for kind in "BM" for number in range(10)]


@pytest.fixture
def download(tmp_path: Path) -> Path:
    """Ten benign and ten malignant patients, two images each at every magnification; a fifth is tested in each fold."""
    root = tmp_path / "BreaKHis_v1"
    lines: dict[int, list[str]] = {fold: [] for fold in range(1, 6)}
    for number, (kind, patient) in enumerate(PATIENTS):
        for scale in (40, 100, 200, 400):
            for image in (1, 2):
                name = f"SOB_{kind}_{'A' if kind == 'B' else 'DC'}-{patient}-{scale}-00{image}.png"
                path = root / "histology_slides" / "breast" / kind / patient / f"{scale}X" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 32), (200 if kind == "M" else 60, number, scale // 4)).save(path)
                for fold in lines:
                    part = "test" if number % 5 == fold - 1 else "train"
                    lines[fold].append(f"{name}|{scale}|{fold}|{part}")
    for fold, text in lines.items():
        (root / f"dsfold{fold}.txt").write_text("\n".join(text) + "\n")
    return root


def test_the_original_folds_are_read(download: Path) -> None:
    folds = load_folds(download)
    assert list(folds) == [40, 100, 200, 400]
    for tasks in folds.values():
        assert len(tasks) == 5
        assert [len(task.samples["test"]) for task in tasks] == [8] * 5
        tested = [sample.group for task in tasks for sample in task.samples["test"]]
        assert len(set(tested)) == 20, "every patient is tested once"
        for task in tasks:
            assert not {s.group for s in task.samples["train"]} & {s.group for s in task.samples["test"]}
            assert all(f"-{task.name.split('_')[1][:-1]}-00" in s.path.name for s in task.of(("train", "test")))


def test_a_patient_counts_once_however_many_images_it_has() -> None:
    samples = [Sample(Path(str(number)), 1, "many") for number in range(8)] + [Sample(Path("x"), 0, "one")]
    found = patient_accuracies([1.0] * 4 + [-1.0] * 4 + [-1.0], samples)
    assert found == {"many": 0.5, "one": 1.0}
    scores = PatientScores(40, (found, {"a": 1.0}))
    assert scores.of_folds == (0.75, 1.0)
    assert "| FE x | 87.50 ± 17.68 |" in table([scores], "FE x")


def test_each_fold_is_fitted_on_its_train_part_and_scored_within_patients(download: Path) -> None:
    """One patient's images look like the other class: its accuracy is 0, whichever fold tests it."""
    asked: list[int] = []

    def extract(source: Source, samples: Sequence[Sample]) -> NDArray[np.float32]:
        asked.append(len(samples))
        labels = [1 - s.label if s.group == "14-3M" else s.label for s in samples]
        return np.array([[label + 0.01 * row, 1] for row, label in enumerate(labels)], np.float32) * 3

    found = list(probe_folds(Colours(), download, extract=extract))
    assert asked == [40] * 4, "each image is computed once for a magnification"
    for one in found:
        assert one.of_folds == pytest.approx((1.0, 1.0, 1.0, 0.75, 1.0))
        assert one.folds[3]["14-3M"] == 0.0


def test_val_is_a_tenth_of_the_patients_of_train(download: Path) -> None:
    task = load_folds(download)[40][0]
    whole = with_val(task, 0)
    parts = {split: {s.group for s in samples} for split, samples in whole.samples.items()}
    assert len(parts["val"]) == 2
    assert parts["train"] | parts["val"] == {s.group for s in task.samples["train"]}
    assert not parts["train"] & parts["val"]
    assert {s.label for s in whole.samples["val"]} == {0, 1}
    assert whole.samples["test"] == task.samples["test"]
    assert with_val(task, 0).samples == whole.samples
    assert any(with_val(task, seed).samples != whole.samples for seed in range(1, 4))
    assert replace(whole, samples={}) == replace(task, samples={})


def test_the_command_prints_the_table(download: Path) -> None:
    result = CliRunner().invoke(app, ["breakhis", str(download), "--init", "colour"])
    assert result.exit_code == 0, result.output
    assert "| FE colour | 100.00 ± 0.00 | 100.00 ± 0.00 | 100.00 ± 0.00 | 100.00 ± 0.00 |" in result.stdout
    refused = CliRunner().invoke(app, ["breakhis", str(download), "--init", "random", "--finetune"])
    assert (refused.exit_code, refused.stderr.splitlines()[1]) == (2, "hint: add --out FOLDER")


def test_the_command_fine_tunes_too(download: Path, tmp_path: Path) -> None:
    options = ["--arch", "timm:test_resnet", "--image-px", "32", "--epochs", "1", "--lr", "1e-3", "-q"]
    out = ["--out", str(tmp_path / "tuned")]
    result = CliRunner().invoke(app, ["breakhis", str(download), "--init", "random", "--finetune", *options, *out])
    assert result.exit_code == 0, result.output
    assert "| FT random |" in result.stdout
    assert len(list((tmp_path / "tuned").glob("breakhis_*/result.json"))) == 20


def test_what_is_not_breakhis_is_named(download: Path) -> None:
    (download / "dsfold3.txt").rename(download / "kept.txt")
    with pytest.raises(UsageError, match=r"has no dsfold3\.txt"):
        load_folds(download)
    (download / "dsfold3.txt").write_text((download / "kept.txt").read_text().replace("|3|test", "|3|try", 1))
    with pytest.raises(TaskError, match=r"dsfold3\.txt: line \d+: NAME\|40\|1\|train was expected"):
        load_folds(download)
    (download / "dsfold3.txt").write_text((download / "kept.txt").read_text().replace("|3|test", "|3|train", 1))
    with pytest.raises(TaskError, match="is in train and in test"):
        load_folds(download)
    next(download.rglob("SOB_*.png")).unlink()
    with pytest.raises(TaskError, match="is missing"):
        load_folds(download)


def test_each_fold_is_fine_tuned_with_a_val_of_its_seed(
    download: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Task, FinetuneConfig, tuple[float, ...]]] = []

    def tuned(task: Task, config: FinetuneConfig, out: Path, rates: tuple[float, ...], **_: bool) -> FinetuneResult:
        seen.append((str(out.relative_to(tmp_path)), task, config, rates))
        outputs = tuple(1.0 for _ in task.of(("test",)))
        return FinetuneResult(task.name, "", "accuracy", 1e-3, 1, 1.0, 1.0, {}, outputs)

    monkeypatch.setattr("mtdp.breakhis.finetune_best", tuned)
    config = FinetuneConfig("resnet18", "random", seed=2)
    found = list(finetune_folds(config, download, tmp_path, (1e-3, 1e-4)))
    assert [one.of_folds for one in found] == [(0.5,) * 5] * 4, "all taken for malignant: right on half of the patients"
    wanted = [task for tasks in load_folds(download).values() for task in tasks]
    assert [out for out, *_ in seen] == [task.name for task in wanted]
    for (_, task, setting, rates), plain in zip(seen, wanted, strict=True):
        assert task.samples == with_val(plain, 2).samples
        assert (setting, rates) == (config, (1e-3, 1e-4))
    assert any(with_val(task, 0).samples != with_val(task, 2).samples for task in wanted)


def test_the_seed_of_a_probe_is_that_of_its_svms(download: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    def judged(features: NDArray[np.float32], task: Task, description: str, seed: int, *rest: object) -> ProbeResult:
        seeds.append((seed, *rest))
        return ProbeResult(task.name, "", "accuracy", 1.0, 1.0, {}, {}, True, (1.0,) * len(task.of(("test",))))

    monkeypatch.setattr("mtdp.breakhis.judge_features", judged)
    list(probe_folds(Colours(), download, seed=6))
    assert seeds == [(6, ("train",), "test")] * 20
