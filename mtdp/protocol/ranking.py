"""Choosing a combination by average rank, and the paper's rule for a difference that means something."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from scipy.stats import rankdata

from mtdp.errors import UsageError


def ranks(scores: Mapping[str, float]) -> dict[str, float]:
    """The rank of each combination by score: 1 is best, equals share the mean of their ranks.

    >>> ranks({"a": 0.9, "b": 0.7, "c": 0.9})
    {'a': 1.5, 'b': 3.0, 'c': 1.5}
    """
    values = rankdata([-score for score in scores.values()], method="average")
    return {name: float(rank) for name, rank in zip(scores, values, strict=True)}


def average_ranks(scores: Mapping[str, Mapping[str, float]], without: str = "") -> dict[str, float]:
    """The average rank of each combination over all tasks but `without`.

    Args:
        scores: task -> combination -> mean score on val over the seeds.
    """
    others = [ranks(of_task) for name, of_task in scores.items() if name != without]
    if not others:
        raise UsageError(
            f"{without!r} is the only evaluated task: its combination must be chosen by others",
            "evaluate at least two tasks, or give a single combination",
        )
    return {name: fmean(of_task[name] for of_task in others) for name in next(iter(scores.values()))}


def choose(scores: Mapping[str, Mapping[str, float]], task: str = "") -> str:
    """The combination of the best average rank over all tasks but `task` itself (paper: final evaluation).

    That a task's own scores have no say replaces a nested leave-one-out. Of equals the first.

    Args:
        scores: task -> combination -> mean score on val over the seeds.
        task: that is to be judged; by default none, for the combination that is best over all.

    Raises:
        UsageError: there are several combinations, and no other task to choose by.
    """
    combinations = list(next(iter(scores.values())))
    if len(combinations) == 1:
        return combinations[0]
    average = average_ranks(scores, without=task)
    return min(combinations, key=lambda name: average[name])


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; 0 for a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def significant(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two sets of scores differ by more than twice the larger of their standard deviations (paper).

    It is a rule of thumb on one split, not a test. A single, deterministic score has a deviation of 0; two of them
    never differ significantly, since nothing is known of their spread.
    """
    (mean_1, std_1), (mean_2, std_2) = mean_and_std(first), mean_and_std(second)
    return max(std_1, std_2) > 0 and abs(mean_1 - mean_2) > 2 * max(std_1, std_2)
