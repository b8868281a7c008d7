"""End to end against LazySlide, TIAToolbox and WSInfer: same weights, same tiles, same cores, each in its environment.

    python benchmarks/peers.py [--side 6144] [--slide SLIDE] [--envs DIR] [--install] [--peers NAME ...]
        [--device cuda] [--json]

`--install` makes the missing environments, DIR/NAME, from PyPI. The network is a ResNet-50 of random weights. The tiles
are those that mtdp-extract keeps; each peer gets them as its own tiling step would leave them, and its own feature
extraction is timed: reading, inference and storing, not imports and not the search for tissue. Ours is timed for a
slide, search for tissue included, and as a whole command; in the precision that `auto` takes, and in fp32, as the
others compute. Features are compared with ours in fp32 at equal coordinates, after subtracting the mean tile: a network
of random weights makes all tiles look alike.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
import torchvision
from numpy.typing import NDArray

from mtdp_runtime.bundle import load_bundle
from mtdp_runtime.commands.demo_slide import write_demo_slide

IMAGENET = ("--mean", "0.485", "0.456", "0.406", "--std", "0.229", "0.224", "0.225")
DRIVERS = Path(__file__).parent / "peer_drivers"
PEERS = {
    "lazyslide": (),
    "tiatoolbox": (),
    "wsinfer": ("zarr<3", "openslide-python", "openslide-bin"),  # 0.6.1 does not import with zarr 3
}
REQUIRES = "import sys; from importlib.metadata import requires; print(*requires(sys.argv[1]), sep='\\n')"


@dataclass(frozen=True, slots=True)
class Row:
    """One tool: its rate, and its features against ours."""

    tool: str
    version: str
    tiles_per_s: float
    ours_is: float  # times as fast
    cosine_min: float | None = None
    cosine_mean: float | None = None

    def __str__(self) -> str:
        cosines = "" if self.cosine_min is None else f"{self.cosine_min:<11.6f} {self.cosine_mean:.6f}"
        return f"{self.tool:<24} {self.version:<14} {self.tiles_per_s:<8.1f} {self.ours_is:<8.1f} {cosines}"


def environment(folder: Path, peer: str, install: bool) -> Path:
    """Return the Python of a peer's environment: its newest release, with our torch, whatever torch it asks for."""
    python = folder / peer / "bin" / "python"
    if not python.exists():
        if not install:
            sys.exit(f"{folder / peer}: not there: add --install, or name others by --peers")
        subprocess.run([sys.executable, "-m", "venv", str(folder / peer)], check=True)
        same = [f"{m.__name__}=={m.__version__.split('+')[0]}" for m in (torch, torchvision)]
        pip = (python, "-m", "pip", "install", "-q")
        subprocess.run([*pip, *same], check=True)
        subprocess.run([*pip, "--no-deps", peer], check=True)
        asked = subprocess.run([python, "-c", REQUIRES, peer], check=True, capture_output=True, text=True).stdout
        needed = [line for line in asked.splitlines() if "extra ==" not in line and not line.startswith("torch")]
        subprocess.run([*pip, *needed, *PEERS[peer]], check=True)
    return python


def prepare(folder: Path, threads: int, slide: Path | None, side: int, device: str) -> dict[str, object]:
    """Make the slide, the network, its bundle and, by a first run of ours, the tiles; write the job that all get."""
    (folder / "slides").mkdir()
    given = folder / "slides" / ("generated.tiff" if slide is None else slide.name)
    if slide is None:
        write_demo_slide(given, side, side)
    else:
        shutil.copyfile(slide, given)
    torch.manual_seed(0)
    backbone = torchvision.models.resnet50()
    backbone.fc = torch.nn.Identity()
    torch.save(backbone.state_dict(), folder / "backbone.pth")
    command("export", "resnet50", "--weights", str(folder / "backbone.pth"), *IMAGENET, "--out", str(folder / "bundle"))
    ours(folder, given, threads, "auto")
    ours(folder, given, threads, "fp32")
    manifest = load_bundle(folder / "bundle").manifest
    with h5py.File(folder / "ours-auto" / f"{given.stem}.h5") as file:
        np.save(folder / "coords.npy", file["coords"][:])
        scale = float(json.loads(file.attrs["grid"])["scale"])
        job = {
            "slide": str(given),
            "device": device,
            "threads": threads,
            "tile_px": manifest.tile_px,
            "mpp": manifest.mpp,
        }
        job |= {"slide_mpp": float(file.attrs["mpp_level0"]), "scale": scale, "batch": 32}
        job |= {"mean": list(manifest.mean), "std": list(manifest.std), "precision": str(file.attrs["precision"])}
    (folder / "job.json").write_text(json.dumps(job))
    return job


