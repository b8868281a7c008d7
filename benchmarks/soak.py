"""Many small slides in one run: does memory stay flat, do file handles, and what does a slide cost beyond its work?

    python benchmarks/soak.py [--slides 2000] [--json FILE]

A slide of 1024 x 768 px is written once and linked under many names. The command runs over all of them, as a user
runs it, and its worker is watched from outside: resident memory and open files, by the number of slides done. The
overhead of a slide is the time between the lines of two slides, less the seconds that the run itself says it worked on
the slide (opening, planning, reading, inference, storing), and, to be strict, the whole time of a slide that has no
tissue: all that is left there is overhead.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mtdp_runtime.commands.demo_slide import write_demo_slide


def write_glass(path: Path) -> None:
    """A slide of the same size without tissue."""
    import tifffile

    glass = np.full((768, 1024, 3), 243, np.uint8)
    options: dict[str, Any] = {"tile": (256, 256), "photometric": "rgb", "compression": "jpeg", "metadata": None}
    with tifffile.TiffWriter(path) as tiff:
        for downsample in (1, 2):
            tiff.write(glass, resolution=(2e4 / downsample,) * 2, resolutionunit="CENTIMETER", **options)
            glass = cv2.resize(glass, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)


def worker_of(parent: int) -> int | None:
    """Return the process that does the work: the parent's only child."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii").split()
    return int(children[0]) if children else None


def look(pid: int) -> tuple[float, int]:
    """Return resident MiB and open files."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208


def run(folder: Path, count: int, name: str, options: list[str]) -> dict[str, Any]:
    slides, out = folder / name, folder / f"{name}-out"
    slides.mkdir()
    for number in range(count):
        (slides / f"s{number:05}.tiff").hardlink_to(folder / f"{name}.tiff")
    command = [sys.executable, "-c", "from mtdp_runtime.commands.extract import main; main()"]
    command += [str(slides), "--out", str(out), "--json", "--no-report", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    seen: list[tuple[float, float, float, int]] = []  # when, seconds of work, MiB, files
    for text in process.stdout:
        line = json.loads(text)
        assert line["status"] in ("done", "no-tissue"), line
        pid = worker_of(process.pid)
        memory_mib, files = look(pid) if pid is not None else (0.0, 0)
        seen.append((time.perf_counter(), line["seconds"], memory_mib, files))
    assert process.wait() == 0
    assert len(seen) == count
    whole_s = [b[0] - a[0] for a, b in itertools.pairwise(seen)]
    beyond_s = [whole - work[1] for whole, work in zip(whole_s, seen[1:], strict=True)]
    tenth = max(1, count // 10)
    return {
        "slides": count,
        "seconds_a_slide_median": round(statistics.median(whole_s), 4),
        "beyond_its_work_s_median": round(statistics.median(beyond_s), 4),
        "beyond_its_work_s_mean": round(statistics.fmean(beyond_s), 4),
        "memory_mib_first_tenth": round(statistics.fmean(s[2] for s in seen[1 : tenth + 1]), 1),
        "memory_mib_last_tenth": round(statistics.fmean(s[2] for s in seen[-tenth - 1 : -1]), 1),
        "files_first": seen[min(1, count - 1)][3],
        "files_most": max(s[3] for s in seen),
        "files_last": seen[-2][3],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--slides", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    options, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="mtdp-soak-") as name:
        folder = Path(name)
        write_demo_slide(folder / "tissue.tiff", 1024, 768)
        write_glass(folder / "glass.tiff")
        result = {
            "tissue": run(folder, options.slides, "tissue", rest),
            "no_tissue": run(folder, options.slides, "glass", rest),
            "options": rest,
        }
    text = json.dumps(result, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
