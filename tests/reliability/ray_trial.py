"""A cohort on a Ray cluster of two actors, one of them killed in mid-slide, compared with the run without Ray.

    python tests/reliability/ray_trial.py FOLDER --slides 200

Prints what was compared, and exits with 1 where a file differs by a byte of its datasets, or is missing.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from crew import OPTIONS, content, run_and_disturb, write_cohort
from support import extract, write_tiny_bundle


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--slides", type=int, default=200)
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    folder.mkdir()
    slides, bundle = write_cohort(folder / "slides", 4, options.slides - 4), write_tiny_bundle(folder / "tiny")
    arguments = [slides, "--model", bundle, *OPTIONS]
    start = time.perf_counter()
    assert extract(*arguments, "--out", folder / "local").returncode == 0
    local_s, start = time.perf_counter() - start, time.perf_counter()
    ray = [*arguments, "--scheduler", "ray", "--workers", 2]
    result = run_and_disturb(ray, folder / "ray", {"big-1": (signal.SIGKILL, 1)})
    ray_s = time.perf_counter() - start
    local, there = content(folder / "local"), content(folder / "ray")
    print(
        json.dumps(
            {
                "slides": len(local),
                "equal": sum(there.get(name) == digest for name, digest in local.items()),
                "killed_workers": 1,
                "exit_code": result.returncode,
                "local_s": round(local_s, 1),
                "ray_s": round(ray_s, 1),
            }
        )
    )
    sys.exit(local != there or result.returncode != 0)


if __name__ == "__main__":
    main()
