"""All that a bare GPU machine needs to install mtdp without a network, in pieces of a given size.

    python benchmarks/gpu_pack.py OUT [--python 3.12] [--piece-mib 60] [--extras gpu rtx] [--without-bench]

The machine is expected to have Python of that version, a driver for CUDA 13, and torch. OUT gets the pieces,
manifest.json with their digests, and install.py, which runs there: it checks, joins and installs. A wheel that the
package index does not have is named and left out (TensorRT's libraries come from NVIDIA's own index). Besides the
extras, the pack holds what benchmarks/gpu.py uses: the exporter's libraries and the test runner.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
BENCH = ("onnx>=1.18", "onnxscript>=0.5", "safetensors>=0.5", "jsonschema>=4.18", "pytest>=8.3", "hypothesis>=6.100")
BENCH_ALONE = ("timm>=1.0", "huggingface_hub")  # without what they need: torch is there
MIB = 1 << 20


def download(requirement: Iterable[str], wheels: Path, python: str, deps: bool = True) -> str:
    """Fetch wheels for that Python on Linux; return the last line of what pip said where it could not."""
    tags = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (17, 24, 26, 27, 28, 31, 34)]
    tags += ["--platform=manylinux2014_x86_64", "--platform=linux_x86_64", "--platform=any"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--only-binary=:all:", f"--python-version={python}"]
    command += ["--implementation=cp", *tags, f"--dest={wheels}", f"--find-links={wheels}"]
    done = subprocess.run([*command, *([] if deps else ["--no-deps"]), *requirement], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return "" if done.returncode == 0 else (said or ["pip failed"])[-1].removeprefix("ERROR: ")


def build(requirement: str, wheels: Path, python: str) -> Path | None:
    """Build what has no wheel, such as a package that only names others; None where that gives none for that Python."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", f"--wheel-dir={name}", requirement]
        subprocess.run(command, capture_output=True)
        for built in Path(name).glob("*.whl"):
            tag = built.stem.split("-")[-3]
            if tag.startswith("py") or tag == f"cp{python.replace('.', '')}":
                return Path(shutil.copy(built, wheels))
    return None


def fetch(requirement: str, wheels: Path, python: str, deps: bool) -> list[str]:
    """Get a requirement and all that it needs; return a line for each thing that cannot be had."""
    why = download([requirement], wheels, python, deps)
    built = build(requirement, wheels, python) if why else None
    if built is None:
        return [f"{requirement} is left out: {why}"] if why else []
    with zipfile.ZipFile(built) as wheel:
        (facts,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        lines = wheel.read(facts).decode().splitlines()
    needs = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    return [why for one in needs if "extra ==" not in one for why in fetch(one, wheels, python, deps)]


def collect(wheels: Path, python: str, extras: list[str], bench: bool) -> dict[str, list[str]]:
    """Fill the folder; return what to install from it, what of it alone, and a line for each thing that it lacks."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", f"--wheel-dir={wheels}", str(ROOT)], check=True
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [(one, True) for one in project["dependencies"]]
    wanted += [(one, True) for extra in extras for one in project["optional-dependencies"][extra]]
    wanted += [(one, True) for one in BENCH if bench] + [(one, False) for one in BENCH_ALONE if bench]
    found: dict[str, list[str]] = {"install": ["mtdp"], "install_alone": [], "lacks": []}
    for requirement, deps in dict.fromkeys(wanted):
        lacks = fetch(requirement, wheels, python, deps)
        found["lacks"] += lacks
        if not lacks:
            found["install" if deps else "install_alone"].append(requirement)
    return found


def write_pack(wheels: Path, out: Path, piece_bytes: int, facts: dict[str, object]) -> int:
    """Write the wheels as one archive in pieces, with digests and the installer; return the number of pieces."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("pack.*"):
        old.unlink()
    pieces: dict[str, str] = {}
    with tempfile.TemporaryFile() as whole:
        with tarfile.open(fileobj=whole, mode="w") as archive:
            for wheel in sorted(wheels.glob("*.whl")):
                archive.add(wheel, wheel.name)
        whole.seek(0)
        while chunk := whole.read(piece_bytes):
            name = f"pack.{len(pieces):03d}"
            (out / name).write_bytes(chunk)
            pieces[name] = hashlib.sha256(chunk).hexdigest()
    (out / "manifest.json").write_text(json.dumps({**facts, "pieces": pieces}, indent=1))
    shutil.copy(HERE / "gpu_pack_install.py", out / "install.py")
    return len(pieces)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--python", default="3.12", help="of the machine that installs")
    parser.add_argument("--piece-mib", type=int, default=60)
    parser.add_argument("--extras", nargs="*", default=["gpu", "rtx"], choices=["cpu", "gpu", "rtx"])
    parser.add_argument("--without-bench", action="store_true", help="leave out what benchmarks/gpu.py uses")
    options = parser.parse_args()
    if options.piece_mib < 1:
        parser.error("--piece-mib: at least 1")
    with tempfile.TemporaryDirectory() as name:
        wheels = Path(name)
        found = collect(wheels, options.python, options.extras, not options.without_bench)
        facts = {"python": options.python, **found}
        count = write_pack(wheels, options.out, options.piece_mib * MIB, facts)
        size = sum(wheel.stat().st_size for wheel in wheels.glob("*.whl"))
    for line in found["lacks"]:
        print(line, file=sys.stderr)
    print(
        f"{options.out}: {size / 1e6:.0f} MB in {count} pieces; there: python{options.python} {options.out}/install.py"
    )


if __name__ == "__main__":
    main()
