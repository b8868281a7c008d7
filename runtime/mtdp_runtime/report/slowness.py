"""Which slides of a run were slow, and why, as far as the records tell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from mtdp_runtime.report.rows import Row

_SLOW: Final = 0.6  # of the median of the same model on the same engine
_FEW_TILES: Final = 64
_LONG_SEARCH: Final = 0.3  # of a slide's time, for finding tissue
_IDLE: Final = 0.2
_LEAST_LOST_S: Final = 2.0  # what costs less is not worth a word
_MOST: Final = 10


@dataclass(frozen=True, slots=True)
class SlowSlide:
    """A slide that was slow, the usual rate of its like, and what the records say of it."""

    row: Row
    usual: float  # tiles/s
    reasons: tuple[str, ...]


def slow_slides(rows: Sequence[Row]) -> list[SlowSlide]:
    """Return the slides whose rate is below 0.6 of the median of their model and engine, the most lost time first."""
    alike = defaultdict(list)
    for row in rows:
        if row.tiles_per_s:
            alike[row.digest, row.engine, row.precision].append(row)
    found = []
    for like in alike.values():
        usual = median(row.tiles_per_s or 0.0 for row in like)
        found += [SlowSlide(row, usual, _reasons(row)) for row in like if (row.tiles_per_s or 0.0) < _SLOW * usual]
    worth = [one for one in found if _lost_s(one) >= _LEAST_LOST_S]
    return sorted(worth, key=_lost_s, reverse=True)[:_MOST]


def _lost_s(slow: SlowSlide) -> float:
    """Return the seconds that it took longer than it would have at the usual rate."""
    assert slow.row.tiles_per_s
    return slow.row.tiles * (1 / slow.row.tiles_per_s - 1 / slow.usual)


def _reasons(row: Row) -> tuple[str, ...]:
    said = []
    if row.tiles < _FEW_TILES:
        said.append(f"it has only {row.tiles} tiles, so that starting and ending count")
    if row.bottleneck == "read":
        said.append(f"reading was the slowest stage, and the engine waited {row.device_idle:.0%} of the time")
        if row.reader_reason:
            said.append(f"read by {row.reader}: {row.reader_reason}")
    elif row.bottleneck == "store":
        said.append("writing was the slowest stage: the disk of the output folder is slow")
    elif row.device_idle > _IDLE:
        said.append(f"the engine waited {row.device_idle:.0%} of the time for tiles")
    else:
        said.append("the engine itself was slower than for the others: other programs may have shared the machine")
    if row.seconds and row.plan_s > _LONG_SEARCH * row.seconds:
        said.append(f"finding the tissue took {row.plan_s:.1f} s of its {row.seconds:.1f} s")
    if row.earlier_tiles:
        said.append(f"{row.earlier_tiles} of its tiles are of an earlier run, and are not counted in the rate")
    return tuple(said)
