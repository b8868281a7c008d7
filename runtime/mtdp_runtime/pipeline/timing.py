"""How a run went, stage by stage: what is stored with the features, and said in the last line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class StageTime:
    """What a stage did, summed over its threads."""

    name: str
    threads: int
    items: int = 0
    busy_s: float = 0.0
    starved_s: float = 0.0  # waited for input
    blocked_s: float = 0.0  # waited for room behind it


@dataclass(slots=True)
class RunTimes:
    """How a run went. `bottleneck` is computed from the records."""

    wall_s: float = 0.0
    tiles: int = 0
    readers: int = 1  # that kept the engine fed, of the threads of `read`
    read: StageTime = field(default_factory=lambda: StageTime("read", 1))
    infer: StageTime = field(default_factory=lambda: StageTime("infer", 1))
    store: StageTime = field(default_factory=lambda: StageTime("store", 1))

    @property
    def device_idle(self) -> float:
        """Share of the run in which the engine had nothing to do."""
        return min(1.0, self.infer.starved_s / self.wall_s) if self.wall_s > 0 else 0.0

    @property
    def bottleneck(self) -> str:
        """The stage that the others waited for."""
        stages = (self.read, self.infer, self.store)
        return max(stages, key=lambda stage: stage.busy_s / stage.threads).name

    @property
    def tiles_per_s(self) -> float:
        return self.tiles / self.wall_s if self.wall_s > 0 else 0.0


@dataclass(slots=True)
class BadTiles:
    """Tiles that could not be read: how many, and the first reasons."""

    count: int = 0
    reasons: list[str] = field(default_factory=list)


def joined(runs: Sequence[RunTimes]) -> RunTimes:
    """Return what runs of one slide took, one after the other."""
    whole = RunTimes(readers=max(run.readers for run in runs))
    for run in runs:
        whole.wall_s += run.wall_s
        whole.tiles += run.tiles
        for sum_, one in ((whole.read, run.read), (whole.infer, run.infer), (whole.store, run.store)):
            sum_.threads = max(sum_.threads, one.threads)
            sum_.items += one.items
            sum_.busy_s += one.busy_s
            sum_.starved_s += one.starved_s
            sum_.blocked_s += one.blocked_s
    return whole
