"""Damages real slides in many ways, and judges what the readers make of them.

    MTDP_DATA=... python tests/reliability/damage.py --count 10000 [--seed 0] [--out results.json]

A mutant is a function of the seed and its number. It is opened, its tissue found, and up to 12 of its tiles are read,
in a child process with a time limit: as `mtdp-extract` does it, which keeps its readers in a worker, too. Progress goes
to stderr; the result names the slowest mutants, and `--keep FOLDER --count N` writes mutant N to look at. The verdict:

    refused    the slide fails with a message
    flagged    some of the tiles have a status that says bad; the others are as in the undamaged slide
    equal      every tile is as in the undamaged slide
    undetected the pixels differ, no decoder noticed, and the reader that ran gives what OpenSlide gives
    died       native code ended the process: the worker's parent records the slide as failed
    hung       the same, at the time limit
    WRONG      a tile is neither as in the undamaged slide, nor flagged, nor what OpenSlide makes of the damaged file
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mtdp_runtime.errors import RuntimeFailure
from mtdp_runtime.pipeline.read import read_tile
from mtdp_runtime.settings import ExtractSettings
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.slide.openslide import OpenSlideReader
from mtdp_runtime.store.layout import TileStatus
from mtdp_runtime.tiling.plan import make_plan
from support import pyramid, stained

TILE_PX, TILES, LIMIT_S, MEMORY_BYTES = 64, 12, 20.0, 6 << 30
PROGRESS_S, SLOWEST = 10.0, 10


@dataclass
class Source:
    """An undamaged slide, and where its structures lie."""

    path: Path
    mpp: float | None  # given, where the slide has none that fits
    scale_mpp: float  # of the tiles that are read
    content: bytes
    header: list[tuple[int, int]] = field(default_factory=list)  # (start, length)
    offsets: list[tuple[int, int]] = field(default_factory=list)  # offset and byte-count arrays
    data: list[tuple[int, int]] = field(default_factory=list)  # compressed tiles
    sizes: list[tuple[int, int]] = field(default_factory=list)  # values that say how large something is
    links: list[int] = field(default_factory=list)  # where the offset of the next directory stands
    directories: list[int] = field(default_factory=list)


def crop_of_an_svs(source: Path, path: Path, across: int, down: int) -> Path:
    """Write a slide of some of the compressed tiles of another, as they are."""
    with tifffile.TiffFile(source) as tiff:
        page: Any = tiff.pages[0]
        columns = -(-page.imagewidth // page.tilewidth)
        content = source.read_bytes()
        chosen = [r * columns + c for r in range(3, 3 + down) for c in range(2, 2 + across)]
        tiles = [content[page.dataoffsets[i] :][: page.databytecounts[i]] for i in chosen]
        tables = [] if page.jpegtables is None else [(347, 7, len(page.jpegtables), page.jpegtables, True)]
        with tifffile.TiffWriter(path) as writer:
            writer.write(
                iter(tiles),
                shape=(down * page.tilelength, across * page.tilewidth, 3),
                dtype=np.uint8,
                tile=(page.tilelength, page.tilewidth),
                photometric=page.photometric,
                compression=page.compression,
                description=page.description,
                metadata=None,
                extratags=tables,
            )
    return path


def sources(slides: Path, folder: Path) -> list[tuple[Source, int]]:
    """Return the slides to damage, each with its weight."""
    cmu, tcga = slides / "CMU-1-Small-Region.svs", slides / "tcga-cr-7395-01a-01-ts1.svs"
    found: list[tuple[Path, float | None, float, int]] = [
        (crop_of_an_svs(cmu, folder / "cmu-crop.svs", 3, 3), None, 0.499, 30),
        (crop_of_an_svs(tcga, folder / "tcga-crop.svs", 2, 2), 0.25, 0.5, 10),
        (pyramid(stained(384, 512), folder / "jpeg.tiff", 0.5, 2, lossy=True), None, 0.5, 20),
        (pyramid(stained(256, 384), folder / "zlib.tiff", 0.5, 2), None, 0.5, 10),
        (slides / "odd" / "small.svs", None, 0.5, 3),
        (slides / "odd" / "boxes.tiff", 0.5, 0.5, 10),
        (slides / "odd" / "boxes_0.dcm", 0.5, 0.5, 5),
        (slides / "odd" / "sm_image.dcm", 0.5, 0.5, 5),
        (slides / "multi_frame_jpeg_camelyon_challenge_image.dcm", 28.97, 30, 5),
        (cmu, None, 0.998, 2),
    ]
    result = []
    for original, mpp, scale_mpp, weight in found:
        path = folder / original.name
        if path != original:
            shutil.copyfile(original, path)
        result.append((structures(Source(path, mpp, scale_mpp, path.read_bytes())), weight))
    return result


def structures(source: Source) -> Source:
    size = len(source.content)
    if source.path.suffix == ".dcm":
        source.header = [(0, min(size, 4096))]
        source.data = [(min(size - 1, 4096), max(1, size - 4096))]
        return source
    with tifffile.TiffFile(source.path) as tiff:
        source.header.append((0, 16))
        for page in tiff.pages:
            one: Any = page.aspage()
            source.directories.append(one.offset)
            length = 2 + 12 * len(one.tags)
            source.header.append((one.offset, length + 4))
            source.links.append(one.offset + length)
            for tag in one.tags.values():
                place = (tag.valueoffset, tag.valuebytecount)
                if tag.name in ("TileOffsets", "TileByteCounts", "StripOffsets", "StripByteCounts"):
                    source.offsets.append(place)
                elif tag.name in ("ImageWidth", "ImageLength", "TileWidth", "TileLength", "SamplesPerPixel"):
                    source.sizes.append(place)
                else:
                    source.header.append(place)
            source.data += [(o, n) for o, n in zip(one.dataoffsets, one.databytecounts, strict=True) if n]
    return source


def place_in(rng: random.Random, places: list[tuple[int, int]], size: int) -> int:
    start, length = rng.choice(places) if places else (0, size)
    return min(size - 1, start + rng.randrange(max(1, length)))


def flip(rng: random.Random, content: bytearray, places: list[tuple[int, int]], source: Source) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        content[place_in(rng, places, len(content))] ^= 1 << rng.randrange(8)


def truncate(rng: random.Random, content: bytearray, source: Source) -> None:
    start, length = rng.choice(source.header + source.offsets + source.data)
    del content[max(0, rng.choice((start, start + length // 2, start + length)) + rng.randint(-2, 2)) :]


def block(rng: random.Random, content: bytearray, source: Source) -> None:
    start = rng.randrange(len(content))
    length = min(rng.choice((16, 512, 4096)), len(content) - start)
    content[start : start + length] = rng.choice((bytes(length), rng.randbytes(length)))


def shift(rng: random.Random, content: bytearray, source: Source) -> None:
    start = rng.randrange(len(content))
    if rng.random() < 0.5:
        del content[start : start + rng.randint(1, 64)]
    else:
        content[start:start] = rng.randbytes(rng.randint(1, 64))


def endless(rng: random.Random, content: bytearray, source: Source) -> None:
    if source.links:
        link = rng.choice(source.links)
        content[link : link + 4] = rng.choice(source.directories).to_bytes(4, "little")


def huge(rng: random.Random, content: bytearray, source: Source) -> None:
    start, length = rng.choice((source.sizes or source.header) + source.offsets)
    width = 2 if length == 2 else 4
    start += width * rng.randrange(max(1, length // width))
    value = rng.choice(
        ((1 << 8 * width) - 1, (1 << (8 * width - 1)) - 1, 1 << (8 * width - 4), 100_000 % (1 << 8 * width))
    )
    content[start : start + width] = value.to_bytes(width, "little")


def nothing_left(rng: random.Random, content: bytearray, source: Source) -> None:
    content[:] = rng.choice((b"", b"", rng.randbytes(5000), bytes(5000), content[:4]))


def as_it_is(rng: random.Random, content: bytearray, source: Source) -> None:
    """The name is what is wrong."""


KINDS: list[tuple[str, int, Callable[[random.Random, bytearray, Source], None]]] = [
    ("flipped header", 20, lambda rng, content, s: flip(rng, content, s.header, s)),
    ("flipped offsets", 15, lambda rng, content, s: flip(rng, content, s.offsets or s.header, s)),
    ("flipped tile data", 25, lambda rng, content, s: flip(rng, content, s.data, s)),
    ("truncated", 15, truncate),
    ("overwritten block", 10, block),
    ("bytes lost or added", 5, shift),
    ("endless directories", 3, endless),
    ("huge declared sizes", 8, huge),
    ("empty or noise", 2, nothing_left),
    ("wrong extension", 2, as_it_is),
]


def mutant(number: int, seed: int, found: list[tuple[Source, int]], folder: Path) -> tuple[Source, str, Path]:
    rng = random.Random(f"{seed} {number}")
    source = rng.choices([s for s, _ in found], [w for _, w in found])[0]
    kind, _, damage = rng.choices(KINDS, [w for _, w, _ in KINDS])[0]
    content = bytearray(source.content)
    damage(rng, content, source)
    suffixes = sorted({".svs", ".tiff", ".dcm", ".ndpi", ".mrxs", ".scn"} - {source.path.suffix})
    path = folder / f"mutant{rng.choice(suffixes) if kind == 'wrong extension' else source.path.suffix}"
    path.write_bytes(content)
    return source, kind, path


def judge(source: Source, path: Path, seed: int) -> tuple[str, str]:
    """Return the verdict and a detail."""
    settings = ExtractSettings(mpp=source.scale_mpp, stride_px=TILE_PX, min_tissue=0)
    buffers = np.zeros((3, TILE_PX, TILE_PX, 3), np.uint8)
    try:
        with open_slide(path, source.mpp, "test") as slide, open_slide(source.path, source.mpp, "test") as original:
            plan = make_plan(slide, TILE_PX, settings)
            coords = plan.coords
            chosen = random.Random(seed).sample(range(len(coords)), min(TILES, len(coords)))
            same_facts = (slide.info.levels, slide.info.mpp) == (original.info.levels, original.info.mpp)
            flagged = different = 0
            for row in chosen:
                at = (int(coords[row, 0]), int(coords[row, 1]), plan.grid.scale)
                if read_tile(slide, buffers[0], *at)[0] != TileStatus.GOOD:
                    flagged += 1
                    continue
                if same_facts and read_tile(original, buffers[1], *at)[0] == TileStatus.GOOD:
                    same = np.array_equal(buffers[0], buffers[1])
                else:
                    same = False
                if same:
                    continue
                with OpenSlideReader(path, source.mpp, "test") as reference:
                    status, reason = read_tile(reference, buffers[2], *at)
                if status != TileStatus.GOOD:
                    return "WRONG", f"tile {at}: OpenSlide finds: {reason}"
                if not np.array_equal(buffers[0], buffers[2]):
                    return "WRONG", f"tile {at}: OpenSlide gives other pixels"
                different += 1
    except RuntimeFailure:
        return "refused", ""
    except Exception as error:  # as the cohort does: it fails the slide, with this as the message
        return "refused", f"unforeseen {type(error).__name__}: {str(error)[:120]}"
    if different:
        return "undetected", "" if same_facts else "it states other facts (size or scale), and is read as they say"
    return ("flagged" if flagged else "equal"), ""


def worker(numbers: range, seed: int, found: list[tuple[Source, int]], folder: Path, pipe: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)
    for number in numbers:
        source, kind, path = mutant(number, seed, found, folder)
        os.write(pipe, json.dumps([number, source.path.name, kind]).encode() + b"\n")
        verdict, detail = judge(source, path, number)
        os.write(pipe, json.dumps([number, verdict, detail]).encode() + b"\n")
        path.unlink()


def slowest(times: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(times, key=lambda one: -float(one["seconds"]))[:SLOWEST]


def run(count: int, seed: int, slides: Path) -> dict[str, Any]:
    started = time.perf_counter()
    verdicts: collections.Counter[str] = collections.Counter()
    table: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    notable: list[dict[str, Any]] = []
    times: list[dict[str, Any]] = []
    said_s = started
    with tempfile.TemporaryDirectory(prefix="mtdp-damage-") as name:
        folder = Path(name)
        found = sources(slides, folder)
        number = 0
        while number < count:
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(reader)
                code = 1
                try:
                    worker(range(number, count), seed, found, folder, writer)
                    code = 0
                finally:
                    os._exit(code)
            os.close(writer)
            about, begun_s, rest, hung, open_ = ["", ""], time.perf_counter(), b"", False, False
            while True:
                if not select.select([reader], [], [], max(0.0, begun_s + LIMIT_S - time.perf_counter()))[0]:
                    os.kill(pid, signal.SIGKILL)
                    hung = True
                    break
                heard = os.read(reader, 1 << 16)
                if not heard:
                    break
                *lines, rest = (rest + heard).split(b"\n")
                for line in lines:
                    number, first, second = json.loads(line)
                    if not open_:
                        about, begun_s, open_ = [first, second], time.perf_counter(), True
                        continue
                    open_ = False
                    now_s = time.perf_counter()
                    slow = {"number": number, "slide": about[0], "kind": about[1], "verdict": first}
                    times.append({**slow, "seconds": round(now_s - begun_s, 2)})
                    if now_s - said_s > PROGRESS_S:
                        said_s = now_s
                        times = slowest(times)
                        print(f"{number + 1} of {count}: {dict(verdicts)}; slowest {times[0]}", file=sys.stderr)
                    verdicts[first] += 1
                    table[about[1]][first] += 1
                    if first == "WRONG" or second.startswith("unforeseen"):
                        notable.append({"number": number, "slide": about[0], "kind": about[1], first: second})
                    elif second:
                        verdicts["undetected, of them with other facts"] += 1
            _, status = os.waitpid(pid, 0)
            os.close(reader)
            if open_ or hung:
                verdict = "hung" if hung else "died"
                detail = "" if hung else signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "exit"
                verdicts[verdict] += 1
                table[about[1]][verdict] += 1
                notable.append({"number": number, "slide": about[0], "kind": about[1], verdict: detail})
            elif status:
                raise SystemExit(f"the harness failed at {number}: {status}")
            number += 1
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "count": count,
        "seed": seed,
        "verdicts": dict(sorted(verdicts.items())),
        "by_kind": {kind: dict(sorted(row.items())) for kind, row in sorted(table.items())},
        "slowest": slowest(times),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_s": round(spent.ru_utime + spent.ru_stime, 1),
        "notable": notable,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", type=Path, help="with --count N: write mutant N there and judge it in this process")
    options = parser.parse_args()
    slides = Path(os.environ["MTDP_DATA"]) / "slides"
    if options.keep is not None:
        options.keep.mkdir(exist_ok=True)
        source, kind, path = mutant(options.count, options.seed, sources(slides, options.keep), options.keep)
        print(kind, path, *judge(source, path, options.count))
        return
    text = json.dumps(run(options.count, options.seed, slides), indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
