"""Which encoder is worth what on labelled tasks: several sources of features on the same images, with intervals.

Two rows are always there: a network that was never trained, and six numbers of colour in place of a network. Where they
do as well as an encoder, the task says nothing of encoders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mtdp.errors import TaskError
from mtdp.few_labels import drawn_groups, nearest_mean, nearest_neighbours, retrieval_precision
from mtdp.metrics import (
    Truth,
    balanced_accuracy,
    class_accuracies,
    percentiles,
    resampled_means,
    resampled_scores,
    score_outputs,
)
from mtdp.tasks import Task
from mtdp.transfer import Source, extract_features, judge_features

FEW: Final = (1, 5, 20)  # groups of each class
DRAWS: Final = 20  # of the groups
NEIGHBOURS: Final = 20
FIRST: Final = 5  # of what is retrieved

Extract = Callable[[Source, Task], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Measure:
    """One score of one encoder: its mean over draws, and the 95 % interval over groups of test images."""

    score: float
    spread: float  # sample standard deviation over the draws; 0 of one
    replicates: NDArray[np.float64]  # the score on each resample of groups; resampled alike for every encoder

    @property
    def interval(self) -> tuple[float, float] | None:
        return percentiles(self.replicates)

    def minus(self, other: Measure) -> tuple[float, tuple[float, float] | None]:
        """How much better than another encoder on the same images, and the 95 % interval of that."""
        return self.score - other.score, percentiles(self.replicates - other.replicates)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What one encoder is worth on one task; `measures` by name, without those that the task is too small for."""

    encoder: str
    measures: Mapping[str, Measure]
    balanced: float  # balanced accuracy of the probe
    of_classes: tuple[float, ...]  # accuracy of the probe within each class
    c: float
    outputs: tuple[float, ...] = ()  # of the probe, for each test image


@dataclass(frozen=True, slots=True)
class TaskEvaluation:
    """One task with all encoders on it."""

    task: str
    metric: str
    class_names: tuple[str, ...]
    fit_images: int
    fit_groups: int
    test_images: int
    test_groups: int
    encoders: tuple[Evaluated, ...]


def evaluate_task(
    task: Task,
    sources: Mapping[str, Source],
    precision: str = "auto",
    seed: int = 0,
    extract: Extract | None = None,
) -> TaskEvaluation:
    """Judge every source of features on one task.

    Args:
        sources: name -> where the features come from.
        seed: of the SVM and of the draws of few labels.
        extract: computes the features of train, val and test, in this order.

    Raises:
        TaskError: the task has no train or no test split, or no group to leave out.
    """
    fit, test = task.of(("train", "val")), task.of(("test",))
    if not fit or not test:
        raise TaskError(f"{task.path} has no {'test' if fit else 'train'} split", "evaluation fits on train and val")
    compute = extract or (lambda source, task: extract_features(source, (*fit, *test), precision))
    found = [_judged(name, compute(source, task), task, seed) for name, source in sources.items()]
    return TaskEvaluation(
        task=task.name,
        metric=task.metric,
        class_names=task.classes,
        fit_images=len(fit),
        fit_groups=len({sample.group for sample in fit}),
        test_images=len(test),
        test_groups=len({sample.group for sample in test}),
        encoders=tuple(found),
    )


def _judged(name: str, features: NDArray[np.float32], task: Task, seed: int) -> Evaluated:
    fit, test = task.of(("train", "val")), task.of(("test",))
    n, classes = len(fit), len(task.classes)
    labels = np.array([sample.label for sample in (*fit, *test)], np.int64)
    groups = [sample.group for sample in (*fit, *test)]
    truth = Truth(labels[n:], tuple(groups[n:]), task.metric, classes)
    probe = judge_features(features, task, name, seed)
    outputs = np.asarray(probe.outputs)
    measures = {"probe": _of_outputs([outputs], truth)}
    for each in FEW:
        draws = _few(features[:n], labels[:n], groups[:n], features[n:], classes, each, seed)
        if draws:
            measures[few_name(each)] = _of_outputs(draws, truth)
    votes = nearest_neighbours(features[:n], labels[:n], features[n:], classes, NEIGHBOURS)
    measures["k-NN"] = _of_outputs([votes], truth)
    found = retrieval_precision(features, labels, groups, np.arange(n, len(labels)), FIRST)
    if np.isfinite(found).all():  # with one group in all there is nothing to find
        measures[RETRIEVAL] = Measure(float(found.mean()), 0.0, resampled_means(found, truth.groups))
    return Evaluated(
        name,
        measures,
        balanced_accuracy(outputs, truth.labels, classes),
        class_accuracies(outputs, truth.labels, classes),
        probe.c,
        tuple(outputs.tolist()),
    )


RETRIEVAL: Final = f"precision@{FIRST}"


def few_name(each: int) -> str:
    """Return what so many groups of each class are called."""
    return f"{each} group{'s' * (each != 1)}"


def _few(
    fit: NDArray[np.float32],
    labels: NDArray[np.int64],
    groups: Sequence[str],
    test: NDArray[np.float32],
    classes: int,
    each: int,
    seed: int,
) -> list[NDArray[np.float64]]:
    """Outputs on test of the nearest mean, of each draw of few groups; the draws are the same for every encoder."""
    draws = []
    for number in range(DRAWS):
        rows = drawn_groups(labels, groups, classes, each, np.random.default_rng([seed, each, number]))
        if rows is None:
            return []
        draws.append(nearest_mean(fit[rows], labels[rows], test, classes))
    return draws


def _of_outputs(runs: Sequence[NDArray[np.float64]], truth: Truth) -> Measure:
    scores = [score_outputs(run, truth.labels, truth.metric, truth.classes) for run in runs]
    replicates = resampled_scores([tuple(run.tolist()) for run in runs], truth)
    return Measure(fmean(scores), stdev(scores) if len(scores) > 1 else 0.0, replicates)
