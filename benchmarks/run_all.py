"""Everything that benchmarks/RESULTS.md says of the runtime, by one command, into one folder of JSON files.

    python benchmarks/run_all.py [--slide SLIDE.svs] [--envs DIR] [--pool POOL.toml] [--quick]

Run it on a machine that does nothing else. A step that fails is named, and the others go on. `--slide` adds what needs
real tissue, `--envs` the comparison with LazySlide, TIAToolbox and WSInfer, whose environments it makes there from
PyPI, and `--pool` training. projection.json is no measurement: how many host cores feed a GPU engine of so many
tiles/s, if reading scales with the cores.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions
from pathlib import Path

from mtdp_runtime.backends.openvino import OpenVINO

HERE = Path(__file__).parent
ENGINE_RATES = (1000, 3000, 10000)  # tiles/s, for the projection
VERSIONS = ("numpy", "imagecodecs", "simplejpeg", "opencv-python-headless", "openslide-bin", "openvino", "onnxruntime")


def run(name: str, command: list[str], out: Path) -> str | None:
    """Run a step; its standard output becomes out/NAME. Return it, or None where the step failed."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    (out / name).write_text(done.stdout)
    said = "" if done.returncode == 0 else f": failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    print(f"{name:<22} {time.perf_counter() - start:6.1f} s{said}", flush=True)
    return done.stdout if done.returncode == 0 else None


def projection(reading: str) -> dict[str, object]:
    """Cores = R / (tiles/s a core), from the one-thread rates of this machine."""
    cases = [r for r in json.loads(reading)["results"] if r["threads"] == 1]
    return {
        "what": "a projection, not a measurement: reading on one core of this machine, times the cores",
        "host_cores": {
            r["case"]: {
                f"{rate} tiles/s": {way: math.ceil(rate / r["tiles_per_s"][way]) for way in ("plain", "ours")}
                for rate in ENGINE_RATES
            }
            for r in cases
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slide", type=Path, help="a real slide; steps that need one are left out without it")
    parser.add_argument("--envs", type=Path, help="folder for the environments of the peers (several GB each)")
    parser.add_argument("--pool", type=Path, help="labelled tasks, for the speed of training")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "run")
    parser.add_argument("--quick", action="store_true", help="smaller slides, one repeat: to see that it works")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    python, repeats = sys.executable, "1" if options.quick else "3"
    installed = {d.metadata["Name"].lower(): d.version for d in distributions()}
    machine = {
        "machine": platform.platform(),
        "cpu": next((li.split(":")[1].strip() for li in _cpuinfo() if li.startswith("model name")), "unknown"),
        "python": platform.python_version(),
        "versions": {name: installed.get(name) for name in VERSIONS},
        "date": time.strftime("%Y-%m-%d"),
    }
    (options.out / "machine.json").write_text(json.dumps(machine, indent=1))
    size = ["--side", "4096", "--tiles", "200"] if options.quick else ["--side", "20000", "--tiles", "500"]
    bench = [
        python,
        "-c",
        "import sys; from mtdp_runtime.commands.bench import main; sys.argv[0] = 'mtdp-bench'; main()",
    ]
    reading = run(
        "read.json", [python, f"{HERE}/read.py", *size, "--repeats", repeats, "--peers", "--json"], options.out
    )
    if reading is not None:
        (options.out / "projection.json").write_text(json.dumps(projection(reading), indent=1))
    for precision in ("f32", "bf16") if "bf16" in OpenVINO.probe().precisions else ("f32",):
        steps = [python, f"{HERE}/uint8_graph.py", "--precision", precision]
        run(f"uint8_graph_{precision}.txt", steps, options.out)
    archs = ["resnet18"] if options.quick else ["resnet50", "densenet121"]
    run("infer.json", [python, f"{HERE}/infer.py", "--arch", *archs, "--json"], options.out)
    run("batch.json", [python, f"{HERE}/batch.py", "--arch", *archs, "--rounds", repeats, "--json"], options.out)
    run("sparse.json", [python, f"{HERE}/sparse.py", *(["--side", "20000"] if options.quick else [])], options.out)
    for turn in range(int(repeats)):
        run(f"start_{turn + 1}.json", [python, f"{HERE}/sparse.py", "--side", "4096"], options.out)
    turns = ["--rounds", "3"] if options.quick else []
    run("averaging.txt", [python, f"{HERE}/averaging.py", *turns], options.out)
    seen = [] if options.slide is None else ["--slide", str(options.slide)]
    run("tissue.txt", [python, f"{HERE}/tissue.py", *turns, *seen], options.out)
    run("start.txt", [python, f"{HERE}/start.py", *turns], options.out)
    run("extract_demo.json", [*bench, "extract", "--repeats", repeats, "--json"], options.out)
    small = ["--side", "20000", "--rows", "20000"] if options.quick else []
    run("view.json", [python, f"{HERE}/view.py", *small], options.out)
    with tempfile.TemporaryDirectory() as folder:
        bundle = f"{folder}/resnet50"
        export = [python, "-c", "from mtdp_export.cli import main; main()", "resnet50", "--weights", "random"]
        if run("export_resnet50.txt", [*export, "--out", bundle], options.out) is not None:
            steps = [*bench, "extract", "--model", bundle, "--repeats", repeats, "--json"]
            run("extract_demo_resnet50.json", steps, options.out)
    if options.envs is not None:
        steps = [python, f"{HERE}/peers.py", "--envs", str(options.envs), "--install", "--json"]
        run("peers.json", steps + (["--side", "2048", "--repeats", "1"] if options.quick else []), options.out)
    if options.slide is not None:
        slide = str(options.slide)
        run("reduced.json", [python, f"{HERE}/reduced.py", slide, "--reductions", "2", "4", "8", "--json"], options.out)
        steps = [python, f"{HERE}/int8.py", "--arch", *archs, "--calibration", slide, "--tiles", "16", "--json"]
        run("int8.json", [*steps, "--rounds", repeats], options.out)
        run("extract_real.json", [*bench, "extract", slide, "--repeats", repeats, "--json"], options.out)
        run("read_real_cold.json", [*bench, "read", slide, "--repeats", repeats, "--cold", "--json"], options.out)
    if options.pool is not None:
        for arch in archs:
            steps = [python, f"{HERE}/train.py", "--pool", str(options.pool), "--arch", arch, "--batch-size", "64"]
            run(
                f"train_{arch}.txt",
                [*steps, "--iterations", "4", "--repeats", "1" if options.quick else "2"],
                options.out,
            )


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
