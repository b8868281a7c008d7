"""Feature extraction and the linear probe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.svm import LinearSVC

from mtdp.errors import TaskError, TrainingDiverged, UsageError
from mtdp.preprocess import IMAGENET_MEAN, IMAGENET_STD
from mtdp.pretrain import pretrain
from mtdp.pretrain_config import PretrainConfig
from mtdp.tasks import Sample, load_pool, load_task
from mtdp.transfer import C_GRID, best_c, cross_validate, extract_features, load_extractor, probe_task

Make = Callable[..., Path]


def test_c_runs_over_the_papers_grid() -> None:
    assert [round(np.log10(c)) for c in C_GRID] == list(range(-10, 1))


def test_of_equal_scores_the_smallest_c_wins() -> None:
    assert best_c({1e-2: 0.5, 1e-1: 0.9, 1.0: 0.9}) == 1e-1


def test_features_are_those_of_the_central_square(pool_file: Path) -> None:
    extractor = load_extractor("random", "resnet18", seed=1)
    samples = load_pool(pool_file)[0].of(["test"])[:3]  # 40 x 56 pixels
    got = extract_features(extractor, samples, precision="fp32", batch_size=2)
    assert got.shape == (3, 512)
    assert got.dtype == np.float32
    wanted = []
    for sample in samples:
        with Image.open(sample.path) as image:
            large = np.asarray(image.resize((224, 314), Image.Resampling.BILINEAR))
        x = (large[45:269] / 255 - IMAGENET_MEAN) / IMAGENET_STD
        with torch.no_grad():
            wanted.append(extractor.backbone(torch.tensor(x, dtype=torch.float32).permute(2, 0, 1)[None])[0].numpy())
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)


def separable(groups: int, per_group: int, classes: int = 2) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(0)
    labels = np.arange(groups * per_group) % classes
    features = rng.normal(0, 0.1, (len(labels), 4)).astype(np.float32)
    features[np.arange(len(labels)), labels] += 3
    return features, labels.astype(np.int64), [f"g{row // per_group}" for row in range(len(labels))]


def test_folds_never_split_a_group() -> None:
    """Features that name the group: within a group they predict the label; of an unseen group they say nothing."""
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(40), 5)
    labels = rng.integers(0, 2, 40)[groups].astype(np.int64)
    features = np.eye(40, dtype=np.float32)[groups]
    assert LinearSVC(C=1.0).fit(features, labels).score(features, labels) == 1.0
    scores = cross_validate(features, labels, [str(group) for group in groups], "accuracy")
    assert max(scores.values()) < 0.75


@pytest.mark.parametrize(("classes", "metric"), [(2, "roc_auc"), (2, "accuracy"), (3, "accuracy")])
def test_separable_classes_are_told_apart(classes: int, metric: str) -> None:
    scores = cross_validate(*separable(10, 6, classes), metric)
    assert scores[1.0] == 1.0
    assert set(scores) == set(C_GRID)


def test_a_fold_without_both_classes_is_left_out_of_a_roc_auc() -> None:
    features, labels, groups = separable(6, 4)
    labels[:4] = 0  # one group, so one fold in some splits, has a single class
    features[:4] = [3, 0, 0, 0]
    scores = cross_validate(features, labels, groups, "roc_auc")
    assert all(np.isfinite(score) for score in scores.values())


def test_too_few_groups_are_refused() -> None:
    features, labels, _ = separable(4, 4)
    with pytest.raises(TaskError, match="two groups"):
        cross_validate(features, labels, ["one"] * 16, "accuracy")
    with pytest.raises(TaskError, match="both classes"):
        cross_validate(features, labels, [str(label) for label in labels], "roc_auc")


def test_a_probe_fits_on_train_and_val_and_scores_on_test(tmp_path: Path, make_task: Make) -> None:
    task = load_task(make_task(tmp_path / "colour", ("blue", "green", "red"), per_class=6))
    result = probe_task(load_extractor("random", "resnet18"), task, precision="fp32")
    assert (result.task, result.metric, result.images) == ("colour", "accuracy", {"fit": 36, "test": 18})
    assert result.score == 1.0  # colours: even random features tell them apart
    assert result.c in C_GRID
    assert len(result.cross_validation) == 11


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_probe_computes_in_the_precision_that_is_asked_for(
    pool_file: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    asked = []

    def extract(source: object, samples: tuple[Sample, ...], precision: str) -> NDArray[np.float32]:
        asked.append((source, samples, precision))
        return np.eye(len(samples), 4, dtype=np.float32)

    monkeypatch.setattr("mtdp.transfer.extract_features", extract)
    extractor, task = load_extractor("random", "resnet18", image_px=32), load_pool(pool_file)[0]
    probe_task(extractor, task, precision=precision)
    assert asked == [(extractor, task.of(("train", "val")) + task.of(("test",)), precision)]


def test_a_probe_without_a_test_split_is_refused(tmp_path: Path, make_task: Make) -> None:
    folder = make_task(tmp_path / "t")
    (folder / "test").rename(tmp_path / "elsewhere")
    with pytest.raises(TaskError, match="no test split"):
        probe_task(load_extractor("random", "resnet18"), load_task(folder))


def test_a_source_that_names_no_architecture_needs_one() -> None:
    with pytest.raises(UsageError, match="does not name its architecture") as caught:
        load_extractor("random")
    assert "--arch" in caught.value.hint


def test_features_that_are_not_finite_are_said(pool_file: Path) -> None:
    extractor = load_extractor("random", "resnet18", image_px=32)
    extractor.backbone.trunk.bn1.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="gives features that are not finite"):
        probe_task(extractor, load_pool(pool_file)[0], precision="fp32")


def test_a_negative_seed_is_wrong_usage(pool_file: Path) -> None:
    with pytest.raises(UsageError, match="seed is -1"):
        probe_task(load_extractor("random", "resnet18"), load_pool(pool_file)[0], seed=-1)


def test_the_side_of_a_checkpoint_is_its_own_unless_one_is_asked_for(pool_file: Path, tmp_path: Path) -> None:
    config = PretrainConfig("resnet18", "random", 1, 0, batch_size=2, image_px=32, precision="fp32")
    pretrain(load_pool(pool_file), config, tmp_path / "run", quiet=True)
    assert load_extractor(str(tmp_path / "run")).preprocessing.image_px == 32
    assert load_extractor(str(tmp_path / "run"), image_px=64).preprocessing.image_px == 64
