"""What a cohort costs: hours, storage and money, from rates that were measured on one machine.

    mtdp-bench extract slide.svs --model BUNDLE --json     # gives the two rates, of this machine and this model
    python benchmarks/scale.py --engine-tiles-per-s 75 --read-tiles-per-s 900 --workers 64

On a CPU reading and the engine share the cores: give `extract_tiles_per_s` for both. Every figure is computed from what
is given; nothing here is measured. One worker is what the rates were measured on.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Rates:
    """One worker's rates, and what a slide is."""

    engine_tiles_per_s: float  # the model alone: the stage `infer` of mtdp-bench
    read_tiles_per_s: float  # reading and decoding alone, on the worker's cores: the stage `read`
    slide_s: float = 3.0  # a slide besides its tiles: open, find tissue, write
    tiles: float = 9_000.0  # of a slide
    slide_mb: float = 1_000.0
    feature_bytes: float = 4 * 1024 + 21  # of a tile
    storage_mb_per_s: float = 1_000.0  # that the storage gives all workers together
    price_per_hour: float = 0.0  # of one worker
    price_per_tb: float = 0.0  # of storing a TB of features for a month


@dataclass(frozen=True, slots=True)
class Cost:
    """What a cohort takes."""

    slides: int
    workers: int
    hours: float
    limit: str  # engine, read or storage: what more of would shorten it
    worker_hours: float
    read_tb: float
    written_tb: float
    price: float


def cost(slides: int, workers: int, rates: Rates, efficiency: float = 0.9) -> Cost:
    """Return what `slides` take; the stages of a worker overlap, so the slowest one decides.

    `efficiency` is what scheduling leaves: benchmarks/simulate.py.
    """
    stages = {
        "engine": rates.tiles / rates.engine_tiles_per_s,
        "read": rates.tiles / rates.read_tiles_per_s,
    }
    limit = max(stages, key=stages.__getitem__)
    seconds = slides * (stages[limit] + rates.slide_s) / workers / efficiency
    from_storage = slides * rates.slide_mb / rates.storage_mb_per_s
    if from_storage > seconds:
        seconds, limit = from_storage, "storage"
    hours, written = seconds / 3600, slides * rates.tiles * rates.feature_bytes / 1e12
    price = hours * workers * rates.price_per_hour + written * rates.price_per_tb
    return Cost(slides, workers, hours, limit, hours * workers, slides * rates.slide_mb / 1e6, written, price)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in asdict(Rates(1.0, 1.0)).items():
        required = name in ("engine_tiles_per_s", "read_tiles_per_s")
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, required=required, default=default)
    parser.add_argument("--slides", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--json", action="store_true")
    options = vars(parser.parse_args())
    slides, workers, as_json = options.pop("slides"), options.pop("workers"), options.pop("json")
    rates = Rates(**options)
    if not as_json:
        print("| slides | workers | hours | limited by | worker hours | read, TB | written, TB | price |")
        print("|---|---|---|---|---|---|---|---|")
    for count in slides:
        for number in workers:
            found = cost(count, number, rates)
            if as_json:
                print(json.dumps(asdict(found)))
                continue
            print(
                f"| {count:,} | {number} | {found.hours:,.1f} | {found.limit} | {found.worker_hours:,.0f} "
                f"| {found.read_tb:,.0f} | {found.written_tb:,.2f} | {found.price:,.0f} |"
            )


if __name__ == "__main__":
    main()
