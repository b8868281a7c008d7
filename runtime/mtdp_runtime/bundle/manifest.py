"""bundle.json as frozen dataclasses, here and nowhere else.

The rules for it are published as a JSON schema, bundle.schema.json beside this module; keys that are not known here are
ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from mtdp_runtime.bundle.engine_key import EngineKey
from mtdp_runtime.bundle.json_reader import Reader
from mtdp_runtime.errors import BundleInvalid

SCHEMA_VERSION: Final = 1
MANIFEST_NAME: Final = "bundle.json"
ENGINES: Final = "engines"
DATA_SUFFIX: Final = ".data"  # weights beyond 2 GB lie in `<model file>.data`
PRECISIONS: Final = ("fp32", "fp16", "bf16", "int8")
# Far above what any model has; a number beyond them is a mistake or meant to exhaust the memory.
_MOST_TILE_PX: Final = 16_384
REFERENCES: Final = ("torch", "onnxruntime")
_LATER_PARITY: Final = (  # null, or absent in bundles of mtdp 0.1
    "knn_agreement",
    "probe_score",
    "probe_score_fp32",
    "tokens_cosine_min",
)
_LEFT_OUT_IF_EMPTY: Final = (
    "engines",
    "golden_source",
    "autocast",
    "tokens",
    "preprocessing_source",
    "encoder",
    "feature",
    "resize_px",
    "input_px",
)
_FILE_NAME = re.compile(r"[^/\\\x00-\x1f]+")
_MOST_FEATURES: Final = 1_000_000
_MOST_TOKENS: Final = 65_536  # of a tile, and
_MOST_TOKEN_DIM: Final = 16_384  # their width: they fit into one chunk of a feature file


@dataclass(frozen=True, slots=True)
class Head:
    """A classification task that the model still carries: the output `probabilities_<name>` float32[N, C]."""

    name: str
    class_names: tuple[str, ...]

    @property
    def output(self) -> str:
        return f"probabilities_{self.name}"


@dataclass(frozen=True, slots=True)
class Weights:
    """Where the weights came from."""

    sha256: str  # of the weights as numbers: see mtdp_export
    origin: str
    licence: str
    published: str = ""  # "the published weights", "other weights", ...; empty: nothing to compare with


@dataclass(frozen=True, slots=True)
class Parity:
    """How closely a variant repeats the reference, in fp32, on the golden tiles."""

    backend: str  # what computed it: the engine's name and version
    tiles: int
    cosine_min: float
    cosine_mean: float
    max_abs_error: float
    knn_agreement: float | None = None  # part of each tile's nearest tiles that are also its nearest by torch
    probe_score: float | None = None  # of a linear probe on a real task; for int8
    probe_score_fp32: float | None = None  # of the same probe on the fp32 graph's features
    tokens_cosine_min: float | None = None  # of a tile's tokens the mean cosine, of the tiles the smallest


@dataclass(frozen=True, slots=True)
class Autocast:
    """How near torch's own autocast comes to fp32 on the golden tiles: variants of that precision are judged by it."""

    precision: str
    cosine_min: float
    cosine_mean: float
    knn_agreement: float | None
    tokens_cosine_min: float | None = None  # as that of `Parity`


@dataclass(frozen=True, slots=True)
class Tokens:
    """The output `tokens` float32[N, count, dim]: a tile's patches, row by row from its top left."""

    count: int
    dim: int
    grid: tuple[int, int]  # rows, columns; their product is `count`
    dtype: str = "float32"  # as the graph gives them


@dataclass(frozen=True, slots=True)
class FileRef:
    """A file of the bundle and what it must hash to."""

    file: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Variant:
    """The model at one precision."""

    precision: str
    file: FileRef
    parity: Parity  # on the reference engine
    engines: tuple[Parity, ...] = ()  # on each engine of the exporting machine that runs it
    fp32_kernels: int = 0  # fp16 and bf16: how many kernels compute in fp32 all the same
    data: FileRef | None = None  # its weights, where they lie in a file of their own


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine built ahead of time: code for some GPUs. It is loaded only where the user trusts the bundle's maker."""

    file: FileRef  # engines/<stem>.engine; beside it <stem>.json, the key, and <stem>.log
    key: EngineKey


