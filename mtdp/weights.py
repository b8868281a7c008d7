"""Where a backbone's weights come from: torchvision, the authors' published files, a file of one's own, or chance.

Layouts that are understood, and turned into torchvision's own names (`conv1.weight`, `features.conv0.weight`, ...):

- torchvision, with or without its classifier, also with DenseNet's old names (`norm.1` for `norm1`);
- the authors' multi-head file: `features.<torchvision name>` and `heads.<task>.linear.{weight,bias}`, where `features.`
  comes off exactly once, since DenseNet has a `features.` of its own (waliens/multitask-dipath, MIT);
- a checkpoint of this package: `backbone.trunk.<torchvision name>` and `heads.<task>.{weight,bias}`.
"""

from __future__ import annotations

import hashlib
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from mtdp.backbones import Backbone, build_backbone
from mtdp.errors import UsageError, WeightsError
from mtdp.stated import misfit, parsed

# The authors' files, pre-trained on all 22 tasks of the paper. No digest was published.
MTDP_URLS: Final = {
    "densenet121": (
        "https://dox.uliege.be/index.php/s/G72InP4xmJvOrVp/download",
        "densenet121-mh-best-191205-141200.pth",
    ),
    "resnet50": ("https://dox.uliege.be/index.php/s/kvABLtVuMxW8iJy/download", "resnet50-mh-best-191205-141200.pth"),
}
NAMED_SOURCES: Final = ("imagenet", "mtdp", "random")
METADATA_KEY: Final = "mtdp"  # where our own safetensors files keep their JSON
ORIGIN_SHAPE: Final = {"source": str, "description": str, "licence": str, "sha256": (str, None)}
CHECKPOINT_SHAPE: Final = {  # what is read of it, see `mtdp.stated`; `CheckpointInfo` writes it
    "arch": str,
    "heads": {str: [str]},
    "head_order?": [str],
    "preprocessing": {"image_px": int, "mean": [float], "std": [float], "interpolation?": str},
    "training": {
        "config": {"batch_size?": int, "epochs?": int},
        "init": ORIGIN_SHAPE,
        "tasks": {str: {"images": int}},
    },
    "iteration": int,
}
CHECKPOINT_NAME: Final = "checkpoint.safetensors"
STATE_NAME: Final = "state.safetensors"  # beside it: what a resumed run needs


@dataclass(frozen=True, slots=True)
class WeightsOrigin:
    """Where weights came from: what was asked for, what it is in words, its licence, and the file's digest if any."""

    source: str
    description: str
    licence: str
    sha256: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> WeightsOrigin:
        return WeightsOrigin(**{name: data[name] for name in ("source", "description", "licence", "sha256")})


def load_backbone_weights(backbone: Backbone, arch: str, source: str, seed: int = 0) -> WeightsOrigin:
    """Fill a backbone in place.

    Args:
        source: `imagenet`, `mtdp`, `random`, a .safetensors or .pth file, or the folder of a training run.
        seed: of the random weights; unused otherwise.

    Raises:
        UsageError: the source is none of these.
        WeightsError: no network, a wrong digest, an unreadable file, or weights of another architecture.
    """
    if source == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            backbone.load_state_dict(build_backbone(arch).state_dict())
        return WeightsOrigin(source, f"random initialisation, seed {seed}", "none", None)
    if source == "imagenet":
        if arch.startswith("timm:"):
            return _load_timm_pretrained(backbone, arch)
        path = _download_imagenet(arch)
        description = f"torchvision {arch} IMAGENET1K_V1 ({path.name})"
        licence = "BSD-3-Clause (torchvision); trained on ImageNet, whose terms allow non-commercial research"
    elif source == "mtdp":
        if arch not in MTDP_URLS:
            raise UsageError(
                f"the authors published no {arch} weights", f"--init mtdp works with {' and '.join(MTDP_URLS)}"
            )
        url, name = MTDP_URLS[arch]
        path = download(url, name)
        description = f"multi-task weights of Mormont et al. 2021, {name}"
        licence = "MIT (waliens/multitask-dipath)"
    else:
        path = find_weights_file(source)
        description, licence = _described(path)
    trained_as = names_its_architecture(str(path))
    if trained_as is not None and trained_as != arch:
        raise WeightsError(
            f"{path} holds {trained_as} weights, not {arch}", f"use --arch {trained_as}, or other weights"
        )
    tensors = to_torchvision_layout(read_tensors(path))
    for classifier in timm_classifiers(backbone):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{classifier}.")}
    fill_backbone(backbone, tensors, path)
    return WeightsOrigin(
        source if source in ("imagenet", "mtdp") else path.name, description, licence, file_sha256(path)
    )


