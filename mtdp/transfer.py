"""Transfer to a task by feature extraction: pooled features and a linear SVM (paper: evaluation of transfer).

The SVM is liblinear's (squared hinge loss, one against the rest), on features as they come. Its C is chosen among
1e-10 ... 1 by 5-fold cross-validation whose folds keep each patient, slide or source image together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GroupKFold
from sklearn.svm import LinearSVC

from mtdp.augment import evaluation_view
from mtdp.backbones import Backbone, build_backbone, native_preprocessing
from mtdp.bundle_features import BundleModel, features_of_bundle, is_bundle, open_bundle
from mtdp.checkpoint import load_checkpoint
from mtdp.devices import autocast, best_device, choose_precision, out_of_memory_said
from mtdp.errors import LOWER_RATE, TaskError, TrainingDiverged, UsageError, or_overflow
from mtdp.images import ImageCache
from mtdp.metrics import Truth, balanced_accuracy, class_accuracies, interval, score_outputs
from mtdp.preprocess import Normalise, Preprocessing
from mtdp.sampling import in_order
from mtdp.tasks import Sample, Task
from mtdp.weights import is_named_source, load_backbone_weights, names_its_architecture

C_GRID: Final = tuple(10.0**power for power in range(-10, 1))
FOLDS: Final = 5


@dataclass(frozen=True, slots=True)
class Extractor:
    """A backbone, in eval mode, with the input that it was trained for."""

    backbone: Backbone
    preprocessing: Preprocessing
    description: str


Features = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Classifier:
    """How a probe fits and scores: an argument, so that which rows reach which step can be recorded.

    fit: (features, labels, C, seed) -> the fitted model, and whether it converged.
    outputs: (model, features, number of classes) -> float[N]: of two classes the margin of the second, else the number
        of the best class.
    """

    fit: Callable[[Features, Labels, float, int], tuple[Any, bool]]
    outputs: Callable[[Any, Features, int], NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What a linear probe found: the test score, and how C was chosen."""

    task: str
    weights: str
    metric: str
    score: float
    c: float
    cross_validation: dict[str, float]  # C -> mean score of the folds
    images: dict[str, int]  # "fit", and the split that was scored
    converged: bool  # of the final fit
    outputs: tuple[float, ...] = ()  # of each image that was scored: margin of class 1 of two, else the class


@dataclass(frozen=True, slots=True)
class Colours:
    """Six numbers in place of a network: the mean and the deviation of red, green and blue of an image.

    What they achieve on a task needs no encoder: a task on which they do as well says nothing of encoders.
    """

    description: str = "six colour numbers"


Source = Extractor | BundleModel | Colours
COLOUR: Final = "colour"
_COLOUR_PX: Final = 64  # enough for means and deviations, and fast


def load_extractor(source: str, arch: str | None = None, seed: int = 0, image_px: int | None = None) -> Source:
    """The features to judge: of a training run, a checkpoint or a bundle, or of an architecture with any weights.

    Args:
        image_px: side of the input; None: what a checkpoint or a bundle states, else the architecture's own.

    Raises:
        UsageError: no such source, one that needs an architecture's name, or one that takes no images of this side.
        CheckpointError, WeightsError: it cannot be read or does not fit.
    """
    if source == COLOUR:
        return Colours()
    if is_bundle(source):
        if arch is not None:
            raise UsageError(f"{source} is a bundle, its model is in it", "leave --arch out")
        bundle = open_bundle(Path(source))
        if image_px not in (None, bundle.image_px):
            raise UsageError(f"{source} takes images of {bundle.image_px} px, not of {image_px}", "leave the side out")
        return bundle
    named = None if is_named_source(source) else names_its_architecture(source)
    if named is not None:
        if arch not in (None, named):
            raise UsageError(f"{source} holds {named}, not {arch}", "leave --arch out")
        net, info = load_checkpoint(Path(source))
        preprocessing = info.preprocessing
        if image_px is not None and image_px != preprocessing.image_px:
            native_preprocessing(net.backbone, image_px)  # refuses a side that the network cannot take
            preprocessing = replace(preprocessing, image_px=image_px)
        return Extractor(net.backbone.eval(), preprocessing, f"{source}, {info.iteration} iterations")
    if arch is None:
        raise UsageError(f"{source} does not name its architecture", "add --arch, for example --arch densenet121")
    backbone = build_backbone(arch)
    origin = load_backbone_weights(backbone, arch, source, seed)
    return Extractor(backbone.eval(), native_preprocessing(backbone, image_px), origin.description)