@dataclass(frozen=True, slots=True)
class Manifest:
    """bundle.json."""

    name: str
    arch: str
    mtdp_version: str
    tile_px: int
    mpp: float  # micrometres per pixel at which the model wants to see tissue
    mean: tuple[float, float, float]  # of RGB in 0..1; applied inside the graph, stated for the record
    std: tuple[float, float, float]
    features_dim: int
    heads: tuple[Head, ...]
    weights: Weights
    variants: tuple[Variant, ...]
    golden: FileRef
    reference: str = "torch"  # what gave the golden outputs; onnxruntime for a model that was brought as an ONNX file
    interpolation: str = "bilinear"  # by which images of another size come to tile_px in training and in a probe
    engines: tuple[Engine, ...] = ()
    golden_source: str = ""  # in words, without a file's name; empty: not stated, as in the first bundles
    autocast: tuple[Autocast, ...] = ()  # each precision once; empty: not measured
    preprocessing_source: str = ""  # in words, who says mean, std and interpolation; empty: not stated
    encoder: str = ""  # its name in the exporter's catalogue; empty: not of it
    feature: str = ""  # which of the network's values, such as cls+mean; empty: its own pooling
    resize_px: int | None = None  # the graph resizes a tile to this side first; None: it does not
    input_px: int | None = None  # then cuts out the centre of this side, which the network takes; None: all of it
    tokens: Tokens | None = None  # of the patches, which the graph gives, too; None: it does not

    def to_json(self) -> dict[str, Any]:
        """Return the document, WSInfer's seven model keys included.

        WSInfer knows one list of classes; it gets the classes of all heads as `task/class`, in the order of the
        outputs, or the names of the features where no head was kept.
        """
        classes = [f"{head.name}/{label}" for head in self.heads for label in head.class_names]
        classes = classes or [f"feature_{i}" for i in range(self.features_dim)]
        own = asdict(self)
        for key in _LEFT_OUT_IF_EMPTY:
            if not own[key]:
                del own[key]
        if not own["weights"]["published"]:
            del own["weights"]["published"]
        for variant in own["variants"]:
            if variant["data"] is None:
                del variant["data"]
        proofs = [proof for variant in own["variants"] for proof in (variant["parity"], *variant["engines"])]
        for proof in (*proofs, *own.get("autocast", ())):
            if proof["tokens_cosine_min"] is None:
                del proof["tokens_cosine_min"]
        return {
            "schema_version": SCHEMA_VERSION,
            "spec_version": "1.0",
            "architecture": self.arch,
            "num_classes": len(classes),
            "class_names": classes,
            "patch_size_pixels": self.tile_px,
            "spacing_um_px": self.mpp,
            "transform": [
                {"name": "Resize", "arguments": {"size": self.tile_px}},
                {"name": "ToTensor"},
                {"name": "Normalize", "arguments": {"mean": list(self.mean), "std": list(self.std)}},
            ],
            "mtdp": own,
        }

    @classmethod
    def from_json(cls, document: Any) -> Manifest:
        """Parse a document; `Manifest.from_json(m.to_json()) == m`.

        Raises:
            BundleInvalid: naming the place in the document, what was expected and what stands there.
        """
        top = Reader(document, MANIFEST_NAME)
        version = top.integer("schema_version")
        if version != SCHEMA_VERSION:
            raise BundleInvalid(
                f"{MANIFEST_NAME}: schema_version: this version reads {SCHEMA_VERSION}, got {version}",
                hint="Export the bundle again, or install the mtdp version that wrote it.",
            )
        root = top.child("mtdp")
        weights = root.child("weights")
        manifest = cls(
            name=root.text("name"),
            arch=root.text("arch"),
            mtdp_version=root.text("mtdp_version"),
            tile_px=root.integer("tile_px", minimum=1, maximum=_MOST_TILE_PX),
            mpp=root.positive("mpp"),
            mean=root.rgb("mean"),
            std=root.rgb("std", positive=True),
            features_dim=root.integer("features_dim", minimum=1, maximum=_MOST_FEATURES),
            heads=tuple(Head(_head_name(h), h.texts("class_names")) for h in root.children("heads")),
            weights=Weights(
                weights.digest("sha256"),
                weights.text("origin"),
                weights.text("licence"),
                weights.text("published", ""),
            ),
            variants=tuple(_variant(v) for v in root.children("variants")),
            golden=_file_ref(root.child("golden"), ".npz"),
            reference=root.text("reference", "torch"),
            interpolation=root.text("interpolation", "bilinear"),
            engines=tuple(_engine(e) for e in (root.children("engines") if "engines" in root.data else [])),
            golden_source=root.text("golden_source", ""),
            autocast=tuple(_autocast(a) for a in (root.children("autocast") if "autocast" in root.data else [])),
            preprocessing_source=root.text("preprocessing_source", ""),
            encoder=root.text("encoder", ""),
            feature=root.text("feature", ""),
            resize_px=_side(root, "resize_px"),
            input_px=_side(root, "input_px"),
            tokens=_tokens(root.child("tokens")) if root.has("tokens") else None,
        )
        if manifest.reference not in REFERENCES:
            raise root.wrong("reference", f"one of {', '.join(REFERENCES)}", manifest.reference)
        precisions = [v.precision for v in manifest.variants]
        if not precisions or len(set(precisions)) != len(precisions):
            raise root.wrong("variants", "at least one variant, each precision once", precisions)
        _check_wsinfer(top, manifest.to_json())
        return manifest


def _side(root: Reader, key: str) -> int | None:
    return root.integer(key, minimum=1, maximum=_MOST_TILE_PX) if key in root.data else None


