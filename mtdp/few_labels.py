"""What features are worth without a fitted probe: few labels, nearest neighbours, and retrieval.

A linear probe on all labels saturates: encoders that differ by seven points with five groups of each class may score
the same with all. Everything here works on cosine similarity of features float32[N, D], and nothing is fitted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float32]
Labels = NDArray[np.int64]


def directions(features: Features, centre: Features) -> NDArray[np.float64]:
    """Features seen from `centre` float[D], at length 1: float64[N, D]. A feature at the centre itself stays 0."""
    moved = np.asarray(features, np.float64) - centre
    lengths = np.linalg.norm(moved, axis=1, keepdims=True)
    return np.asarray(moved / np.where(lengths > 0, lengths, 1))


def drawn_groups(
    labels: Labels, groups: Sequence[str], classes: int, each: int, rng: np.random.Generator
) -> NDArray[np.int64] | None:
    """Rows of `each` random groups of each class; None where a class has fewer groups.

    A group that holds several classes lends each class its own images only.
    """
    rows: list[NDArray[np.int64]] = []
    names = np.asarray(groups)
    for label in range(classes):
        of_class = np.flatnonzero(labels == label)
        there = np.unique(names[of_class])
        if len(there) < each:
            return None
        kept = rng.choice(there, each, replace=False)
        rows.append(of_class[np.isin(names[of_class], kept)])
    return np.concatenate(rows)


def nearest_mean(fit: Features, labels: Labels, judged: Features, classes: int) -> NDArray[np.float64]:
    """Outputs (see `mtdp.metrics`) by the class whose mean direction is nearest."""
    centre = fit.mean(0)
    known, asked = directions(fit, centre), directions(judged, centre)
    means = np.stack([known[labels == label].mean(0) for label in range(classes)])
    return _outputs(asked @ directions(means.astype(np.float32), np.zeros(1, np.float32)).T)


def nearest_neighbours(
    fit: Features, labels: Labels, judged: Features, classes: int, neighbours: int = 20
) -> NDArray[np.float64]:
    """Outputs by the votes of the nearest neighbours, each with the weight of its similarity."""
    centre = fit.mean(0)
    similarity = directions(judged, centre) @ directions(fit, centre).T  # (M, N)
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :neighbours]
    weights = 1 + np.take_along_axis(similarity, nearest, axis=1)  # 0 to 2
    votes = np.stack([(weights * (labels[nearest] == label)).sum(1) for label in range(classes)], axis=1)
    return _outputs(votes)


def retrieval_precision(
    features: Features, labels: Labels, groups: Sequence[str], queries: NDArray[np.int64], first: int
) -> NDArray[np.float64]:
    """For each query, the part of the `first` most similar images of *other* groups that is of its class.

    Args:
        queries: rows of the images that are looked up; all images are found, except those of the query's own group:
            another view of the same patient is no find.
    """
    seen = directions(features, features.mean(0))
    _, place = np.unique(np.asarray(groups), return_inverse=True)
    found = np.full(len(queries), np.nan)
    for row, query in enumerate(queries):
        similarity = seen @ seen[query]
        similarity[place == place[query]] = -np.inf
        best = np.argsort(-similarity, kind="stable")[:first]
        best = best[np.isfinite(similarity[best])]
        if len(best):
            found[row] = float((labels[best] == labels[query]).mean())
    return found


def _outputs(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of float[N, C], one number for each image: of two classes the margin of the second, else the best."""
    return np.asarray(scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores.argmax(1), np.float64)
