"""Engines built ahead of time, into a bundle: engines/<stem>.engine, its key <stem>.json, its build log <stem>.log."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mtdp_export.errors import ExportError, ExportUsageError
from mtdp_export.isolated import isolated
from mtdp_runtime.backends.tensorrt.build import BuildOptions, build_engine, rtx_capabilities
from mtdp_runtime.backends.tensorrt.library import LIBRARY
from mtdp_runtime.bundle import file_ref
from mtdp_runtime.bundle.engine_key import HARDWARE, LIBRARIES, RTX_DEFAULT, TENSORRT, TENSORRT_RTX, EngineKey
from mtdp_runtime.bundle.manifest import ENGINES, Engine, FileRef, Manifest, Variant
from mtdp_runtime.errors import BackendError
from mtdp_runtime.files import cache_folder, private_folder


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Which engines a bundle gets: one of each library for each precision."""

    libraries: tuple[str, ...] = ()
    batch: tuple[int, int, int] = (1, 64, 256)  # smallest, best, largest
    capabilities: tuple[str, ...] = ()  # TensorRT-RTX; empty: 8.0 and later
    hardware: str = "none"  # TensorRT: one of key.HARDWARE
    version_compatible: bool = False  # TensorRT

    def check(self) -> None:
        """Find what cannot work before anything is computed.

        Raises:
            ExportUsageError: the options are wrong or do not go together.
            BackendUnavailable: a library, or the GPU that it needs, is not here.
        """
        for name in self.libraries:
            if name not in LIBRARIES:
                raise ExportUsageError(f"--engine {name}: unknown", f"one of {', '.join(LIBRARIES)}")
        smallest, best, largest = self.batch
        if not 0 < smallest <= best <= largest:
            raise ExportUsageError(
                f"--batch {smallest} {best} {largest}: smallest, best and largest batch", "for example --batch 1 64 256"
            )
        if self.hardware not in HARDWARE:
            raise ExportUsageError(
                f"--hardware-compatibility {self.hardware}: unknown", f"one of {', '.join(HARDWARE)}"
            )
        needs = [
            (self.capabilities, "--compute-capability", TENSORRT_RTX),
            (self.hardware != "none", "--hardware-compatibility", TENSORRT),
            (self.version_compatible, "--version-compatible", TENSORRT),
        ]
        for given, option, library in needs:
            if given and library not in self.libraries:
                raise ExportUsageError(f"{option} is an option of --engine {library}", f"add --engine {library}")
        for name in self.libraries:
            known = isolated(f"loading {name}", require_library, name)
            unknown = [c for c in self.capabilities if name == TENSORRT_RTX and c not in known]
            if unknown:
                raise ExportUsageError(
                    f"--compute-capability {unknown[0]}: {name} {LIBRARY[name].version} does not build for it",
                    f"it builds for {', '.join(known)}; left out, for 8.0 and later",
                )


def require_library(name: str) -> list[str]:
    """Load an engine library, and see that there is a GPU where it needs one.

    Returns:
        The compute capabilities that TensorRT-RTX compiles for; of TensorRT, nothing.

    Raises:
        BackendUnavailable: the library, or the GPU, is not here.
    """
    trt = LIBRARY[name].load()
    if name == TENSORRT:
        tuning_gpu()
        return []
    return rtx_capabilities(trt)


def build_engines(
    folder: Path, manifest: Manifest, settings: EngineSettings, say: Callable[[str], None] = lambda note: None
) -> tuple[Engine, ...]:
    """Build each engine into folder/engines and describe it. Of int8 there is none: TensorRT refuses its zero points.

    Args:
        folder: holds the bundle's variants.
        manifest: names them.
        settings: checked.
        say: takes what a person should know, such as a timing cache that was begun anew.

    Raises:
        ExportError: a library cannot build a variant; its log's last error is in the message. Or it crashed.
    """
    engines = []
    for library in settings.libraries:
        for variant in manifest.variants:
            if variant.precision == "int8":
                say(f"no {library} engine of the int8 variant: it is one for CPUs")
                continue
            engines.append(_build(folder, manifest, variant, library, settings, say))
    return tuple(engines)


def _build(
    folder: Path,
    manifest: Manifest,
    variant: Variant,
    library: str,
    settings: EngineSettings,
    say: Callable[[str], None],
) -> Engine:
    version = LIBRARY[library].version
    capabilities, gpu, cache = settings.capabilities or RTX_DEFAULT, "", None
    if library == TENSORRT:
        gpu, own = isolated("looking for a GPU", tuning_gpu)
        capabilities = (own,)
        cache = private_folder(cache_folder()) / f"{library}-{version}-{gpu.replace(' ', '-')}.timing"
    of_tensorrt = library == TENSORRT
    key = EngineKey(
        library,
        version,
        variant.file.sha256,
        variant.precision,
        manifest.tile_px,
        settings.batch,
        capabilities,
        gpu,
        settings.hardware if of_tensorrt else "none",
        settings.version_compatible and of_tensorrt,
    )
    options = BuildOptions(settings.batch, settings.capabilities, key.hardware, key.version_compatible, cache)
    try:
        built = isolated(
            f"building the {library} engine of the {variant.precision} variant",
            build_engine,
            library,
            folder / variant.file.file,
            manifest.tile_px,
            options,
            0 if of_tensorrt else None,
        )
    except BackendError as error:
        raise ExportError(f"no {library} engine of the {variant.precision} variant: {error}", error.hint) from error
    for note in built.notes:
        say(note)
    target = folder / ENGINES
    target.mkdir(exist_ok=True)
    (target / f"{key.stem}.engine").write_bytes(built.engine)
    (target / f"{key.stem}.json").write_text(json.dumps(key.to_json(), indent=1) + "\n", encoding="utf-8")
    (target / f"{key.stem}.log").write_text(built.log, encoding="utf-8")
    ref = file_ref(target, f"{key.stem}.engine")
    return Engine(FileRef(f"{ENGINES}/{ref.file}", ref.sha256, ref.size_bytes), key)


def tuning_gpu() -> tuple[str, str]:
    """Return name and compute capability of the GPU that TensorRT tunes on."""
    from mtdp_runtime.backends.gpus import gpus

    first = gpus()[0]
    return first.name, first.capability
