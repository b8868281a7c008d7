"""Scores of the images of a split, and how sure they are: intervals by resampling whole groups.

Everything starts from the outputs of a model, one number for each image: of two classes the margin of the second (above
0: the second is predicted), of more classes the number of the predicted class. From them follow accuracy, ROC AUC,
balanced accuracy and the accuracy within each class.

Images of one patient, slide or source image are not independent, so the bootstrap draws groups, not images: an interval
over images would be far too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

REPLICATES: Final = 2000
LEVEL: Final = 0.95
_CELLS: Final = 1 << 20  # of a table of resamples and images that is computed at once: 8 MB

Outputs = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Truth:
    """The images of a split, as far as scores need them: N labels and N groups."""

    labels: Labels
    groups: tuple[str, ...]
    metric: str
    classes: int

    @property
    def group_count(self) -> int:
        return len(set(self.groups))


def predicted(outputs: Outputs, classes: int) -> Labels:
    """The class of each image, of outputs float[N]."""
    return np.asarray(outputs > 0 if classes == 2 else outputs, np.int64)


def score_outputs(outputs: Outputs, labels: Labels, metric: str, classes: int) -> float:
    """Accuracy, or ROC AUC of two classes, of outputs float[N] and labels int[N]."""
    if metric == "roc_auc":
        return float(_weighted_auc(outputs, labels, np.ones((1, len(labels))))[0])
    return float((predicted(outputs, classes) == labels).mean())


def class_accuracies(outputs: Outputs, labels: Labels, classes: int) -> tuple[float, ...]:
    """For each class, the part of its images that is recognised (its recall); nan where it has no image."""
    right = predicted(outputs, classes) == labels
    return tuple(float(right[labels == c].mean()) if (labels == c).any() else float("nan") for c in range(classes))


def balanced_accuracy(outputs: Outputs, labels: Labels, classes: int) -> float:
    """The mean of the classes' accuracies, so that a frequent class counts no more than a rare one."""
    return float(np.nanmean(class_accuracies(outputs, labels, classes)))


def group_weights(groups: Sequence[str], seed: int = 0) -> NDArray[np.float64]:
    """How often each image is in each resample of groups with replacement: float[REPLICATES, N]."""
    names, place = np.unique(np.asarray(groups), return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=REPLICATES)
    return np.asarray(drawn[:, place], np.float64)


def interval(runs: Sequence[Sequence[float]], truth: Truth) -> tuple[float, float] | None:
    """The 95 % interval of the mean score of some runs (seeds) on the same images.

    Args:
        runs: outputs of each run, each of N images.

    Returns:
        None with fewer than two groups, of which nothing can be said.
    """
    return percentiles(resampled_scores(runs, truth))


def resampled_scores(runs: Sequence[Sequence[float]], truth: Truth) -> NDArray[np.float64]:
    """The mean score of the runs on each resample of groups: float[REPLICATES]; empty with fewer than two groups.

    Two models on the same images are resampled alike, so that the difference of their results is that of pairs.
    """
    if truth.group_count < 2:
        return np.empty(0)
    weights = group_weights(truth.groups)
    of_runs = []
    for run in runs:
        outputs = np.asarray(run, np.float64)
        if truth.metric == "roc_auc":
            of_runs.append(_weighted_auc(outputs, truth.labels, weights))
        else:
            right = predicted(outputs, truth.classes) == truth.labels
            of_runs.append(weights @ right / weights.sum(1))
    return np.asarray(np.mean(of_runs, axis=0))


def resampled_means(values: Sequence[float] | NDArray[np.float64], groups: Sequence[str]) -> NDArray[np.float64]:
    """The mean of one value for each image on each resample of groups: float[REPLICATES]; empty as above."""
    if len(set(groups)) < 2:
        return np.empty(0)
    weights = group_weights(groups)
    return np.asarray(weights @ np.asarray(values, np.float64) / weights.sum(1))


def percentiles(replicates: NDArray[np.float64]) -> tuple[float, float] | None:
    """The 95 % interval of what was resampled."""
    sound = replicates[np.isfinite(replicates)]  # a resample without one of the classes has no ROC AUC
    if not len(sound):
        return None
    low, high = np.quantile(sound, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _weighted_auc(outputs: Outputs, labels: Labels, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """ROC AUC of each of R weightings float[R, N]: the chance that a positive is above a negative, equals half."""
    order = np.argsort(outputs, kind="stable")
    rising = outputs[order]
    starts = np.flatnonzero(np.append(True, rising[1:] != rising[:-1]))  # of each level of equal outputs
    found = np.full(len(weights), np.nan)
    step = max(1, _CELLS // len(outputs))
    for first in range(0, len(weights), step):
        ordered = weights[first : first + step, order]
        positive = np.add.reduceat(ordered * (labels[order] == 1), starts, axis=1)  # (rows, levels)
        negative = np.add.reduceat(ordered * (labels[order] == 0), starts, axis=1)
        won = (positive * (np.cumsum(negative, axis=1) - negative / 2)).sum(1)
        pairs = positive.sum(1) * negative.sum(1)
        np.divide(won, pairs, out=found[first : first + step], where=pairs > 0)
    return found
