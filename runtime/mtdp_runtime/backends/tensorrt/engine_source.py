"""Where an engine comes from: the bundle, if the user trusts it; this machine's cache; or a build, now.

An engine that does not fit, is damaged, or is refused by its library is never used: the next source is asked, and why
is noted. What was built here is kept under its key.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from mtdp_runtime.backends.tensorrt.build import Built
from mtdp_runtime.bundle import Bundle
from mtdp_runtime.bundle.engine_key import EngineKey, Wanted, misfit
from mtdp_runtime.errors import BundleDigestMismatch, EngineRejected
from mtdp_runtime.files import private_folder, read_with_digest, save_with_digest, write_atomically
from mtdp_runtime.printable import printable

D = TypeVar("D")


@dataclass(frozen=True, slots=True)
class SerializedEngine:
    """A serialized engine, and where it comes from."""

    engine: bytes
    origin: str
    host_code: bool = False  # whether it brings the runtime that it wants to be run with


class EngineCache:
    """Engines that this machine built."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, key: EngineKey) -> tuple[bytes, str]:
        """Return the engine of that key and "", or b"" and why there is none."""
        engine, damage = read_with_digest(self._engine(key))
        if damage:
            return b"", f"the cached engine {self._engine(key).name} is not used: {damage}"
        if not engine:
            return b"", ""
        try:
            stated = EngineKey.from_json(json.loads(self._key(key).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return b"", f"the cached engine {self._engine(key).name} is not used: its key is missing or damaged"
        if stated != key:
            return b"", f"the cached engine {self._engine(key).name} is not used: its key is another one's"
        return engine, ""

    def store(self, key: EngineKey, built: Built) -> None:
        """Keep an engine with its key and log; engines of the same thing from other library versions go.

        Raises:
            OSError: it cannot be written; nothing of it is left.
        """
        for old in self.folder.glob("*.json"):
            if self._replaced_by(old, key):
                for name in (old, old.with_suffix(".engine"), old.with_suffix(".log"), old.with_suffix(".jit")):
                    name.unlink(missing_ok=True)
        log = self._engine(key).with_suffix(".log")
        try:
            write_atomically(self._key(key), json.dumps(key.to_json(), indent=1).encode())
            write_atomically(log, built.log.encode())
            save_with_digest(self._engine(key), built.engine)
        except OSError:
            for name in (self._key(key), log, self._engine(key)):
                with suppress(OSError):
                    name.unlink(missing_ok=True)
            raise

    def drop(self, key: EngineKey) -> None:
        self._engine(key).unlink(missing_ok=True)

    @staticmethod
    def _replaced_by(file: Path, key: EngineKey) -> bool:
        try:
            other = EngineKey.from_json(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return False
        ours = replace(other, version=key.version, recipe=key.recipe) == key
        return ours and (other.version, other.recipe) != (key.version, key.recipe)

    def _engine(self, key: EngineKey) -> Path:
        return self.folder / f"{key.stem}.engine"

    def _key(self, key: EngineKey) -> Path:
        return self.folder / f"{key.stem}.json"


def _tell(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)


def obtain(
    bundle: Bundle,
    wanted: Wanted,
    folder: Path,
    build: Callable[[], Built],
    open_plan: Callable[[SerializedEngine], D],
    tell: Callable[[str], None] = _tell,
) -> tuple[D, list[str]]:
    """Return the first engine that opens, and what a person should know of the choice.

    Args:
        bundle: its engines are loaded only with `trust_engines`.
        wanted: what is to run, on which GPU.
        folder: of the cache.
        build: makes an engine for `wanted`.
        open_plan: hands an engine to its library; raises EngineRejected where that one does not take it.
        tell: takes what a person who waits should know now.

    Raises:
        EngineRejected: even an engine that was just built is refused.
        BackendError: none can be built, or the cache cannot be trusted.
        DeviceOutOfMemory: from `open_plan`; nothing is thrown away.
    """
    notes: list[str] = []
    # First of all: whatever engine is taken, the kernels that its library compiles are kept there, and read from there.
    cache, key = EngineCache(private_folder(folder)), wanted.own_key()
    for plan in _of_the_bundle(bundle, wanted, notes):
        try:
            opened = open_plan(plan)
        except EngineRejected as error:
            notes.append(f"{plan.origin} is not used: {error}")
            continue
        return opened, [*notes, f"{plan.origin}"]
    engine, why = cache.find(key)
    if why:
        notes.append(why)
    if engine:
        try:
            return open_plan(SerializedEngine(engine, "engine from the cache")), notes
        except EngineRejected as error:
            cache.drop(key)
            notes.append(f"the cached engine was thrown away: {error}")
    tell(f"building an engine for {wanted.gpu}, batch {wanted.batch}, once; this takes minutes")
    built = build()
    notes += [*built.notes, f"engine built now for {wanted.gpu}, batch {wanted.batch}"]
    opened = open_plan(SerializedEngine(built.engine, "engine built now"))
    try:
        cache.store(key, built)
    except OSError as error:  # it runs all the same, and is built again next time
        notes.append(f"the engine is not kept: {folder}: {error.strerror}")
    return opened, notes


def _of_the_bundle(bundle: Bundle, wanted: Wanted, notes: list[str]) -> Iterator[SerializedEngine]:
    for engine in bundle.manifest.engines:
        key = engine.key
        if (key.library, key.precision) != (wanted.library, wanted.precision):
            continue
        name = f"the bundle's {engine.file.file}"
        why = misfit(key, wanted)
        if not why and not bundle.trust_engines:
            why = "engines are code; --trust-engines loads it"
        content = b""
        if not why:
            try:
                content = bundle.checked(engine.file).read_bytes()
            except BundleDigestMismatch as error:
                why = str(error)
        if why:
            notes.append(f"{name} is not used: {why}")
        else:
            yield SerializedEngine(content, name, key.version_compatible)
