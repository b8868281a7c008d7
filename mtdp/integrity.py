"""Whether all images of a task can be decoded: asked before training, answered in parallel, remembered.

To read the headers alone is fast and lets a truncated file pass, which then ends a run after hours. To decode took 0.3
to 0.6 ms an image of the small public tasks, and 5 ms a PNG of tissue of 384 pixels: for a pool of the paper's size, up
to an hour of one core on each start. Therefore each sound file is remembered by path, size and time of change, 8 bytes
a file, in one small file a task below `$XDG_CACHE_HOME/mtdp` (`~/.cache/mtdp`); a start then takes one `stat` an image.
What has changed is decoded again. A cache that cannot be read or written costs the time to decode, nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mtdp.errors import ImageUnreadable
from mtdp.images import check_image

_VERSION: Final = b"1"  # to be raised when check_image finds more than before
_CHUNK: Final = 64  # images a job: few enough to stop soon, enough for the pool's overhead to vanish

_WORTH_A_WORD: Final = 20_000  # from here on the check takes more than a few seconds


def check_images(task: Path, images: Sequence[Path]) -> int:
    """Decodes the images that are not known to be sound; says how many these were.

    Args:
        task: folder or manifest, which names the file of the cache.

    Raises:
        ImageUnreadable: the first, in the order given, that is missing or cannot be decoded.
    """
    cache = _cache_path(task)
    known = set(_read(cache).tolist()) if cache else set()
    with ThreadPoolExecutor(min(32, (os.cpu_count() or 1) + 2)) as threads:
        keys = [key for part in threads.map(_keys, _chunks(images)) for key in part]
        unknown = [image for image, key in zip(images, keys, strict=True) if key not in known]
        if len(unknown) >= _WORTH_A_WORD:
            print(
                f"decoding the {len(unknown)} images of {task} once, to find damaged ones", file=sys.stderr, flush=True
            )
        jobs = threads.map(_check, _chunks(unknown))
        try:
            for _ in jobs:
                pass
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    if cache and unknown:
        _write(cache, keys)
    return len(unknown)


def _chunks(images: Sequence[Path]) -> list[Sequence[Path]]:
    return [images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK)]


def _check(images: Sequence[Path]) -> None:
    for image in images:
        check_image(image)


def _keys(images: Sequence[Path]) -> list[int]:
    return [_key(image) for image in images]


def _key(image: Path) -> int:
    try:
        facts = image.stat()
    except OSError as error:
        raise ImageUnreadable(
            f"{image} is not a readable image: {error.strerror}", "replace the file, or remove it from the task"
        ) from error
    # ctime too: a file put in its place with an old mtime (cp -p, tar) is another file
    told = f"{image.absolute()}\0{facts.st_size}\0{facts.st_mtime_ns}\0{facts.st_ctime_ns}".encode()
    return int.from_bytes(hashlib.blake2b(told, digest_size=8, key=_VERSION).digest(), "little")


def _cache_path(task: Path) -> Path | None:
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        return None
    name = hashlib.blake2b(str(task.absolute()).encode(), digest_size=12).hexdigest()
    return root / "mtdp" / "sound-images" / name


def _read(cache: Path) -> NDArray[np.uint64]:
    try:
        content = cache.read_bytes()
    except OSError:
        return np.empty(0, np.uint64)
    return np.frombuffer(content[: len(content) // 8 * 8], np.uint64)


def _write(cache: Path, keys: Sequence[int]) -> None:
    partial = cache.with_name(f"{cache.name}.{os.getpid()}.partial")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(np.array(keys, np.uint64).tobytes())
        partial.replace(cache)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
