"""Reading tiles: ours against OpenSlide + PIL, and against the bare JPEG decoder, on one slide, in one run.

    python benchmarks/read.py [--side 20480] [--tiles 2000] [--repeats 3] [--peers] [--cpu-time] [--json]

Each figure is the median of the repeats, tiles/s; the ways take turns, so that drift of the machine hits all alike.
Every repeat opens the slide anew; the file cache is warm. "plain" is what tutorials do: OpenSlide.read_region, PIL to
RGB, PIL's box filter where the scale asks for it, and a NumPy array.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import imagecodecs
import numpy as np
import openslide
import tifffile
from PIL import Image

from mtdp_runtime.commands.demo_slide import write_demo_slide
from mtdp_runtime.slide import Slide
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.slide.openslide import OpenSlideReader

MPP = 0.25
AT_ONCE = 8
Reader = Callable[[Path, list[tuple[int, int]], int, float, int], None]


def in_threads(threads: int, coords: list[tuple[int, int]], work: Callable[[Iterator[tuple[int, int]]], None]) -> None:
    """Let each thread take the next few neighbouring tiles, again and again, as the pipeline does."""
    parts = iter([coords[i : i + AT_ONCE] for i in range(0, len(coords), AT_ONCE)])
    lock = Lock()

    def own() -> Iterator[tuple[int, int]]:
        while True:
            with lock:
                part = next(parts, None)
            if part is None:
                return
            yield from part

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [own() for _ in range(threads)]))


def plain(path: Path, coords: list[tuple[int, int]], tile_px: int, scale: float, threads: int) -> None:
    def work(part: Iterator[tuple[int, int]]) -> None:
        side = round(tile_px * scale)
        with openslide.OpenSlide(path) as slide:
            for x0, y0 in part:
                tile = slide.read_region((x0, y0), 0, (side, side)).convert("RGB")
                if side != tile_px:
                    tile = tile.resize((tile_px, tile_px), Image.Resampling.BOX)
                np.asarray(tile)

    in_threads(threads, coords, work)


def through(open_it: Callable[[Path], Slide]) -> Reader:
    def read(path: Path, coords: list[tuple[int, int]], tile_px: int, scale: float, threads: int) -> None:
        with open_it(path) as slide:

            def work(part: Iterator[tuple[int, int]]) -> None:
                out = np.empty((tile_px, tile_px, 3), np.uint8)
                for x0, y0 in part:
                    slide.read_into(out, x0, y0, scale)

            in_threads(threads, coords, work)

    return read


def bare_decoder(path: Path, coords: list[tuple[int, int]], tile_px: int, scale: float, threads: int) -> None:
    """Read and decode as many compressed tiles as the rectangles cover, each once, and do nothing with them."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0].aspage()
        across = -(-page.imagewidth // page.tilewidth)
        side = tile_px * scale
        needed = sorted(
            {
                row * across + column
                for x0, y0 in coords
                for row in range(int(y0 // page.tilelength), -(-int(y0 + side) // page.tilelength))
                for column in range(int(x0 // page.tilewidth), -(-int(x0 + side) // page.tilewidth))
            }
        )
        places = [(page.dataoffsets[i], page.databytecounts[i]) for i in needed]
    file = os.open(path, os.O_RDONLY)

    shape = (page.tilelength, page.tilewidth, 3)

    def work(part: Iterator[tuple[int, int]]) -> None:
        out = np.empty(shape, np.uint8)  # used again: a new array a tile would cost the decoder a third of its rate
        for offset, size in part:
            imagecodecs.jpeg8_decode(os.pread(file, size, offset), colorspace="YCBCR", outcolorspace="RGB", out=out)

    in_threads(threads, places, work)
    os.close(file)


def dataloader(path: Path, coords: list[tuple[int, int]], tile_px: int, scale: float, threads: int) -> None:
    """OpenSlide + PIL + torchvision's transforms in a DataLoader, a worker process a core: the common recipe."""
    import torch
    from torchvision import transforms

    side = round(tile_px * scale)
    steps = [transforms.Resize((tile_px, tile_px))] if side != tile_px else []
    transform = transforms.Compose(
        [*steps, transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )

    class Tiles(torch.utils.data.Dataset[torch.Tensor]):
        slide: openslide.OpenSlide | None = None

        def __len__(self) -> int:
            return len(coords)

        def __getitem__(self, index: int) -> torch.Tensor:
            if self.slide is None:
                self.slide = openslide.OpenSlide(path)
            found: torch.Tensor = transform(self.slide.read_region(coords[index], 0, (side, side)).convert("RGB"))
            return found

    for _ in torch.utils.data.DataLoader(Tiles(), batch_size=32, num_workers=threads):
        pass


def vips(path: Path, coords: list[tuple[int, int]], tile_px: int, scale: float, threads: int) -> None:
    import pyvips

    side = round(tile_px * scale)

    def work(part: Iterator[tuple[int, int]]) -> None:
        region = pyvips.Region.new(pyvips.Image.new_from_file(str(path), access="random"))
        for x0, y0 in part:
            tile = np.frombuffer(region.fetch(x0, y0, side, side), np.uint8).reshape(side, side, -1)
            if side != tile_px:
                np.asarray(Image.fromarray(tile).resize((tile_px, tile_px), Image.Resampling.BOX))

    in_threads(threads, coords, work)


def fast_slide(path: Path, coords: list[tuple[int, int]], tile_px: int, scale: float, threads: int) -> None:
    import fastslide

    slide = fastslide.FastSlide.from_file_path(str(path))
    side = round(tile_px * scale)

    def work(part: Iterator[tuple[int, int]]) -> None:
        for x0, y0 in part:
            tile = slide.read_region(location=(x0, y0), level=0, size=(side, side)).numpy()
            if side != tile_px:
                np.asarray(Image.fromarray(tile).resize((tile_px, tile_px), Image.Resampling.BOX))

    in_threads(threads, coords, work)
    slide.close()


def cu_cim(path: Path, coords: list[tuple[int, int]], tile_px: int, scale: float, threads: int) -> None:
    """cuCIM's reader on the CPU."""
    import cucim

    slide = cucim.CuImage(str(path))
    side = round(tile_px * scale)

    def work(part: Iterator[tuple[int, int]]) -> None:
        for x0, y0 in part:
            tile = np.asarray(slide.read_region((x0, y0), (side, side), 0))
            if side != tile_px:
                np.asarray(Image.fromarray(tile).resize((tile_px, tile_px), Image.Resampling.BOX))

    in_threads(threads, coords, work)


# Each is measured where its package is installed and loads.
OPTIONAL: dict[str, tuple[str, Reader]] = {
    "dataloader": ("torchvision", dataloader),
    "vips": ("pyvips", vips),
    "fastslide": ("fastslide", fast_slide),
    "cucim": ("cucim", cu_cim),
}
WAYS: dict[str, Reader] = {
    "plain": plain,
    "ours, openslide": through(lambda path: OpenSlideReader(path, MPP, "benchmark")),
    "ours": through(lambda path: open_slide(path, MPP, "benchmark")),
    "bare decoder": bare_decoder,
}
# name -> tile_px, scale, stride in level-0 pixels, first pixel
CASES = {
    "aligned: 256 px, scale 1": (256, 1.0, 256, 0),
    "unaligned: 224 px, scale 1": (224, 1.0, 224, 37),
    "0.25 -> 0.5 mpp, no such level": (224, 2.0, 448, 0),
    "scale 1.979": (224, 1.979, 443, 5),
}


def loads(module: str) -> bool:
    """Say whether a package is here and can be imported; one that is here and cannot says why on stderr."""
    if importlib.util.find_spec(module) is None:
        return False
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(f"{module}: left out: {error}", file=sys.stderr)
        return False
    return True


def tiles_of(side: int, tile_px: int, scale: float, stride: int, first: int, most: int) -> list[tuple[int, int]]:
    """Rows of neighbouring tiles from the middle of the slide."""
    last = side - int(tile_px * scale) - 1
    xs = range(first, last, stride)
    top = side // 3 // stride * stride + first
    rows = min(max(1, most // len(xs)), (last - top) // stride)
    return [(x, top + row * stride) for row in range(rows) for x in xs][:most]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=20480)
    parser.add_argument("--tiles", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peers", action="store_true", help="other readers, too, where they are installed")
    parser.add_argument("--cpu-time", action="store_true", help="tiles a second of CPU time: for a busy machine")
    options = parser.parse_args()
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # cuCIM's libraries print to standard output, which is ours
    os.environ.setdefault("CUFILE_LOGFILE_PATH", os.devnull)  # and leave a log where they are called
    clock = time.process_time if options.cpu_time else time.perf_counter
    ways = dict(WAYS)
    if options.peers:
        ways |= {name: way for name, (module, way) in OPTIONAL.items() if loads(module)}
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slide.tiff"
        write_demo_slide(path, options.side, options.side, MPP, most_levels=1)
        path.read_bytes()
        for threads in options.threads:
            for case, (tile_px, scale, stride, first) in CASES.items():
                coords = tiles_of(options.side, tile_px, scale, stride, first, options.tiles)
                rates: dict[str, list[float]] = {way: [] for way in ways}
                for _ in range(options.repeats):
                    for way, read in ways.items():
                        start = clock()
                        read(path, coords, tile_px, scale, threads)
                        rates[way].append(len(coords) / (clock() - start))
                medians = {way: statistics.median(values) for way, values in rates.items()}
                results.append(
                    {"case": case, "threads": threads, "tiles": len(coords), "tiles_per_s": medians, "runs": rates}
                )
                if not options.json:
                    shown = "  ".join(f"{way} {rate:7.0f}" for way, rate in medians.items())
                    ratio = medians["ours"] / medians["plain"]
                    print(
                        f"{case:<32} {threads} threads: {shown}   ours/plain {ratio:.1f}, "
                        f"ours/bare {medians['ours'] / medians['bare decoder']:.2f}",
                        file=stdout,
                        flush=True,
                    )
    if options.json:
        versions = {"openslide": openslide.__library_version__, "imagecodecs": imagecodecs.jpeg8_version()}
        found = {"machine": platform.platform(), "versions": versions, "results": results}
        print(json.dumps(found, indent=1), file=stdout, flush=True)


if __name__ == "__main__":
    main()
