"""A cohort's run as events: many slides, several workers, slow disks, workers that die, slides that take far too long.

    python benchmarks/simulate.py --slides 10000 --workers 64
    python benchmarks/simulate.py --make slides200 && \
        mtdp-extract slides200 --out run200 --workers 2 --no-report && \
        python benchmarks/simulate.py --real run200

The rules are those of `cohort/pool.py`: one queue, the largest slide first, a dead or hung worker is replaced and its
slide tried once more. Efficiency is the work of all slides, done without interruption, over workers x the time until
the last one is free. What a slide takes is proportional to its tiles; tiles are drawn from a log-normal distribution
(median 6,000, sigma 0.9: a hundredth of the slides has more than eight times the median).

`--calm`: no slow disks, no stragglers, no lost workers: what the sizes alone do. `--make` writes 200 small slides of
such sizes. `--real` predicts a run that was done, and compares the time with what it took. What it needs is measured in
a run, its own or that of `--rates`: run.jsonl says how long a worker takes until its first slide, between two slides,
and for each slide, which gives the seconds of a slide and of a tile.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class World:
    """What may happen."""

    workers: int
    tiles_per_s: float = 60.0  # of one worker
    overhead_s: float = 2.0  # a slide: open, find tissue, report
    start_s: float = 5.0  # of a worker: load the model
    slow_disks: float = 0.05  # part of the slides that lie on a disk at a quarter of the speed
    stragglers: float = 0.002  # part of the slides that take five times as long
    deaths_per_hour: float = 0.05  # of one worker
    hangs: float = 0.0005  # part of the attempts that hang
    stall_s: float = 600.0


@dataclass(slots=True)
class Result:
    """How it went."""

    seconds: float = 0.0
    work_s: float = 0.0
    done: int = 0
    failed: int = 0  # two workers were lost at it: it is in failed.csv, and the next run tries it
    lost_workers: int = 0
    largest_s: float = 0.0

    def efficiency(self, workers: int) -> float:
        return self.work_s / (workers * self.seconds)


def draw(slides: int, world: World, rng: random.Random) -> list[float]:
    """Return the seconds that each slide takes one worker."""
    found = []
    for _ in range(slides):
        seconds = world.overhead_s + rng.lognormvariate(8.7, 0.9) / world.tiles_per_s
        seconds *= 4 if rng.random() < world.slow_disks else 1
        seconds *= 5 if rng.random() < world.stragglers else 1
        found.append(seconds)
    return found


def simulate(seconds: list[float], sizes: list[float], world: World, rng: random.Random) -> Result:
    """Run the events of one cohort; `sizes` decides the order, `seconds` what each slide takes."""
    result = Result(work_s=sum(seconds), largest_s=max(seconds))
    waiting = sorted(range(len(seconds)), key=lambda slide: sizes[slide])  # the largest is taken from the end
    tries = [0] * len(seconds)
    free = [(world.start_s, worker) for worker in range(world.workers)]
    heapq.heapify(free)
    ends = world.start_s
    while waiting:
        now, worker = heapq.heappop(free)
        slide = waiting.pop()
        tries[slide] += 1
        dies_s = rng.expovariate(world.deaths_per_hour / 3600) if world.deaths_per_hour else float("inf")
        hangs = rng.random() < world.hangs
        if not hangs and dies_s >= seconds[slide]:
            now += seconds[slide]
            result.done += 1
            ends = max(ends, now)
        else:
            now += min(dies_s, rng.random() * seconds[slide] + world.stall_s if hangs else dies_s) + world.start_s
            result.lost_workers += 1
            if tries[slide] == 1:
                waiting.append(slide)
            else:
                result.failed += 1
        heapq.heappush(free, (now, worker))
    result.seconds = ends
    return result


CALM: Final = {"slow_disks": 0.0, "stragglers": 0.0, "deaths_per_hour": 0.0, "hangs": 0.0}


def table(slides: int, workers: list[int], seed: int, calm: bool = False) -> list[dict[str, Any]]:
    """Return one row for each number of workers."""
    rows = []
    for count in workers:
        world, rng = World(count, **(CALM if calm else {})), random.Random(seed)
        seconds = draw(slides, world, rng)
        sizes = [one * rng.uniform(0.7, 1.4) for one in seconds]  # bytes say only roughly how long a slide takes
        result = simulate(seconds, sizes, world, rng)
        assert result.done + result.failed == slides, "no slide is lost"
        rows.append(
            {
                "slides": slides,
                "workers": count,
                "hours": round(result.seconds / 3600, 2),
                "efficiency": round(result.efficiency(count), 3),
                "failed": result.failed,
                "lost_workers": result.lost_workers,
                "largest_slide_part": round(result.largest_s / result.seconds, 4),
            }
        )
    return rows


@dataclass(frozen=True, slots=True)
class Measured:
    """What run.jsonl says of a run: one entry a slide, and the means of what its workers spent besides."""

    workers: int
    took_s: float  # from the start of the command to its last slide's line
    load_s: float  # from the start of the command to the first slide of a worker
    gap_s: float  # of a worker, from one slide to the next
    tiles: list[int]
    bytes: list[float]
    attempt_s: list[float]

    def rates(self) -> tuple[float, float]:
        """Return the seconds of a slide besides its tiles and those of a tile: least squares over all slides."""
        mean_s, mean = fmean(self.attempt_s), fmean(self.tiles)
        spread = sum((one - mean) ** 2 for one in self.tiles)
        tile_s = sum((n - mean) * (s - mean_s) for n, s in zip(self.tiles, self.attempt_s, strict=True)) / spread
        return mean_s - tile_s * mean, tile_s


def measured(out: Path) -> Measured:
    """Read the last run of a folder."""
    lines = [json.loads(text) for text in (out / "run.jsonl").read_text().splitlines()]
    begun = next(line for line in reversed(lines) if "slide" not in line)
    done = [line for line in lines if line.get("run") == begun["run"] and line.get("status") in ("done", "no-tissue")]
    start_s = datetime.fromisoformat(begun["started"]).timestamp()
    by_worker: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for line in done:
        ended_s = datetime.fromisoformat(line["time"]).timestamp()
        by_worker.setdefault((line["host"], line["pid"]), []).append((ended_s - line["attempt_s"], ended_s))
    spans = [sorted(one) for one in by_worker.values()]
    gaps = [after[0] - before[1] for one in spans for before, after in pairwise(one)]
    return Measured(
        workers=len(spans),
        took_s=max(ended for one in spans for _, ended in one) - start_s,
        load_s=fmean(one[0][0] for one in spans) - start_s,
        gap_s=fmean(gaps),
        tiles=[line["tiles"] for line in done],
        bytes=[float(Path(line["slide"]).stat().st_size) for line in done],
        attempt_s=[line["attempt_s"] for line in done],
    )


def predicted(run: Measured, rates: Measured) -> float:
    """Return how long the slides of a run take, by the rates, the load and the gaps that another one measured."""
    slide_s, tile_s = rates.rates()
    seconds = [rates.gap_s + slide_s + tile_s * tiles for tiles in run.tiles]
    world = World(run.workers, start_s=rates.load_s - rates.gap_s, deaths_per_hour=0.0, hangs=0.0)
    return simulate(seconds, run.bytes, world, random.Random(0)).seconds


def compare(out: Path, rates: Path) -> dict[str, float]:
    """Return what a run took and what is predicted of it from the rates of another run, or from its own."""
    run, by = measured(out), measured(rates)
    slide_s, tile_s = by.rates()
    found = {"slides": len(run.tiles), "workers": run.workers, "took_s": run.took_s, "predicted_s": predicted(run, by)}
    found |= {"load_s": by.load_s, "gap_s": by.gap_s, "slide_s": slide_s, "tiles_per_s": 1 / tile_s}
    return {name: round(value, 4) for name, value in found.items()}


def make(folder: Path, slides: int = 200) -> None:
    """Write slides with a few to a few hundred tiles each, of sizes drawn as above."""
    import numpy as np
    import tifffile

    folder.mkdir(parents=True)
    rng, noise = random.Random(0), np.random.default_rng(0)
    for number in range(slides):
        side = max(256, int(128 * round((rng.lognormvariate(2.3, 0.9) ** 0.5) * 224 / 128)))
        image = np.clip(noise.normal((200, 120, 170), 25, (side, side, 3)), 0, 255).astype(np.uint8)
        image[:, : side // 4] = 243  # without glass to compare with, nothing is tissue
        options: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb", "compression": "jpeg", "metadata": None}
        with tifffile.TiffWriter(folder / f"s{number:03}.tiff") as tiff:
            tiff.write(image, resolution=(2e4, 2e4), resolutionunit="CENTIMETER", **options)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--slides", type=int, default=10_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calm", action="store_true")
    parser.add_argument("--make", type=Path)
    parser.add_argument("--real", type=Path)
    parser.add_argument("--rates", type=Path)
    options = parser.parse_args()
    if options.make is not None:
        make(options.make)
        return
    if options.real is not None:
        found = compare(options.real, options.rates or options.real)
        print(json.dumps(found | {"ratio": round(found["predicted_s"] / found["took_s"], 3)}))
        return
    for row in table(options.slides, options.workers, options.seed, options.calm):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