@torch.no_grad()
def extract_features(
    extractor: Source, samples: Sequence[Sample], precision: str = "auto", batch_size: int = 32
) -> NDArray[np.float32]:
    """Pooled features of the central square of each image: float32[N, D].

    Raises:
        TrainingDiverged: a feature is not finite.
        OutOfMemory: a batch does not fit.
    """
    if isinstance(extractor, Colours):
        return colour_numbers(samples)
    if isinstance(extractor, BundleModel):
        return _finite(features_of_bundle(extractor, samples, precision, batch_size), extractor.description, "fp32")
    device = best_device()
    context_precision = choose_precision(precision, device)
    backbone = extractor.backbone.to(device).to(memory_format=torch.channels_last)
    normalise = Normalise(extractor.preprocessing).to(device)
    cache = ImageCache(extractor.preprocessing.image_px, 0, extractor.preprocessing.interpolation)
    features = np.empty((len(samples), backbone.features_dim), np.float32)
    row = 0
    with out_of_memory_said(f"features of {extractor.description}", "use a smaller --image-px"):
        for images in in_order(samples, cache, evaluation_view, batch_size):
            with autocast(context_precision, device):
                pooled = backbone(normalise(images.to(device)))  # (B, P, P, 3) -> (B, D)
            features[row : row + len(images)] = pooled.float().cpu().numpy()
            row += len(images)
    return _finite(features, extractor.description, context_precision)


def colour_numbers(samples: Sequence[Sample]) -> NDArray[np.float32]:
    """Mean and standard deviation of red, green and blue of the central square of each image: float32[N, 6], 0 to 1."""
    cache = ImageCache(_COLOUR_PX, 0)
    parts = [np.empty((0, 6), np.float32)]
    for images in in_order(samples, cache, evaluation_view, 256):
        pixels = images.numpy() / np.float32(255)  # (B, P, P, 3)
        parts.append(np.concatenate([pixels.mean((1, 2)), pixels.std((1, 2))], axis=1).astype(np.float32))
    return np.concatenate(parts)


def _finite(features: NDArray[np.float32], description: str, precision: str) -> NDArray[np.float32]:
    if not np.isfinite(features).all():
        hint = or_overflow(LOWER_RATE, precision)
        raise TrainingDiverged(f"{description}: gives features that are not finite", hint)
    return features


def probe_task(
    extractor: Source,
    task: Task,
    seed: int = 0,
    precision: str = "auto",
    fit_on: tuple[str, ...] = ("train", "val"),
    score_on: str = "test",
    classifier: Classifier | None = None,
) -> ProbeResult:
    """Fit on some splits with C chosen by cross-validation in them, and score once on another.

    The paper fits on train and val for the final score on test; on train for the choice of hyper-parameters on val.

    Raises:
        UsageError: a negative seed.
        TaskError: the task has no split to fit or to score on.
    """
    if seed < 0:
        raise UsageError(f"seed is {seed}, it must not be negative")
    fit, test = task.of(fit_on), task.of((score_on,))
    if not test or not fit:
        missing = score_on if fit else " or ".join(fit_on)
        raise TaskError(
            f"{task.path} has no {missing} split", "a probe is scored on images that were not used for fitting"
        )
    features = extract_features(extractor, (*fit, *test), precision)
    return judge_features(features, task, extractor.description, seed, fit_on, score_on, classifier)


