"""What `gpu.py` found, as a table for people; and how many host cores an engine needs with this reader."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def host_cores(decode: Iterable[Row], scale: float, tiles_per_s: float) -> tuple[int, bool] | None:
    """Return how many threads of the reader feed an engine of so many tiles/s, and whether that was measured.

    Between two measured numbers of threads the rate is taken to be linear; beyond the last one, each further thread to
    bring what one brought on average, which is a projection.

    >>> rates = [{"scale": 1.0, "threads": 1, "tiles_per_s": 100.0}, {"scale": 1.0, "threads": 4, "tiles_per_s": 340.0}]
    >>> host_cores(rates, 1.0, 90.0), host_cores(rates, 1.0, 250.0), host_cores(rates, 1.0, 850.0)
    ((1, True), (3, True), (10, False))
    """
    points = sorted((row["threads"], row["tiles_per_s"]) for row in decode if row["scale"] == scale)
    if not points:
        return None
    before = (0, 0.0)
    for threads, rate in points:
        if rate >= tiles_per_s:
            share = (tiles_per_s - before[1]) / (rate - before[1]) if rate > before[1] else 1.0
            return max(1, math.ceil(before[0] + share * (threads - before[0]) - 1e-9)), True
        before = max(before, (threads, rate), key=lambda point: point[1])
    threads, rate = points[-1]
    return math.ceil(tiles_per_s * threads / rate), False


def sentences(rows: Sequence[Row]) -> list[str]:
    """Say for the fastest way of each engine and network how many host cores it needs."""
    decode = [row for row in rows if row["what"] == "decode"]
    scales = sorted({row["scale"] for row in decode})
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row["what"] == "infer" and row["way"] != "torch":
            key = (row["way"], row["arch"])
            best[key] = max(best.get(key, row), row, key=lambda one: one["tiles_per_s"])
    said = []
    for (way, arch), row in best.items():
        needed = {scale: host_cores(decode, scale, row["tiles_per_s"]) for scale in scales}
        parts = [
            f"{found[0]}{'' if found[1] else ' (projected)'} at scale {scale:g}"
            for scale, found in needed.items()
            if found is not None
        ]
        if parts:
            rate = f"{row['precision']}, batch {row['batch']}, {row['tiles_per_s']:.0f} tiles/s"
            said.append(
                f"{way} with {arch} ({rate}): this engine needs N host cores with this reader, N = {', '.join(parts)}."
            )
    return said


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    shown = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in (list(head), ["---"] * len(head), *shown)) + "\n"


def markdown(report: Mapping[str, Any]) -> str:
    """Return the whole report."""
    rows: list[Row] = report.get("rows", [])

    def of(what: str) -> list[Row]:
        return [row for row in rows if row["what"] == what]

    parts = ["# A GPU's first minutes\n"]
    if report["dry_run"]:
        parts.append(
            "**A dry run: the GPU is acted out, the model and the slide are tiny. No figure here means anything.**\n"
        )
    parts += [f"{report['date']}: {row['text']}\n" for row in of("machine")]
    parts += [f"- {row['text']}\n" for row in of("finding")]
    if of("infer"):
        parts += ["## The model alone\n", _infer(of("infer"))]
        parts.append("\n".join(sentences(rows)) + "\n")
    if of("copies"):
        lines = [(row["direction"], row["megabytes"], row["gigabytes_per_s"]) for row in of("copies")]
        parts += ["## Copies alone\n", table(("direction", "MB a batch", "GB/s"), lines)]
    if of("decode"):
        lines = [(row["scale"], row["threads"], row["tiles_per_s"]) for row in of("decode")]
        parts += ["## Decoding on the host alone\n", table(("scale", "threads", "tiles/s"), lines)]
    if of("extract"):
        parts += ["## End to end\n", _extract(of("extract"))]
    parts += [f"## Other tools\n\n{row['text']}\n" for row in of("peers")]
    steps = [(step["step"], step["status"].replace("|", "/"), step["seconds"]) for step in report["steps"]]
    parts += ["## Steps\n", table(("step", "how it went", "s"), steps)]
    return "\n".join(parts)


def _infer(rows: Sequence[Row]) -> str:
    """Return tiles/s, a line for each network, way and precision, and a column for each batch."""
    batches = sorted({row["batch"] for row in rows})
    lines: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault((row["arch"], row["way"], row["precision"]), {"cosine": "", "loaded": 0.0})
        line[row["batch"]] = row["tiles_per_s"]
        line["cosine"] = f"{row['cosine']:.7f}" if "cosine" in row else line["cosine"]
        line["loaded"] = max(line["loaded"], row["load_s"])
    head = ("network", "way", "precision", *(f"batch {batch}" for batch in batches), "cosine", "longest load, s")
    body = [(*key, *(of.get(batch, "") for batch in batches), of["cosine"], of["loaded"]) for key, of in lines.items()]
    return table(head, body)


def _extract(rows: Sequence[Row]) -> str:
    head = ("scale", "engine", "tiles", "tiles/s", "GPU waited", "bottleneck", "read busy, s", "infer busy, s")
    head += ("store busy, s", "GPU used", "GPU MB", "SM MHz")
    names = ("scale", "engine", "tiles", "tiles_per_s", "waited", "bottleneck", "read_s", "infer_s", "store_s")
    return table(head, [[row.get(name, "") for name in (*names, "gpu_used", "gpu_mb", "sm_mhz")] for row in rows])
