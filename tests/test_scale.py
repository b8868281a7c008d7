"""The plan past one machine: the simulation keeps the pool's promises, and the model of cost adds up."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


simulation, scale = script("simulate"), script("scale")


@pytest.mark.parametrize("seed", range(5))
def test_workers_are_busy_and_no_slide_is_lost(seed: int) -> None:
    """5,000 slides on 32 workers, with slow disks, stragglers, and workers that die and hang."""
    (row,) = simulation.table(5000, [32], seed)  # which asserts that each slide is done or said to have failed
    assert row["efficiency"] >= 0.9
    assert row["lost_workers"] > 0
    assert row["failed"] <= 2


def test_taking_the_smallest_first_would_be_seen() -> None:
    world, rng = simulation.World(32, **simulation.CALM), random.Random(0)
    seconds = simulation.draw(600, world, rng)
    largest_first = simulation.simulate(seconds, seconds, world, rng)
    smallest_first = simulation.simulate(seconds, [-one for one in seconds], world, rng)
    assert smallest_first.seconds > 1.1 * largest_first.seconds


def test_one_worker_takes_the_sum_of_all_slides() -> None:
    world = simulation.World(1, start_s=7.0, deaths_per_hour=0.0, hangs=0.0)
    result = simulation.simulate([3.0, 5.0, 2.0], [1, 2, 3], world, random.Random(0))
    assert (result.seconds, result.done, result.failed) == (17.0, 3, 0)


def test_a_run_is_predicted_from_what_another_one_measured(tmp_path: Path) -> None:
    """Two workers, 2 s to load, 0.5 s between slides, 1 s a slide and 0.1 s a tile; and three slides more."""

    def write(name: str, tiles: list[list[int]]) -> Path:
        start, out = datetime(2026, 1, 1, tzinfo=UTC), tmp_path / name
        out.mkdir()
        lines: list[dict[str, object]] = [{"run": "r", "started": start.isoformat()}]
        for worker, of_worker in enumerate(tiles):
            now = start + timedelta(seconds=2)
            for number, count in enumerate(of_worker):
                slide = out / f"{worker}{number}"
                slide.write_bytes(bytes(count))
                now += timedelta(seconds=1 + 0.1 * count)
                line = {"slide": str(slide), "status": "done", "tiles": count, "attempt_s": 1 + 0.1 * count}
                lines.append(line | {"time": now.isoformat(), "host": "h", "pid": worker, "run": "r"})
                now += timedelta(seconds=0.5)
        (out / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return out

    small, large = write("small", [[20, 5], [10, 10]]), write("large", [[40, 28, 20], [39, 30, 18, 5]])
    found = simulation.compare(large, small)
    assert {name: found[name] for name in ("load_s", "gap_s", "slide_s", "tiles_per_s")} == {
        "load_s": 2.0,
        "gap_s": 0.5,
        "slide_s": 1.0,
        "tiles_per_s": 10.0,
    }
    assert found["took_s"] == 2 + 4 * 1 + 9.2 + 3 * 0.5
    assert found["predicted_s"] == pytest.approx(found["took_s"])


def test_cost_is_what_the_slowest_stage_makes_it() -> None:
    rates = scale.Rates(100.0, 1000.0, slide_s=0.0, tiles=9000.0, slide_mb=1000.0, price_per_hour=2.0)
    found = scale.cost(4000, 10, rates, efficiency=1.0)
    assert (found.limit, found.hours, found.worker_hours, found.price) == ("engine", 10.0, 100.0, 200.0)
    assert (found.read_tb, found.written_tb) == (4.0, pytest.approx(4000 * 9000 * 4117 / 1e12))
    assert scale.cost(4000, 1000, rates).limit == "storage"
    assert scale.cost(4000, 10, scale.Rates(1000.0, 100.0)).limit == "read"
