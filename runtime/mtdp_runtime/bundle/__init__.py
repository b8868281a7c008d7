"""The model bundle: a folder that holds a frozen model and the proof of what it computes.

    NAME/  bundle.json            what `manifest` describes
           model.<precision>.onnx one file a variant; uint8[N, tile_px, tile_px, 3] in, float32 outputs
           model.<precision>.onnx.data  its weights, where they are more than one ONNX file holds
           golden.npz             `tiles` uint8[N, tile_px, tile_px, 3]; the outputs that the reference gave, by name
                                  (patch tokens of the first tiles alone: they are large)
           card.md                the model card, for people; README.md is the same for the Hugging Face hub
           engines/               engines built ahead of time, each with its key (`engine_key`) and its build log

Every digest is checked before a file is used.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

from mtdp_runtime.bundle.manifest import MANIFEST_NAME, FileRef, Manifest, Variant
from mtdp_runtime.bundle.onnx_check import check_model_file
from mtdp_runtime.errors import BundleDigestMismatch, BundleInvalid, BundleNotFound, UsageError
from mtdp_runtime.files import write_atomically

FEATURES: Final = "features"
TOKENS: Final = "tokens"
_MOST_MANIFEST_BYTES: Final = 16 << 20  # far above what any has


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on disk whose manifest was read."""

    path: Path
    manifest: Manifest
    digest: str  # sha256 of bundle.json, which names the digest of every other file
    trust_engines: bool = False  # whether the engines that it brings, which are code, may be loaded
    source: str = ""  # where it was fetched from, with the commit: `hub`
    tokens: bool = False  # whether engines are to give the patch tokens, too; only where the manifest has them

    @property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """What an engine is to give for each tile: names and shapes, the features first."""
        stated = self.manifest
        shapes: dict[str, tuple[int, ...]] = {FEATURES: (stated.features_dim,)}
        shapes |= {head.output: (len(head.class_names),) for head in stated.heads}
        if self.tokens and stated.tokens is not None:
            shapes[TOKENS] = (stated.tokens.count, stated.tokens.dim)
        return shapes

    @property
    def left_out(self) -> tuple[str, ...]:
        """Outputs of the graph that nobody asked for: no engine copies them, and OpenVINO does not compute them."""
        return (TOKENS,) if self.manifest.tokens is not None and not self.tokens else ()

    def holds(self, precision: str) -> bool:
        """Whether there is a variant of that precision."""
        return any(variant.precision == precision for variant in self.manifest.variants)

    def variant(self, precision: str) -> Variant:
        """Return the variant of that precision.

        Raises:
            UsageError: the bundle does not hold it.
        """
        for variant in self.manifest.variants:
            if variant.precision == precision:
                return variant
        have = ", ".join(v.precision for v in self.manifest.variants)
        raise UsageError(
            f"{self.path}: no {precision} variant in this bundle (it has {have})",
            hint=f"Use --precision {self.manifest.variants[0].precision}, "
            f"or export it with mtdp-export --precision {precision}.",
        )

    def checked(self, ref: FileRef) -> Path:
        """Return the file's path after its size and digest were compared with the manifest.

        Raises:
            BundleDigestMismatch: the file is missing, cut or changed.
            BundleInvalid: it is a model that reaches out of its own file.
        """
        path = self._whole(ref)
        if path.suffix == ".onnx":
            data = next((variant.data for variant in self.manifest.variants if variant.file == ref), None)
            check_model_file(path, None if data is None else self._whole(data))
        return path

    def _whole(self, ref: FileRef) -> Path:
        path = self.path / ref.file
        hint = "The bundle was changed or damaged after its export: copy it again, or export it again."
        if self.source:  # the cache gives what it holds for ever, and a link alone would be made anew to the same file
            hint = f"Delete {path.resolve()}, and it is fetched again; if that does not help, it was pushed damaged."
        if not path.is_file():
            raise BundleDigestMismatch(f"{path}: missing from the bundle", hint)
        size_bytes = path.stat().st_size
        if size_bytes != ref.size_bytes:
            raise BundleDigestMismatch(f"{path}: {size_bytes} bytes, bundle.json says {ref.size_bytes}", hint)
        digest = sha256_of(path)
        if digest != ref.sha256:
            raise BundleDigestMismatch(f"{path}: sha256 {digest}, bundle.json says {ref.sha256}", hint)
        return path


def sha256_of(path: Path) -> str:
    """Return the file's SHA-256 as 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_ref(folder: Path, name: str) -> FileRef:
    """Describe a file that was just written into a bundle folder."""
    path = folder / name
    return FileRef(name, sha256_of(path), path.stat().st_size)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write bundle.json, in a fixed order, so that equal manifests have equal digests."""
    text = json.dumps(manifest.to_json(), indent=1, ensure_ascii=False) + "\n"
    write_atomically(folder / MANIFEST_NAME, text.encode())


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def schema() -> dict[str, Any]:
    """Return the published JSON schema of bundle.json."""
    text = (resources.files("mtdp_runtime") / "bundle.schema.json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    return document


def default_bundle_path() -> Path:
    """Return the folder of the bundle that ships with the package."""
    return Path(str(resources.files("mtdp_runtime"))) / "default_bundle"


def load_bundle(path: Path | str, trust_engines: bool = False) -> Bundle:
    """Read and validate bundle.json. The other files are checked when they are used (`Bundle.checked`).

    Args:
        path: the folder.
        trust_engines: engines are code; load those of this bundle where they fit.

    Raises:
        BundleNotFound: no such folder, or no bundle.json in it.
        BundleInvalid: bundle.json cannot be understood.
    """
    folder = Path(path)
    file = folder / MANIFEST_NAME
    if not file.is_file():
        raise BundleNotFound(
            f"{folder}: not a model bundle (no {MANIFEST_NAME} in it)",
            hint="Give a folder that mtdp-export wrote, or leave --model out for the packaged model.",
        )
    if file.stat().st_size > _MOST_MANIFEST_BYTES:
        raise BundleInvalid(f"{file}: {file.stat().st_size} bytes, which no manifest has", "Export the bundle again.")
    text = file.read_bytes()
    try:
        document = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BundleInvalid(f"{file}: not JSON: {error}", hint="Copy or export the bundle again.") from error
    try:
        manifest = Manifest.from_json(document)
    except BundleInvalid as error:
        raise BundleInvalid(f"{folder}: {error}", hint=error.hint) from error
    return Bundle(folder, manifest, hashlib.sha256(text).hexdigest(), trust_engines)
