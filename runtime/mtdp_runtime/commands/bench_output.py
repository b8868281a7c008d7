"""What `mtdp-bench` says: a bar for each stage, as long as a tile takes there; and two recorded runs side by side."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from mtdp_runtime.commands import console
from mtdp_runtime.errors import UsageError

STAGES: Final = ("read", "infer", "extract")
_MOST_BYTES: Final = 1 << 20  # far above what mtdp-bench writes
_RECORD_IT: Final = "Record a run with: mtdp-bench extract SLIDE --json > A.json"
# What makes two runs measurements of different things. The order is that in which a person would ask.
_CONDITIONS: Final = (
    "slide", "tiles", "scale", "reader", "file_cache", "threads", "model", "engine", "precision", "batch", "repeats",
)  # fmt: skip
_BESIDES_BAR: Final = 60  # columns that a line needs for its figures
_WIDEST_BAR: Final = 40


def lines(rates: Mapping[str, Any], columns: int, block: str = "█") -> list[str]:
    """Return a run for a person: what was measured, then a bar for each stage.

    Args:
        rates: what `mtdp-bench --json` prints.
        columns: of the terminal.
        block: what bars are made of.
    """
    threads = f"{rates['threads']} threads, {rates['file_cache']} file cache"
    said = [f"{rates['slide']}: {rates['tiles']} tiles, scale {rates['scale']:.4f}, {threads}"]
    if "engine" in rates:
        said.append(f"engine {rates['engine']}, {rates['precision']}, batch {rates['batch']}; model {rates['model']}")
    if "auto_takes" in rates:
        said.append(f"auto takes {rates['auto_takes']} for this model here from now on: {rates['auto_reason']}")
    stages = _stages(rates)
    costs = {stage: 1e3 / rates[f"{stage}_tiles_per_s"] for stage in stages}
    most, widest = max(costs.values()), min(_WIDEST_BAR, max(5, columns - _BESIDES_BAR))
    for stage in stages:
        bar = block * max(1, round(widest * costs[stage] / most))
        low, high = min(rates[f"{stage}_runs"]), max(rates[f"{stage}_runs"])
        figures = (
            f"{costs[stage]:8.2f} ms a tile {rates[f'{stage}_tiles_per_s']:9.1f} tiles/s ({low:.1f} to {high:.1f})"
        )
        slowest = "  <- bottleneck" if stage == rates.get("bottleneck") else ""
        said.append(f"{stage:<8} {bar:<{widest}} {figures}{slowest}")
    if "ceiling_tiles_per_s" in rates:
        ceiling = f"{rates['ceiling_tiles_per_s']:.1f} tiles/s, {rates['ceiling_from']}"
        alone, most = f"{rates['extract_of_infer']:.0%}", f"{rates['extract_of_ceiling']:.0%}"
        said.append(f"extract is {alone} of the model alone, and {most} of the ceiling: {ceiling}")
        said.append(f"the engine waited {rates['device_idle']:.0%} of the time; bottleneck: {rates['bottleneck']}")
    return said


def show(rates: Mapping[str, Any]) -> None:
    """Print a run for a person."""
    for line in lines(rates, console.columns(), _block()):
        console.result(line)


def comparison(a: Path, b: Path) -> dict[str, Any]:
    """Return how the second run stands to the first, from the files that `mtdp-bench --json` wrote.

    `stages` has for each the medians, `ratio` = B / A, and `apart`: no run of one is as fast as any run of the other.
    `differs` has the conditions that are not the same, each with both values.

    Raises:
        UsageError: a file is none of mtdp-bench, or they are of different kinds.
    """
    before, after = _read(a), _read(b)
    kinds = [_kind(one) for one in (before, after)]
    if kinds[0] != kinds[1]:
        raise UsageError(
            f"{a} is of mtdp-bench {kinds[0]}, {b} of mtdp-bench {kinds[1]}: they measure different things",
            hint=f"Record both with the same word, such as mtdp-bench {kinds[0]}.",
        )
    stages = {}
    for stage in _stages(before):
        old, new = before[f"{stage}_tiles_per_s"], after[f"{stage}_tiles_per_s"]
        runs = before[f"{stage}_runs"], after[f"{stage}_runs"]
        apart = max(runs[0]) < min(runs[1]) or max(runs[1]) < min(runs[0])
        stages[stage] = {"a": old, "b": new, "ratio": new / old, "apart": apart}
    differs = {name: [before.get(name), after.get(name)] for name in _CONDITIONS if before.get(name) != after.get(name)}
    return {"a": str(a), "b": str(b), "kind": kinds[0], "stages": stages, "differs": differs}


def comparison_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield a comparison for a person."""
    yield f"A {found['a']}"
    yield f"B {found['b']}"
    for name, (old, new) in found["differs"].items():
        yield f"not alike: {name.replace('_', ' ')} {old} in A, {new} in B"
    yield f"{'tiles/s':<8} {'A':>10} {'B':>10} {'B / A':>8}"
    for stage, of in found["stages"].items():
        spread = "" if of["apart"] else "  within the spread of the runs"
        yield f"{stage:<8} {of['a']:>10.1f} {of['b']:>10.1f} {of['ratio']:>8.2f}{spread}"


def _block() -> str:
    try:
        "█".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "#"
    return "█"


def _stages(rates: Mapping[str, Any]) -> list[str]:
    return [stage for stage in STAGES if f"{stage}_tiles_per_s" in rates]


def _kind(rates: Mapping[str, Any]) -> str:
    """Return the word that the run was started with: `extract` measures the other two beside it."""
    return _stages(rates)[-1]


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("too large")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not _stages(found):
            raise ValueError("no tiles/s in it")
        for stage in _stages(found):
            rates = [found[f"{stage}_tiles_per_s"], *found[f"{stage}_runs"]]
            if len(rates) < 2 or not all(type(rate) in (int, float) and 0 < rate < math.inf for rate in rates):
                raise ValueError(f"no rates of {stage}")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}", hint=_RECORD_IT) from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(f"{path}: not what mtdp-bench --json prints ({error})", hint=_RECORD_IT) from error
    return found