def is_named_source(source: str) -> bool:
    """Whether a source of weights is one of the names, not a path."""
    return source in NAMED_SOURCES


def find_weights_file(source: str) -> Path:
    """The weights file that a path names: itself, or the final checkpoint of a run's folder."""
    path = Path(source)
    if path.is_dir():
        path = path / CHECKPOINT_NAME
        if not path.is_file():
            raise UsageError(f"{source} is a folder without {CHECKPOINT_NAME}", "give a training run or a weights file")
    if path.name == STATE_NAME:
        raise UsageError(f"{source} is the state that a run resumes from, not weights", f"give {CHECKPOINT_NAME}")
    if not path.is_file():
        raise UsageError(
            f"no weights {source!r}", "use imagenet, mtdp, random, or the path of a .safetensors or .pth file"
        )
    return path


def source_sha256(source: str) -> str | None:
    """The digest of the weights file that a path names; None of a name."""
    return None if is_named_source(source) else file_sha256(find_weights_file(source))


def same_start(before: str | None, before_sha256: str | None, now: str) -> bool:
    """Whether a run's starting weights are those named now: a file by its digest, by whatever path it is named.

    Args:
        before, before_sha256: what the run wrote down. Without a digest, the names decide.

    Raises:
        UsageError: the file that is named now cannot be found, and was named otherwise then.
    """
    if before is None or before_sha256 is None or is_named_source(before) or is_named_source(now):
        return before == now
    if before == now and not Path(now).exists():  # a run that goes on needs it no more
        return True
    return source_sha256(now) == before_sha256


def names_its_architecture(source: str) -> str | None:
    """The architecture that a checkpoint of ours names; None for other weights files."""
    arch: str | None = _own_description(find_weights_file(source)).get("arch")
    return arch


def named_input(source: str, arch: str | None, image_px: int | None) -> tuple[str, int]:
    """The architecture and input side to go on with: as given, else those that a checkpoint names, else 224 px.

    Raises:
        UsageError: nothing names the architecture.
    """
    known: dict[str, Any] = {}
    if not is_named_source(source):
        known = _own_description(find_weights_file(source))
    arch = arch or known.get("arch")
    if arch is None:
        raise UsageError(f"{source} does not name its architecture", "add --arch, for example --arch densenet121")
    return arch, image_px or int(known.get("preprocessing", {}).get("image_px", 224))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a .safetensors file, or of a .pth state dict (read without running any code that it may hold)."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of safetensors, of pickle, of torch: they share no base class
        reason = str(error).split("\n", 1)[0]
        raise WeightsError(
            f"{path} cannot be read as weights: {reason}", "give a .safetensors file or a state dict (.pth)"
        ) from error
    if not isinstance(loaded, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in loaded.items()
    ):
        raise WeightsError(
            f"{path} is not a plain state dict", "save model.state_dict(), not the model or a training state"
        )
    return dict(loaded)


def to_torchvision_layout(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a state dict of any known layout to torchvision's names, and drop heads and classifiers."""
    names = list(tensors)
    if names and all(name.startswith("module.") for name in names):  # saved from DataParallel
        return to_torchvision_layout({name.removeprefix("module."): tensors[name] for name in names})
    if any(name.startswith("backbone.trunk.") for name in names):
        prefix = "backbone.trunk."
    elif any(name.startswith(("features.features.", "features.conv1.", "heads.")) for name in names):
        prefix = "features."
    else:
        prefix = ""
    renamed = {}
    for name in names:
        if name.startswith("heads.") or not name.startswith(prefix):
            continue
        plain = re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.", r"\1\2.", name.removeprefix(prefix))
        if not plain.startswith(("fc.", "classifier.")):
            renamed[plain] = tensors[name]
    return renamed


def fill_backbone(backbone: Backbone, tensors: Mapping[str, torch.Tensor], origin: Path) -> None:
    """Copy tensors of torchvision's names into the trunk; every one must fit.

    Raises:
        WeightsError: with the first missing, unexpected and misshapen names.
    """
    wanted = backbone.trunk.state_dict()
    # Old files lack the counters of batch norm, which inference never uses.
    missing = [name for name in wanted if name not in tensors and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in tensors if name not in wanted]
    misshapen = [name for name in wanted if name in tensors and tensors[name].shape != wanted[name].shape]
    if missing or unexpected or misshapen:
        found = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
            if names
        ]
        raise WeightsError(
            f"{origin} does not fit {backbone.arch}: {'; '.join(found)}", "check --arch against the file"
        )
    backbone.trunk.load_state_dict(dict(tensors), strict=False)


