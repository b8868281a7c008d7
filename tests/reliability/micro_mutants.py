"""One compressed tile of a slide, damaged a little, read by each reader; a strict decoder of its own is the judge.

    python tests/reliability/micro_mutants.py FOLDER --count 300 --seed 0

A row is WRONG that is good while the strict decoder refused the tile or warned of it. For JPEG that is libjpeg-turbo,
its warnings taken for errors; for JPEG 2000 OpenJPEG's own program in its strict mode (`opj_decompress`, Debian's
libopenjp2-tools), any line of a warning or an error. SILENT rows are good, other than the undamaged ones, and nothing
was said of them by the judge, either: entropy-coded data has no checksums.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import imagecodecs
import numpy as np
import simplejpeg
import tifffile
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dicom_files import J2K, JPEG, Written, tiles_of, write_dicom
from mtdp_runtime.errors import SlideError
from mtdp_runtime.pipeline.read import read_tile
from mtdp_runtime.slide.open import open_slide
from support import stained

TILE, SIDE, MPP = 128, 256, 0.5
KINDS = ("flip", "flip", "flip 3", "delete", "zeros", "noise", "swap", "cut")
Judge = Callable[[bytes], str]
Write = Callable[[Path, Sequence[bytes]], None]


@dataclass(frozen=True)
class Reader:
    """How a slide of coded tiles is written, and who judges a tile."""

    name: str
    suffix: str
    coded: bytes  # the marker behind which the coded data begins
    frames: Callable[[Sequence[NDArray[np.uint8]]], list[bytes]]
    write: Write
    judge: Judge
    scales: tuple[float, ...] = (1.0,)


def jpeg(tiles: Sequence[NDArray[np.uint8]]) -> list[bytes]:
    return [simplejpeg.encode_jpeg(tile, 85, "RGB", "422") for tile in tiles]


def jpeg_2000(tiles: Sequence[NDArray[np.uint8]]) -> list[bytes]:
    return [imagecodecs.jpeg2k_encode(tile, codecformat="j2k", level=42, mct=False) for tile in tiles]


def strict_jpeg(data: bytes) -> str:
    try:
        simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError as error:
        return str(error)
    return ""


def strict_jpeg_2000(data: bytes) -> str:
    """OpenJPEG's program, in its strict mode; it reads and writes files."""
    with TemporaryDirectory() as folder:
        source = Path(folder) / "tile.j2k"
        source.write_bytes(data)
        command = ["opj_decompress", "-i", str(source), "-o", str(source.with_suffix(".ppm"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "WARNING" in line or "ERROR" in line]
    return said[0] if said else f"exit code {done.returncode}" if done.returncode else ""


def tiff_of(compression: int, photometric: str, description: str) -> Write:
    def write(path: Path, frames: Sequence[bytes]) -> None:
        tifffile.imwrite(
            path,
            iter(frames),
            shape=(SIDE, SIDE, 3),
            dtype=np.uint8,
            tile=(TILE, TILE),
            photometric=photometric,
            compression=compression,
            description=description,
            metadata=None,
            resolution=(1e4 / MPP, 1e4 / MPP),
            resolutionunit="CENTIMETER",
        )

    return write


def dicom_of(syntax: str, label: str) -> Write:
    says = Written((SIDE, SIDE), (TILE, TILE), syntax, label, mpp=(MPP, MPP))
    return lambda path, frames: (write_dicom(path, frames, says), None)[1]


APERIO = f"Aperio Image Library v11\n{SIDE}x{SIDE} [0,0 {SIDE}x{SIDE}] ({TILE}x{TILE}) {{}}|AppMag = 20|MPP = {MPP}"
READERS = (
    Reader("TIFF, JPEG", ".tiff", b"\xff\xda", jpeg, tiff_of(7, "ycbcr", "x"), strict_jpeg, (1.0, 4.0)),
    Reader("DICOM, JPEG", ".dcm", b"\xff\xda", jpeg, dicom_of(JPEG, "YBR_FULL_422"), strict_jpeg, (1.0, 4.0)),
    Reader(
        "TIFF, JPEG 2000",
        ".svs",
        b"\xff\x93",
        jpeg_2000,
        tiff_of(33005, "rgb", APERIO.format("J2K/KDU Q=70")),
        strict_jpeg_2000,
    ),
    Reader("DICOM, JPEG 2000", ".dcm", b"\xff\x93", jpeg_2000, dicom_of(J2K, "RGB"), strict_jpeg_2000),
)


def damaged(data: bytes, start: int, kind: str, rng: random.Random) -> bytes:
    """The same number of bytes, and the end marker where it was unless the data is cut."""
    tile, last = bytearray(data), len(data) - 2
    at = rng.randrange(start, last - 80)
    if kind.startswith("flip"):
        for _ in range(3 if kind == "flip 3" else 1):
            tile[rng.randrange(start, last)] ^= 1 << rng.randrange(8)
    elif kind == "delete":
        gone = rng.choice((1, 4, 30))
        tile = tile[:at] + tile[at + gone : last] + bytes(gone) + tile[last:]
    elif kind == "zeros":
        tile[at : at + 64] = bytes(64)
    elif kind == "noise":
        tile[at : at + 16] = rng.randbytes(16)
    elif kind == "swap":
        tile[at : at + 80] = tile[at + 40 : at + 80] + tile[at : at + 40]
    else:
        tile[at:] = bytes(len(tile) - at)
    return bytes(tile)


def read(path: Path, column: int, row: int, scale: float) -> tuple[bool, NDArray[np.uint8]]:
    """Whether the tile is good, and its pixels; a slide that is refused has no good tile."""
    out = np.zeros((int(TILE / scale), int(TILE / scale), 3), np.uint8)
    try:
        with open_slide(path, MPP, "said") as slide:
            status, _ = read_tile(slide, out, column * TILE, row * TILE, scale)
    except SlideError:
        return False, out
    return not status, out


def mutants(reader: Reader, folder: Path, count: int, rng: random.Random) -> Counter[str]:
    image = cv2.GaussianBlur(stained(SIDE, SIDE, 3), (0, 0), 0.6)
    frames = reader.frames(list(tiles_of(image, (TILE, TILE))))
    whole, path = (folder / name / f"slide{reader.suffix}" for name in ("whole", "mutant"))
    for file in (whole, path):
        shutil.rmtree(file.parent, ignore_errors=True)
        file.parent.mkdir()
    reader.write(whole, frames)
    tally: Counter[str] = Counter()
    for _ in range(count):
        number, scale = rng.randrange(len(frames)), rng.choice(reader.scales)
        bad = damaged(frames[number], frames[number].find(reader.coded) + 14, rng.choice(KINDS), rng)
        reader.write(path, [*frames[:number], bad, *frames[number + 1 :]])
        place = (number % 2, number // 2, scale)
        good, pixels = read(path, *place)
        warned = reader.judge(bad)
        equal = good and np.array_equal(pixels, read(whole, *place)[1])
        tally["flagged" if not good else "WRONG" if warned else "equal" if equal else "SILENT"] += 1
        tally["judge warned"] += bool(warned)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    wrong = 0
    for reader in READERS:
        if reader.judge is strict_jpeg_2000 and shutil.which("opj_decompress") is None:
            print(json.dumps({"reader": reader.name, "skipped": "opj_decompress is not installed"}))
            continue
        tally = mutants(reader, options.folder, options.count, random.Random(options.seed))
        wrong += tally["WRONG"]
        print(json.dumps({"reader": reader.name, "mutants": options.count, **dict(sorted(tally.items()))}))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
