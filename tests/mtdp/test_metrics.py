"""Scores and their intervals, against scikit-learn and against resampling written out plainly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, recall_score, roc_auc_score

from mtdp.few_labels import directions, drawn_groups, nearest_mean, nearest_neighbours, retrieval_precision
from mtdp.metrics import (
    REPLICATES,
    Truth,
    balanced_accuracy,
    class_accuracies,
    group_weights,
    interval,
    percentiles,
    predicted,
    resampled_means,
    resampled_scores,
    score_outputs,
)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 1)), min_size=2, max_size=40))
def test_roc_auc_is_that_of_scikit_learn_ties_included(rows: list[tuple[int, int]]) -> None:
    outputs, labels = (np.array(column) for column in zip(*rows, strict=True))
    if len(set(labels.tolist())) == 2:
        found = score_outputs(outputs.astype(float), labels, "roc_auc", 2)
        assert found == pytest.approx(roc_auc_score(labels, outputs))


def test_accuracy_of_two_classes_is_by_the_sign_of_the_margin_and_of_more_by_the_class() -> None:
    assert predicted(np.array([-0.1, 0.0, 0.1]), 2).tolist() == [0, 0, 1]
    assert score_outputs(np.array([-1.0, 2.0, 3.0]), np.array([0, 0, 1]), "accuracy", 2) == pytest.approx(2 / 3)
    assert score_outputs(np.array([2.0, 1.0, 0.0]), np.array([2, 1, 1]), "accuracy", 3) == pytest.approx(2 / 3)


def test_balanced_accuracy_and_the_classes_own_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels, found = rng.integers(0, 4, 90), rng.integers(0, 4, 90)
    outputs = found.astype(float)
    assert class_accuracies(outputs, labels, 4) == pytest.approx(recall_score(labels, found, average=None))
    assert balanced_accuracy(outputs, labels, 4) == pytest.approx(balanced_accuracy_score(labels, found))


def test_whole_groups_are_resampled() -> None:
    weights = group_weights(["a", "b", "a", "c", "b"])
    assert weights.shape == (REPLICATES, 5)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()
    assert weights.mean() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("metric", ["accuracy", "roc_auc"])
def test_a_resample_scores_as_the_images_written_out(metric: str) -> None:
    rng = np.random.default_rng(1)
    groups = tuple(f"g{number}" for number in rng.integers(0, 12, 60))
    labels = rng.integers(0, 2, 60)
    runs = [rng.normal(labels, 1.5).round(1) - 0.5 for _ in range(2)]
    truth = Truth(labels, groups, metric, 2)
    found = resampled_scores([tuple(run.tolist()) for run in runs], truth)
    weights = group_weights(groups)
    means = resampled_means(runs[0], groups)
    for row in (0, 7, 99):
        drawn = np.repeat(np.arange(60), weights[row].astype(int))
        assert means[row] == pytest.approx(runs[0][drawn].mean())
        scores = [
            roc_auc_score(labels[drawn], run[drawn])
            if metric == "roc_auc"
            else float(((run[drawn] > 0) == labels[drawn]).mean())
            for run in runs
        ]
        assert found[row] == pytest.approx(np.mean(scores))
    assert interval([tuple(run.tolist()) for run in runs], truth) == pytest.approx(
        tuple(np.quantile(found, [0.025, 0.975]))
    )


def test_an_interval_knows_that_images_of_a_group_are_not_independent() -> None:
    """The same 400 right and wrong images: of 400 groups, and of 10."""
    right = np.repeat(np.arange(10) < 7, 40).astype(float)
    of_many = percentiles(resampled_means(right, [str(number) for number in range(400)]))
    of_few = percentiles(resampled_means(right, [str(number // 40) for number in range(400)]))
    assert of_many is not None
    assert of_few is not None
    assert of_few[1] - of_few[0] > 4 * (of_many[1] - of_many[0])
    assert of_many[0] == pytest.approx(0.7 - 1.96 * (0.21 / 400) ** 0.5, abs=0.01)


def test_of_one_group_nothing_can_be_said() -> None:
    assert interval([(1.0, 0.0)], Truth(np.array([1, 0]), ("g", "g"), "accuracy", 3)) is None


def test_a_resample_without_a_score_is_left_out_of_the_interval() -> None:
    """Three groups, one of which alone has the positives: a resample without it has no ROC AUC."""
    truth = Truth(np.array([0, 1, 0, 0]), ("a", "a", "b", "c"), "roc_auc", 2)
    replicates = resampled_scores([(0.0, 1.0, 0.2, 2.0)], truth)
    assert 0.2 < np.isnan(replicates).mean() < 0.4  # (2/3)^3
    sound = replicates[~np.isnan(replicates)]
    assert percentiles(replicates) == pytest.approx(tuple(np.quantile(sound, [0.025, 0.975])))
    assert percentiles(np.full(3, np.nan)) is None


def test_a_class_without_an_image_has_no_say_in_the_balanced_accuracy() -> None:
    assert balanced_accuracy(np.array([0.0, 0.0, 1.0]), np.array([0, 1, 1]), 3) == pytest.approx(0.75)


# --- few labels -------------------------------------------------------------------------------------------------------


def test_the_nearest_mean_and_the_neighbours_are_by_direction() -> None:
    fit = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], np.float32)
    labels = np.array([0, 0, 1, 1])
    judged = np.array([[5, 0.3], [0.2, 9]], np.float32)
    for outputs in (nearest_mean(fit, labels, judged, 2), nearest_neighbours(fit, labels, judged, 2, 2)):
        assert outputs[0] < 0 < outputs[1]
    three = nearest_mean(np.vstack([fit, [[-3, -3]]]).astype(np.float32), np.array([0, 0, 1, 1, 2]), fit, 3)
    assert three.tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(np.linalg.norm(directions(fit, fit.mean(0)), axis=1), 1)


def test_few_groups_are_drawn_of_each_class_and_none_where_there_are_too_few() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 0])
    groups = ["a", "a", "b", "c", "d", "e", "a", "c"]
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(50):
        rows = drawn_groups(labels, groups, 2, 2, rng)
        assert rows is not None
        for label in (0, 1):
            of_class = [row for row in rows if labels[row] == label]
            drawn = {groups[row] for row in of_class}
            assert len(drawn) == 2
            assert of_class == [r for r in range(8) if labels[r] == label and groups[r] in drawn], "whole groups"
            seen |= {(label, group) for group in drawn}
    assert seen == {(0, "a"), (0, "b"), (0, "c"), (1, "d"), (1, "e"), (1, "a")}
    assert drawn_groups(labels, groups, 2, 4, rng) is None


def test_retrieval_never_finds_the_querys_own_group() -> None:
    """Twins lie in one group; without them, the nearest are of the other class."""
    features = np.array([[1, 0], [1, 0.01], [0.9, 0.2], [0.8, 0.3], [-1, 0]], np.float32)
    labels = np.array([0, 0, 1, 1, 0])
    groups = ["p", "p", "q", "r", "s"]
    assert retrieval_precision(features, labels, groups, np.array([0]), 2)[0] == 0.0
    assert retrieval_precision(features, labels, [*"abcde"], np.array([0]), 1)[0] == 1.0
    alone = retrieval_precision(features, labels, ["p"] * 5, np.array([0, 1]), 2)
    assert np.isnan(alone).all()


def test_what_is_judged_never_moves_the_view_that_it_is_judged_from() -> None:
    """The centre is that of the labelled images: an image is judged alike alone and among others."""
    rng = np.random.default_rng(3)
    fit, judged = (rng.normal(size=(12, 4)).astype(np.float32) + 1 for _ in range(2))
    labels = np.arange(12) % 2
    for judge in (nearest_mean, nearest_neighbours):
        together = judge(fit, labels, judged, 2)
        alone = [float(judge(fit, labels, judged[row : row + 1], 2)[0]) for row in range(12)]
        np.testing.assert_allclose(together, alone, rtol=1e-6)


def test_a_neighbour_votes_with_its_similarity() -> None:
    """Cosines 0.6, 0.8 and -0.6: 1.6 votes of class 1 against 1.8 and 0.4 of class 0."""
    fit = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], np.float32)
    outputs = nearest_neighbours(fit, np.array([1, 0, 0, 1]), np.array([[3, 4]], np.float32), 2, 3)
    assert outputs[0] == pytest.approx(1.6 - 1.8 - 0.4)


def test_retrieval_looks_from_the_middle_of_all_images() -> None:
    """From the origin, (3, 3) lies in the direction of (1, 1); from the middle, in the opposite one."""
    features = np.array([[1, 1], [3, 3], [1.2, 0.8], [2.8, 3.2]], np.float32)
    assert retrieval_precision(features, np.array([0, 1, 0, 1]), [*"abcd"], np.array([0]), 1)[0] == 1.0


def test_an_image_counts_by_its_direction_and_a_class_by_that_of_its_mean() -> None:
    """One image ten times as far out as the others, and one class that is less of one kind than another."""
    far = np.array([[1, 0], [1, 0], [0, 10], [-1, 0], [-1, 0], [0, -10]], np.float32)
    assert nearest_mean(far, np.array([0, 0, 0, 1, 1, 1]), np.array([[1, -0.5]], np.float32), 2)[0] < 0
    loose = np.array([[1, 0], [1, 0], [0.866, 0.5], [-0.866, 0.5], [-2, -1]], np.float32)
    asked = np.array([[0.643, 0.766]], np.float32)  # 50 degrees from class 0, 40 from the mean of class 1
    assert nearest_mean(loose, np.array([0, 0, 1, 1, 2]), asked, 3)[0] == 1
