"""The encoders that an evaluation compares, by the names of its table's rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mtdp.bundle_features import is_bundle
from mtdp.errors import UsageError
from mtdp.transfer import COLOUR, Source, load_extractor

RANDOM_ARCH = "resnet18"
RANDOM_ROW = "random network (resnet18)"
COLOUR_ROW = "six colour numbers"


def named_sources(
    bundles: Sequence[Path], inits: Sequence[str], arch: str | None, seed: int = 0, image_px: int | None = None
) -> dict[str, Source]:
    """Row name -> source of features: those that were named, then a random network and the six colour numbers.

    Raises:
        UsageError: none was named, one is named twice, or a folder is no bundle.
        CheckpointError, WeightsError: one cannot be read.
    """
    if not bundles and not inits:
        raise UsageError("no encoder was named", "give --bundle FOLDER, or --init RUN, once for each encoder")
    given = [str(path) for path in bundles] + list(inits)
    if len(set(given)) < len(given):
        raise UsageError("an encoder was named twice", "give each once")
    for path in bundles:
        if not is_bundle(str(path)):
            raise UsageError(f"{path} is not a bundle: it has no bundle.json", "export it with mtdp-export")
    reserved = [name for name in given if Path(name).name in (RANDOM_ROW, COLOUR_ROW)]
    if reserved:
        raise UsageError(f"{reserved[0]} has the name of a row that is always there", "rename it")
    short = [Path(name).name or name for name in given]
    names = [one if short.count(one) == 1 else name for one, name in zip(short, given, strict=True)]
    sources = {
        name: load_extractor(source, None if is_bundle(source) else arch, seed, None if is_bundle(source) else image_px)
        for name, source in zip(names, given, strict=True)
    }
    sources[RANDOM_ROW] = load_extractor("random", RANDOM_ARCH, seed)
    sources[COLOUR_ROW] = load_extractor(COLOUR)
    return sources
