"""Random splits that keep each group whole and leave no class out of a split (the paper's supplement)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence

from mtdp.errors import TaskError

_TRIES = 100


def split_groups(
    groups: Mapping[str, Counter[str]], targets: Mapping[str, int], seed: int, what: str = "the task"
) -> dict[str, str]:
    """The split of each group: of a hundred random ones, the one nearest to the targets.

    Rare classes are seen to first: each split gets a random group of each class; the others then go, in random order,
    where most is missing. The result depends on the groups, the targets' proportions and the seed alone.

    Args:
        groups: group -> its images by class.
        targets: split -> wished images, in any unit; a split of 0 is not made.
        what: is split, for the message.

    Raises:
        TaskError: a class has fewer groups than there are splits.
    """
    wanted = {split: share for split, share in targets.items() if share}
    classes = sorted({label for counts in groups.values() for label in counts})
    holders = {label: sorted(name for name, counts in groups.items() if counts[label]) for label in classes}
    for label, names in holders.items():
        if len(names) < len(wanted):
            raise TaskError(
                f"{what}: class {label!r} is in {len(names)} group{'s' * (len(names) != 1)} only ({', '.join(names)}), "
                f"and every one of {', '.join(wanted)} needs it",
                "is the download complete?",
            )
    images = {name: sum(counts.values()) for name, counts in groups.items()}
    total = sum(images.values())
    sizes = {split: total * share / sum(wanted.values()) for split, share in wanted.items()}
    rng = random.Random(f"split {seed}")
    best: tuple[float, dict[str, str]] | None = None
    for _ in range(_TRIES):
        homes = _attempt(groups, images, sizes, sorted(classes, key=lambda label: (len(holders[label]), label)), rng)
        if homes is None:
            continue
        got = {split: sum(images[name] for name, home in homes.items() if home == split) for split in sizes}
        error = sum(abs(got[split] - size) for split, size in sizes.items())
        if best is None or error < best[0]:
            best = error, homes
    if best is None:
        raise TaskError(
            f"{what}: no split of its {len(groups)} groups has every class in every part", "is the download complete?"
        )
    return best[1]


def _attempt(
    groups: Mapping[str, Counter[str]],
    images: Mapping[str, int],
    sizes: Mapping[str, float],
    rare_first: Sequence[str],
    rng: random.Random,
) -> dict[str, str] | None:
    order = sorted(groups)
    rng.shuffle(order)
    homes: dict[str, str] = {}
    missing = dict(sizes)
    have: dict[str, set[str]] = {split: set() for split in sizes}

    def settle(name: str, split: str) -> None:
        homes[name] = split
        missing[split] -= images[name]
        have[split].update(label for label, count in groups[name].items() if count)

    for label in rare_first:
        for split in sorted(sizes, key=lambda split: sizes[split]):
            if label in have[split]:
                continue
            free = [name for name in order if name not in homes and groups[name][label]]
            if not free:
                return None
            settle(free[0], split)
    for name in order:
        if name not in homes:
            settle(name, max(missing, key=lambda split: missing[split]))
    return homes