def _tokens(reader: Reader) -> Tokens:
    count = reader.integer("count", minimum=1, maximum=_MOST_TOKENS)
    dim = reader.integer("dim", minimum=1, maximum=_MOST_TOKEN_DIM)
    sides, dtype = reader.value("grid"), reader.text("dtype")
    if not isinstance(sides, list) or len(sides) != 2:
        raise reader.wrong("grid", "rows and columns", sides)
    each = [Reader({"grid": side}, reader.place) for side in sides]
    rows, columns = (one.integer("grid", minimum=1, maximum=_MOST_TOKENS) for one in each)
    if rows * columns != count:
        raise reader.wrong("grid", f"rows and columns of {count} tokens", sides)
    if dtype != "float32":
        raise reader.wrong("dtype", "float32", dtype)
    return Tokens(count, dim, (rows, columns), dtype)


def _check_wsinfer(top: Reader, derived: Mapping[str, Any]) -> None:
    """WSInfer's keys repeat what stands under `mtdp`; a document whose two halves differ is refused."""
    if top.value("spec_version") != derived["spec_version"]:
        raise top.wrong("spec_version", repr(derived["spec_version"]), top.value("spec_version"))
    for key in ("architecture", "num_classes", "class_names", "patch_size_pixels", "spacing_um_px"):
        value, stated = top.value(key), derived[key]
        if value != stated or isinstance(value, bool):
            shown = stated if not isinstance(stated, list) else f"the {len(stated)} names"
            raise top.wrong(key, f"{shown} as in mtdp", value)
    if len(set(derived["class_names"])) != len(derived["class_names"]):
        raise top.wrong("class_names", "each name once", derived["class_names"])
    steps = top.children("transform")
    if [step.value("name") for step in steps] != ["Resize", "ToTensor", "Normalize"]:
        raise top.wrong("transform", "Resize, ToTensor, Normalize", top.value("transform"))
    resize, normalise = steps[0].child("arguments"), steps[2].child("arguments")
    numbers = (resize.integer("size"), normalise.rgb("mean"), normalise.rgb("std", positive=True))
    if numbers != (derived["patch_size_pixels"], *(tuple(derived["mtdp"][key]) for key in ("mean", "std"))):
        raise top.wrong("transform", "size, mean and std as in mtdp", numbers)


def _file_ref(reader: Reader, suffix: str, folder: str = "") -> FileRef:
    """Read a reference to a file right in the bundle, or in a folder of it. Its suffix decides what it is taken for."""
    name = reader.text("file")
    plain = name.removeprefix(f"{folder}/") if folder else name
    inside = not folder or name == f"{folder}/{plain}"
    if not inside or plain in {".", ".."} or not _FILE_NAME.fullmatch(plain):
        raise reader.wrong("file", f"a plain file name inside the bundle{f', in {folder}/' if folder else ''}", name)
    if not name.endswith(suffix):
        raise reader.wrong("file", f"a name that ends in {suffix}", name)
    return FileRef(name, reader.digest("sha256"), reader.integer("size_bytes"))


def _head_name(reader: Reader) -> str:
    """Read a name that becomes that of a dataset: `/` and NUL mean something else there."""
    name = reader.text("name")
    if "/" in name or "\0" in name:
        raise reader.wrong("name", "a name without / and NUL", name)
    return name


def _engine(reader: Reader) -> Engine:
    key = reader.value("key")
    try:
        return Engine(_file_ref(reader.child("file"), ".engine", ENGINES), EngineKey.from_json(key))
    except ValueError as error:
        raise reader.wrong("key", str(error), key) from error


def _variant(reader: Reader) -> Variant:
    precision = reader.text("precision")
    if precision not in PRECISIONS:
        raise reader.wrong("precision", f"one of {', '.join(PRECISIONS)}", precision)
    file = _file_ref(reader.child("file"), ".onnx")
    data = _file_ref(reader.child("data"), DATA_SUFFIX) if reader.has("data") else None
    if data is not None and data.file != file.file + DATA_SUFFIX:
        raise reader.wrong("data", f"{file.file}{DATA_SUFFIX}", data.file)
    # Bundles of mtdp 0.1 do not say the last ones.
    return Variant(
        precision,
        file,
        _parity(reader.child("parity")),
        tuple(_parity(p) for p in reader.children("engines")) if reader.has("engines") else (),
        reader.integer("fp32_kernels") if reader.has("fp32_kernels") else 0,
        data,
    )


def _autocast(reader: Reader) -> Autocast:
    precision = reader.text("precision")
    if precision not in PRECISIONS:
        raise reader.wrong("precision", f"one of {', '.join(PRECISIONS)}", precision)
    agreement, tokens = (
        reader.number(key) if reader.has(key) else None for key in ("knn_agreement", "tokens_cosine_min")
    )
    return Autocast(precision, reader.number("cosine_min"), reader.number("cosine_mean"), agreement, tokens)


def _parity(reader: Reader) -> Parity:
    later = {key: reader.number(key) if reader.has(key) else None for key in _LATER_PARITY}
    return Parity(
        backend=reader.text("backend"),
        tiles=reader.integer("tiles", minimum=1),
        cosine_min=reader.number("cosine_min"),
        cosine_mean=reader.number("cosine_mean"),
        max_abs_error=reader.number("max_abs_error"),
        **later,
    )