def timm_classifiers(backbone: Backbone) -> tuple[str, ...]:
    """The names of a timm model's classifiers, which a file of its weights has and its trunk here has not."""
    trunk: Any = backbone.trunk
    names = (getattr(trunk, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def download(url: str, file_name: str, sha256_prefix: str = "", timeout_s: float = 30.0) -> Path:
    """Download once to torch's hub folder, and check the digest whether the file is new or was there.

    Raises:
        WeightsError: no network, a server's refusal, or a digest that does not begin with `sha256_prefix`.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{file_name}.{os.getpid()}.partial")
        try:
            with urllib.request.urlopen(url, timeout=timeout_s) as response, partial.open("wb") as out:  # noqa: S310 - our URLs
                while block := response.read(1 << 20):
                    out.write(block)
            partial.replace(path)
        except (urllib.error.URLError, TimeoutError, OSError) as error:
            raise WeightsError(
                f"{file_name} could not be downloaded from {url}: {getattr(error, 'reason', error)}",
                f"download it elsewhere and give its path, or put it at {path}",
            ) from error
        finally:
            partial.unlink(missing_ok=True)
    if not file_sha256(path).startswith(sha256_prefix):
        raise WeightsError(f"{path} does not have the digest {sha256_prefix}...", "delete the file and try again")
    return path


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download_imagenet(arch: str) -> Path:
    from torchvision.models import get_model_weights

    url = str(get_model_weights(arch)["IMAGENET1K_V1"].url)
    name = url.rsplit("/", 1)[1]
    return download(url, name, sha256_prefix=name.removesuffix(".pth").rsplit("-", 1)[1])


def _load_timm_pretrained(backbone: Backbone, arch: str) -> WeightsOrigin:
    import timm

    try:
        trained: Any = timm.create_model(arch.removeprefix("timm:"), pretrained=True, num_classes=0)
    except Exception as error:  # of three libraries for downloads, which share no class of errors
        reason = str(error).split("\n", 1)[0]
        raise WeightsError(
            f"{arch}: no pre-trained weights could be had: {reason}", "give the path of a weights file"
        ) from error
    backbone.trunk.load_state_dict(trained.state_dict())
    stated = trained.pretrained_cfg
    where = stated.get("hf_hub_id") or stated.get("url") or "no address stated"
    licence = stated.get("license") or "not stated by timm: see the model's card"
    return WeightsOrigin("imagenet", f"{arch}, pre-trained ({where}), timm {timm.__version__}", licence, None)


def _described(path: Path) -> tuple[str, str]:
    """What a weights file says of itself: where it is from, and its licence."""
    own = _own_description(path)
    if "training" not in own:
        metadata = _safetensors_metadata(path)
        return metadata.get("origin") or f"weights file {path.name}", metadata.get("licence", "not stated in the file")
    # A checkpoint of ours: the licence is that of the weights that its training started from.
    init = own["training"]["init"]
    unit = "epochs" if "epochs" in own["training"]["config"] else "iterations"
    run = path.resolve().parent.name if path.name == CHECKPOINT_NAME else path.name
    return f"{own['iteration']} {unit} of {run}, from {init['description']}", str(init["licence"])


def _own_description(path: Path) -> dict[str, Any]:
    """The JSON document of a checkpoint of ours; empty for other weights files."""
    text = _safetensors_metadata(path).get(METADATA_KEY)
    if text is None:
        return {}
    try:
        known: dict[str, Any] = parsed(text)
    except ValueError as error:
        raise WeightsError(f"{path}: its description is damaged: {error}", "copy the file again") from error
    if isinstance(known, dict) and "arch" not in known:  # a run's state, under another name
        return {}
    wrong = misfit(known, CHECKPOINT_SHAPE)
    if wrong:
        raise WeightsError(f"{path}: in its description, {wrong}", "it is damaged, or no file of mtdp: copy it again")
    return known


def _safetensors_metadata(path: Path) -> dict[str, str]:
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} cannot be read as weights: {error}", "the file may be truncated: copy it again"
        ) from error
