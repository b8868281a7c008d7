"""How long a command takes to start: told that a slide is finished already, and until a small slide's file is whole.

    python benchmarks/start.py [--other OTHER/bin/mtdp-extract] [--rounds 15] [--model BUNDLE]

The slide is the demo's. With `--other`, the command of another environment (another version) takes turns with this one,
on a folder of its own, and the ratio is the median of the pairs.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, help="mtdp-extract of another environment")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model", type=Path, help="a bundle; the packaged model if left out")
    options = parser.parse_args()
    commands = {"this": Path(sys.executable).parent / "mtdp-extract"}
    if options.other is not None:
        commands["other"] = options.other
    model = [] if options.model is None else ["--model", str(options.model.resolve())]
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        subprocess.run([commands["this"], "--demo", "--out", "demo", "--quiet"], cwd=work, check=True)
        slide = next(path for path in work.rglob("demo-slide.*") if path.suffix in (".tiff", ".tif", ".svs"))
        for what in ("a new slide", "a finished slide"):
            times: dict[str, list[float]] = {name: [] for name in commands}
            for turn in range(options.rounds + 1):
                for name, command in commands.items():
                    out = work / f"out-{name}"
                    if what == "a new slide":
                        shutil.rmtree(out, ignore_errors=True)
                    asked = [str(command), str(slide), "--out", str(out), "--no-report", "--quiet", *model]
                    start = time.perf_counter()
                    subprocess.run(asked, check=True, capture_output=True)
                    if turn:  # the first compiles the model, and fills the system's cache of files
                        times[name].append(time.perf_counter() - start)
            shown = ", ".join(f"{name} {statistics.median(each):.2f} s" for name, each in times.items())
            if "other" in times:
                pairs = zip(times["this"], times["other"], strict=True)
                shown += f"; {statistics.median(mine / theirs for mine, theirs in pairs):.2f} of the other's"
            print(f"{what}: {shown}")


if __name__ == "__main__":
    main()
