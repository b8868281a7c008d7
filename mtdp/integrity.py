"""Whether all images of a task can be decoded, and which are equal: asked before training, in parallel, remembered.

To read the headers alone is fast and lets a truncated file pass, which then ends a run after hours. To decode took 0.3
to 1.2 ms per image of the small public tasks, and 5 ms per PNG of tissue of 384 pixels: for a pool of the paper's
size, up to an hour of one core on each start. Therefore each sound file is remembered by path, size and time of
change, with a digest of its pixels: 16 bytes per file, in one small file for each task below `$XDG_CACHE_HOME/mtdp`
(`~/.cache/mtdp`); a start then takes one `stat` per image. What has changed is decoded again. A cache that cannot be
read or written costs the time to decode, nothing else.
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

from mtdp.errors import LIST_ITEM, ImageUnreadable
from mtdp.images import check_image

_VERSION: Final = b"3"  # to be raised when check_image finds more than before, or says something else
_CHUNK: Final = 64  # images a job: few enough to stop soon, enough for the pool's overhead to vanish

_WORTH_A_WORD: Final = 20_000  # from here on the check takes more than a few seconds


def check_images(task: Path, images: Sequence[Path]) -> int:
    """As `image_digests`; says how many images were not known to be sound."""
    return image_digests(task, images)[1]


def image_digests(task: Path, images: Sequence[Path]) -> tuple[list[int], int]:
    """Decode the images that are not known to be sound.

    Args:
        task: folder or manifest, which names the file of the cache.

    Returns:
        For each image a digest of its pixels (0: blank, see `check_image`), and how many images were decoded now.

    Raises:
        ImageUnreadable: some are missing or cannot be decoded; the message names all of them.
    """
    cache = _cache_path(task)
    known = _read(cache) if cache else {}
    with ThreadPoolExecutor(min(32, (os.cpu_count() or 1) + 2)) as threads:
        keys = [key for part in threads.map(_keys, _chunks(images)) for key in part]
        unknown = [image for image, key in zip(images, keys, strict=True) if key is None or key not in known]
        if len(unknown) >= _WORTH_A_WORD:
            print(
                f"decoding the {len(unknown)} images of {task} once, to find damaged ones", file=sys.stderr, flush=True
            )
        try:
            found = [one for part in threads.map(_check, _chunks(unknown)) for one in part]
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    bad = [one for one in found if isinstance(one, ImageUnreadable)]
    new = {image: one for image, one in zip(unknown, found, strict=True) if isinstance(one, int)}
    sound = [
        (key, new[image] if image in new else known[key])
        for image, key in zip(images, keys, strict=True)
        if key is not None and (image in new or key in known)
    ]
    if cache and new:
        _write(cache, sound)
    if bad:
        raise _all_bad(task, bad)
    return [digest for _, digest in sound], len(unknown)


def _all_bad(task: Path, bad: Sequence[ImageUnreadable]) -> ImageUnreadable:
    if len(bad) == 1:
        return bad[0]
    lines = "".join(f"{LIST_ITEM}{error.message}" for error in bad)
    hints = list(dict.fromkeys(error.hint for error in bad))
    return ImageUnreadable(f"{task}: {len(bad)} images cannot be used:{lines}", "; ".join(hints))


def _chunks(images: Sequence[Path]) -> list[Sequence[Path]]:
    return [images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK)]


def _check(images: Sequence[Path]) -> list[int | ImageUnreadable]:
    return [_digest_or_error(image) for image in images]


def _digest_or_error(image: Path) -> int | ImageUnreadable:
    try:
        return check_image(image)
    except ImageUnreadable as error:
        return error


def _keys(images: Sequence[Path]) -> list[int | None]:
    return [_key(image) for image in images]


def _key(image: Path) -> int | None:
    """What names this content of this file; None of a file that is missing, which the check then says."""
    try:
        facts = image.stat()
    except OSError:
        return None
    # ctime too: a file put in its place with an old mtime (cp -p, tar) is another file
    told = os.fsencode(f"{image.absolute()}\0{facts.st_size}\0{facts.st_mtime_ns}\0{facts.st_ctime_ns}")
    return int.from_bytes(hashlib.blake2b(told, digest_size=8, key=_VERSION).digest(), "little")


def _cache_path(task: Path) -> Path | None:
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        return None
    name = hashlib.blake2b(os.fsencode(task.absolute()), digest_size=12).hexdigest()
    return root / "mtdp" / "sound-images" / f"{name}-v{_VERSION.decode()}"


def _read(cache: Path) -> dict[int, int]:
    try:
        content = cache.read_bytes()
    except OSError:
        return {}
    table: NDArray[np.uint64] = np.frombuffer(content[: len(content) // 16 * 16], np.uint64).reshape(-1, 2)
    return {int(key): int(digest) for key, digest in table.tolist()}


def _write(cache: Path, sound: Sequence[tuple[int, int]]) -> None:
    partial = cache.with_name(f"{cache.name}.{os.getpid()}.partial")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(np.array(sound, np.uint64).tobytes())
        partial.replace(cache)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