def command(name: str, *arguments: str) -> str:
    """Run one of our commands; return what it printed."""
    done = subprocess.run([Path(sys.executable).with_name(f"mtdp-{name}"), *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"mtdp-{name}: {done.stderr.strip()}")
    return done.stdout


def ours(folder: Path, slide: Path, threads: int, precision: str) -> tuple[float, float, int]:
    """Return the seconds that mtdp-extract took for the slide, those of the whole command, and the number of tiles."""
    out = folder / f"ours-{precision}"
    shutil.rmtree(out, ignore_errors=True)
    options = ("--out", str(out), "--model", str(folder / "bundle"), "--threads", str(threads), "--no-report", "--json")
    start = time.perf_counter()
    said = command("extract", str(slide), *options, "--precision", precision)
    whole_s = time.perf_counter() - start
    line = json.loads(said.splitlines()[-1])
    return line["seconds"], whole_s, line["tiles"]


def theirs(folder: Path, python: Path, peer: str, threads: int) -> tuple[float, str]:
    """Return the seconds and the version of a peer, on the same cores."""
    for left in folder.glob(f"{peer}*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "WSINFER_FORCE_CPU": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, DRIVERS / f"run_{peer}.py", folder], capture_output=True, text=True, env=env, cwd=folder
    )
    if done.returncode:
        sys.exit(f"{peer}: {done.stderr.strip()[-2000:]}")
    said = json.loads(done.stdout.splitlines()[-1])
    return said["extract_s"], said["version"]


def of_ours(folder: Path, slide: Path, precision: str) -> dict[tuple[int, int], NDArray[np.floating]]:
    with h5py.File(folder / f"ours-{precision}" / f"{slide.stem}.h5") as file:
        return dict(zip(map(tuple, file["coords"][:].tolist()), file["features"][:], strict=True))


def of_peer(folder: Path, peer: str) -> dict[tuple[int, int], NDArray[np.floating]]:
    with np.load(folder / f"{peer}.npz") as file:
        return dict(zip(map(tuple, file["coords"].astype(int).tolist()), file["features"], strict=True))


def agreement(
    peer: str, mine: dict[tuple[int, int], NDArray[np.floating]], other: dict[tuple[int, int], NDArray[np.floating]]
) -> tuple[float, float]:
    """Return the smallest and the mean cosine between features, tile by tile at equal coordinates."""
    if mine.keys() != other.keys():
        sys.exit(f"{peer}: {len(mine.keys() ^ other.keys())} tiles at other places than ours")
    a, b = (centred(np.stack([features[at] for at in mine])) for features in (mine, other))
    cosines = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return float(cosines.min()), float(cosines.mean())


def centred(features: NDArray[np.floating]) -> NDArray[np.float64]:
    """Subtract each tile's mean feature (a softmax loses it), and then the mean tile."""
    features = features.astype(np.float64)
    features = features - features.mean(1, keepdims=True)
    return features - features.mean(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slide", type=Path, help="instead of a generated one")
    parser.add_argument("--side", type=int, default=6144, help="pixels of the generated slide")
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "mtdp" / "peers")
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu", help="where LazySlide computes, such as cuda; ours chooses itself")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.device != "cpu" and options.peers != ["lazyslide"]:
        parser.error("--device is for --peers lazyslide alone")
    pythons = {peer: environment(options.envs.resolve(), peer, options.install) for peer in options.peers}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = prepare(folder, options.threads, options.slide, options.side, options.device)
        slide, here = Path(str(job["slide"])), str(job["precision"])
        seconds: dict[str, list[float]] = {"slide": [], "command": [], "fp32": []} | {peer: [] for peer in pythons}
        versions: dict[str, str] = {}
        for _ in range(options.repeats):
            slide_s, whole_s, tiles = ours(folder, slide, options.threads, "auto")
            seconds["slide"].append(slide_s)
            seconds["command"].append(whole_s)
            if here != "fp32":
                seconds["fp32"].append(ours(folder, slide, options.threads, "fp32")[0])
            for peer, python in pythons.items():
                took, versions[peer] = theirs(folder, python, peer, options.threads)
                seconds[peer].append(took)
        rates = {key: tiles / statistics.median(values) for key, values in seconds.items() if values}
        plain = of_ours(folder, slide, "fp32")

        def row(tool: str, version: str, key: str, *cosines: float) -> Row:
            return Row(tool, version, rates[key], rates["slide"] / rates[key], *cosines)

        rows = [row("mtdp-extract, slide", here, "slide", *agreement("auto", plain, of_ours(folder, slide, "auto")))]
        rows.append(row("mtdp-extract, command", here, "command"))
        if here != "fp32":
            rows.append(row("mtdp-extract, slide", "fp32", "fp32"))
        for peer, version in versions.items():
            rows.append(row(peer, version, peer, *agreement(peer, plain, of_peer(folder, peer))))
    if options.json:
        print(json.dumps({"tiles": tiles, "threads": options.threads, "rows": [asdict(row) for row in rows]}))
        return
    print(f"{tiles} tiles of {job['tile_px']} px, scale {job['scale']:g}, {options.threads} threads")
    print(f"{'tool':<24} {'version':<14} {'tiles/s':<8} {'ours is':<8} {'cosine min':<11} mean")
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
