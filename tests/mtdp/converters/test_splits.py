"""Splits by group: laws, and what cannot be split."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtdp.converters.splits import split_groups
from mtdp.errors import TaskError

TARGETS = {"train": 70, "val": 10, "test": 20}
GROUPS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=4),
    st.dictionaries(st.sampled_from(["x", "y", "z"]), st.integers(1, 50), min_size=1).map(Counter),
    min_size=3,
    max_size=30,
)


def with_enough_of_each(groups: dict[str, Counter[str]]) -> dict[str, Counter[str]]:
    """Add groups of one class until each class is in three times as many as there are classes."""
    classes = {label for counts in groups.values() for label in counts}
    return groups | {f"{label}{number}": Counter({label: 3}) for label in classes for number in range(3 * len(classes))}


@settings(max_examples=30)
@given(GROUPS.map(with_enough_of_each), st.integers(0, 5))
def test_every_group_has_one_split_and_every_split_every_class(groups: dict[str, Counter[str]], seed: int) -> None:
    classes = {label for counts in groups.values() for label in counts}
    homes = split_groups(groups, TARGETS, seed)
    assert set(homes) == set(groups)
    for split in TARGETS:
        assert {label for name, home in homes.items() if home == split for label in groups[name]} == classes
    backwards = dict(reversed(groups.items()))
    assert split_groups(backwards, TARGETS, seed) == homes  # the order of files on a disk decides nothing


def test_the_sizes_come_near_the_papers() -> None:
    groups = {f"p{number}": Counter(a=number % 7 + 1, b=5) for number in range(160)}
    homes = split_groups(groups, {"train": 224_822, "val": 31_934, "test": 20_768}, seed=0)
    total = sum(sum(counts.values()) for counts in groups.values())
    got = {split: sum(sum(groups[name].values()) for name, home in homes.items() if home == split) for split in TARGETS}
    assert got["train"] / total == pytest.approx(0.810, abs=0.01)
    assert got["val"] / total == pytest.approx(0.115, abs=0.01)


def test_another_seed_gives_another_split() -> None:
    groups = {f"p{number}": Counter(a=3, b=5) for number in range(20)}
    assert split_groups(groups, TARGETS, 0) != split_groups(groups, TARGETS, 1)


def test_a_class_in_just_enough_groups_is_spread_over_them() -> None:
    groups = {f"p{number}": Counter(common=10) for number in range(100)}
    for name in ("p1", "p2", "p3"):
        groups[name]["rare"] = 1
    homes = split_groups(groups, TARGETS, 0)
    assert {homes["p1"], homes["p2"], homes["p3"]} == set(TARGETS)


def test_a_split_of_zero_is_not_made() -> None:
    groups = {f"p{number}": Counter(a=1) for number in range(10)}
    assert set(split_groups(groups, {"train": 3349, "val": 0, "test": 1651}, 0).values()) == {"train", "test"}


def test_too_few_groups_of_a_class_are_refused() -> None:
    groups = {"p1": Counter(a=5, b=1), "p2": Counter(a=5, b=1), "p3": Counter(a=5)}
    with pytest.raises(TaskError, match=r"/data: class 'b' is in 2 groups only \(p1, p2\)"):
        split_groups(groups, TARGETS, 0, "/data")


def test_of_many_draws_that_nearest_to_the_shares_is_taken() -> None:
    shares = {"train": 60, "val": 20, "test": 20}
    groups = {f"g{number}": Counter(a=images, b=images) for number, images in enumerate((25, 20, 15, 10, 10, 5, 5, 10))}
    for seed in range(5):
        homes = split_groups(groups, shares, seed, "it")
        assert {split: sum(groups[name]["a"] for name in homes if homes[name] == split) for split in shares} == shares