def judge_features(
    features: NDArray[np.float32],
    task: Task,
    description: str,
    seed: int = 0,
    fit_on: tuple[str, ...] = ("train", "val"),
    score_on: str = "test",
    classifier: Classifier | None = None,
) -> ProbeResult:
    """The linear probe on features that are there already, whoever computed them.

    Args:
        features: float32[N, D], of the images to fit on, then of those to score on.
        task: whose images they are.
        description: of what computed them.
        seed: of the SVM.
    """
    fit, test = task.of(fit_on), task.of((score_on,))
    labels = np.array([sample.label for sample in (*fit, *test)])
    groups = [sample.group for sample in fit]
    n = len(fit)
    classifier = classifier or LINEAR_SVM
    scores = cross_validate(features[:n], labels[:n], groups, task.metric, seed, classifier)
    c = best_c(scores)
    model, converged = classifier.fit(features[:n], labels[:n], c, seed)
    classes = len(task.classes)
    outputs = classifier.outputs(model, features[n:], classes)
    return ProbeResult(
        task=task.name,
        weights=description,
        metric=task.metric,
        score=score_outputs(outputs, labels[n:], task.metric, classes),
        c=c,
        cross_validation={f"{value:g}": scores[value] for value in C_GRID},
        images={"fit": n, score_on: len(test)},
        converged=converged,
        outputs=tuple(float(value) for value in outputs),
    )


def sureness(result: ProbeResult, task: Task) -> dict[str, Any]:
    """What a test score is worth: its 95 % interval over groups, their number, and the scores of the classes."""
    test = task.of(("test",))
    labels = np.array([sample.label for sample in test], np.int64)
    truth = Truth(labels, tuple(sample.group for sample in test), task.metric, len(task.classes))
    outputs = np.asarray(result.outputs)
    of_classes = class_accuracies(outputs, labels, truth.classes)
    return {
        "interval": interval([result.outputs], truth),
        "test_groups": truth.group_count,
        "balanced_accuracy": balanced_accuracy(outputs, labels, truth.classes),
        "class_accuracies": dict(zip(task.classes, of_classes, strict=True)),
    }


def cross_validate(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    groups: Sequence[str],
    metric: str,
    seed: int = 0,
    classifier: Classifier | None = None,
) -> dict[float, float]:
    """The mean score of each C over grouped folds.

    A fold that lacks a class on one side has no score (a ROC AUC needs both, an SVM two) and is left out of the mean.

    Raises:
        TaskError: fewer than two groups, or no fold that can be scored.
    """
    splits = folds_of(labels, groups, metric)
    classifier = classifier or LINEAR_SVM
    classes = int(labels.max()) + 1
    scores = {}
    for c in C_GRID:
        of_folds = []
        for fit, held in splits:
            model, _ = classifier.fit(features[fit], labels[fit], c, seed)
            outputs = classifier.outputs(model, features[held], classes)
            of_folds.append(score_outputs(outputs, labels[held], metric, classes))
        scores[c] = float(np.mean(of_folds))
    return scores


def folds_of(
    labels: Sequence[int] | NDArray[np.int64], groups: Sequence[str], metric: str
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The rows to fit and those held out, of each fold that can be scored.

    Raises:
        TaskError: as `cross_validate`.
    """
    folds = min(FOLDS, len(set(groups)))
    if folds < 2:
        raise TaskError(f"cross-validation needs two groups, there is {folds}", "check the groups in the file names")
    values = np.asarray(labels)
    splits = [
        (fit, held)
        for fit, held in GroupKFold(folds).split(values, values, groups)
        if len(np.unique(values[fit])) >= 2 and (metric == "accuracy" or len(np.unique(values[held])) >= 2)
    ]
    if not splits:
        raise TaskError("no cross-validation fold has both classes", "the task has too few groups per class")
    return splits


def best_c(scores: dict[float, float]) -> float:
    """The C of the best score; the smallest, so the simplest, of equals."""
    return min(scores, key=lambda c: (-scores[c], c))


def fit_svm(features: Features, labels: Labels, c: float, seed: int) -> tuple[LinearSVC, bool]:
    """Liblinear's SVM with squared hinge loss, one against the rest, and whether it converged."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        svm = LinearSVC(C=c, random_state=seed).fit(features, labels)
    return svm, not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def svm_outputs(svm: LinearSVC, features: Features, classes: int) -> NDArray[np.float64]:
    """Of two classes the margin of the second, else the class that is predicted."""
    return np.asarray(svm.decision_function(features) if classes == 2 else svm.predict(features), np.float64)


LINEAR_SVM: Final = Classifier(fit_svm, svm_outputs)
