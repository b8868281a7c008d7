"""An encoder by its name in the catalogue, by a timm name with arguments, or as a folder that states what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from mtdp.backbones import Backbone, build_backbone
from mtdp.errors import WeightsError
from mtdp.multitask import MultiTaskNet
from mtdp.preprocess import INTERPOLATIONS, Preprocessing
from mtdp.weights import file_sha256, find_weights_file, load_backbone_weights
from mtdp_export.catalogue import Library, Recipe, buildable, by_digest
from mtdp_export.encoder import TOKEN_FEATURES, Built, Encoder, build, resized_table, shape_given
from mtdp_export.errors import ExportUsageError
from mtdp_export.lookalikes import looks_like
from mtdp_export.pixels import Pixels, Stated, arranged
from mtdp_export.snapshot import licence_text, read_snapshot, weights_in
from mtdp_export.state_dicts import Misfit, fit, largest
from mtdp_export.weights_file import read_state

_SEED: Final = 0


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user says of a network; None: as its entry, its folder or its library has it."""

    feature: str | None = None
    arguments: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    """An encoder with its weights, and what is to be said of it."""

    network: MultiTaskNet
    arch: str
    pixels: Pixels
    origin: str
    licence: str
    feature: str
    encoder: str = ""  # its key in the catalogue
    published: str = ""  # what the digest of the file says of it
    mpp: float | None = None
    licence_text: str = ""


def open_recipe(recipe: Recipe, weights: str | None, stated: Stated, asked: Asked) -> Opened:
    """Build an entry of the catalogue with its weights.

    Args:
        recipe: the entry.
        weights: a file, a folder with the file in it, or "random".
        stated: what the user says of the pixels.
        asked: and of the network.

    Raises:
        ExportUsageError: it needs its authors' own code, or the options do not fit it.
        MtdpError: the weights cannot be read, or are another network's.
    """
    buildable(recipe)
    if weights is None:
        terms = "after accepting its terms there " if recipe.gated else ""
        raise ExportUsageError(
            f"{recipe.key}: {recipe.title} needs its weights",
            f"{terms}download {recipe.weights.file} from {recipe.weights.repository}, then {recipe.line}",
        )
    pixels = _pixels_of(recipe, stated)
    feature = asked.feature or recipe.feature
    origin, published, text, path = f"{recipe.title} by {recipe.paper}", "", "", None
    if weights == "random":
        origin += f"; random weights, seed {_SEED}"
    else:
        path = _file(weights, recipe.weights.file)
        digest = file_sha256(path)
        _refuse_anothers(recipe, path, digest)
        published = recipe.weights.compared(digest)
        origin += f"; {path.name}, sha256 {digest}: {published}"
        text = licence_text(Path(weights)) if Path(weights).is_dir() else ""
    if recipe.library == "mtdp":
        network: Backbone = build_backbone(recipe.arch)
        load_backbone_weights(network, recipe.arch, weights if path is None else str(path))
    else:
        network, done = _filled(
            recipe.library, recipe.arch, {**recipe.arguments, **(asked.arguments or {})}, feature, path
        )
        origin += "".join(f"; {step}" for step in done)
    encoder = _checked(network, pixels, recipe.preprocessing.image_px)
    if asked.feature is None and not asked.arguments:
        assert encoder.features_dim == recipe.features_dim, (encoder.features_dim, recipe)
    licence = str(recipe.licence) + ("; gated: to be accepted where the weights are published" if recipe.gated else "")
    return Opened(
        MultiTaskNet(encoder, {}).eval(),
        f"{recipe.library}:{recipe.arch}",
        pixels,
        origin,
        licence,
        feature,
        recipe.key,
        published,
        recipe.mpp[0],
        text,
    )


def _refuse_anothers(recipe: Recipe, path: Path, digest: str) -> None:
    """Refuse the published weights of another entry: many have tensors of the same names and shapes.

    Raises:
        WeightsError: they are.
    """
    known = by_digest(digest)
    if known is not None and known.key != recipe.key:
        raise WeightsError(
            f"{path} holds the published weights of {known.title}, not of {recipe.title}",
            known.line.replace(known.weights.file, str(path)),
        )


def open_timm(name: str, weights: str, stated: Stated, asked: Asked) -> Opened:
    """Build a network of timm by hand, with arguments of its constructor, and weights of a file or random ones.

    Raises:
        ExportUsageError: the options do not fit it.
        MtdpError: the weights cannot be read, or are another network's.
    """
    arch = name.removeprefix("timm:")
    feature = asked.feature or "pooled"
    path = None if weights == "random" else _file(weights)
    network, done = _filled("timm", arch, asked.arguments or {}, feature, path)
    native = timm_preprocessing(network.trunk)
    pixels = arranged(stated, native, f"timm's default for {arch}")
    encoder = _checked(network, pixels, native.image_px)
    origin, licence, published = f"random initialisation, seed {_SEED}", "none", ""
    if path is not None:
        digest = file_sha256(path)
        known = by_digest(digest)
        origin, licence = f"weights file {path.name}, sha256 {digest}", "not stated in the file"
        if known is not None:
            licence, published = str(known.licence), f"the published weights of {known.title}"
    return Opened(
        MultiTaskNet(encoder, {}).eval(),
        name + "".join(f", {key} {value}" for key, value in (asked.arguments or {}).items()),
        pixels,
        "; ".join([origin, *done]),
        licence,
        feature,
        published=published,
    )


def open_folder(folder: Path, stated: Stated, asked: Asked) -> Opened:
    """Build what a folder of Hugging Face states.

    Raises:
        ExportUsageError: it does not state enough, or the options do not fit it.
        MtdpError: the weights cannot be read, or are another network's.
    """
    snapshot = read_snapshot(folder, stated)
    native, path = snapshot.pixels.preprocessing, snapshot.weights
    digest = file_sha256(path)
    known = by_digest(digest)
    if known is not None and stated.mean is None and stated.std is None:
        _refuse_other_numbers(folder, native, known)
    feature = asked.feature or snapshot.feature
    arguments = {**snapshot.arguments, **(asked.arguments or {})}
    network, done = _filled(snapshot.library, snapshot.arch, arguments, feature, path)
    own = _with_own(stated, native.image_px, snapshot.pixels.resize_px, native.image_px)
    pixels = arranged(own, native, "the folder's own config.json")
    encoder = _checked(network, pixels, native.image_px)
    published = f"the published weights of {known.title}" if known is not None else ""
    return Opened(
        MultiTaskNet(encoder, {}).eval(),
        f"{snapshot.library}:{snapshot.arch}",
        pixels,
        "; ".join(filter(None, [f"{path.name} of a folder with a config.json, sha256 {digest}", snapshot.note, *done])),
        str(known.licence) if known is not None else _front_matter_licence(folder),
        network.feature,
        published=published,
        licence_text=licence_text(folder),
    )


def _refuse_other_numbers(folder: Path, native: Preprocessing, known: Recipe) -> None:
    """Refuse a folder whose numbers are not those that the catalogue has for its weights, by their digest.

    Some repositories state what timm fills in where their authors said nothing.

    Raises:
        ExportUsageError: naming both.
    """
    ours = known.preprocessing
    if (native.mean, native.std) != (ours.mean, ours.std):
        theirs, by_us = (" ".join(f"{v:g}" for v in (*p.mean, *p.std)) for p in (native, ours))
        which = f"{folder}: {known.title}'s published weights"
        raise ExportUsageError(
            f"{which}, and its config.json states mean and std {theirs}, the catalogue {by_us}",
            f"mtdp-export {known.key} --weights {folder} --out B; or state --mean and --std",
        )


def timm_preprocessing(trunk: Any) -> Preprocessing:
    """The pixels that timm states for a network, with the side that this one was built for."""
    import timm.data

    resolve: Any = timm.data.resolve_data_config  # type: ignore[attr-defined]  # re-exported without saying so
    stated: dict[str, Any] = resolve({}, model=trunk)
    embed = getattr(trunk, "patch_embed", None)
    own = getattr(embed, "img_size", None)
    side = int(own[0]) if own is not None else int(stated["input_size"][-1])
    how = stated["interpolation"] if stated["interpolation"] in INTERPOLATIONS else "bicubic"
    return Preprocessing(side, tuple(stated["mean"]), tuple(stated["std"]), how)


def _filled(
    library: Library, arch: str, arguments: Mapping[str, Any], feature: str, path: Path | None
) -> tuple[Encoder, list[str]]:
    """Return the network with the weights of a file, or random ones, and what was taken off the file."""
    if path is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            built = build(library, arch, arguments, feature, weights="random")
        return _encoder(built), []
    loaded = read_state(path)
    shapes = {name: tensor.shape for name, tensor in largest(loaded).items()}
    built = build(library, arch, resized_table(library, arguments, shapes), feature)
    ignore = [name for name in built.trunk.state_dict() if name.endswith("mask_token")]
    try:
        with torch.no_grad():
            done = fit(built.trunk, loaded, path, arch, ignore=ignore, unused=_unused(built))
    except Misfit as error:
        like = looks_like(shapes)
        if like:
            hint = f"it looks like {' or '.join(like)}: mtdp-export {like[0]} --weights {path} --out BUNDLE"
            raise WeightsError(str(error), hint) from error
        raise
    for parameter in built.trunk.parameters():
        parameter.requires_grad_(False)
    return _encoder(built), done


def _unused(built: Built) -> tuple[str, ...]:
    """The beginnings of names that a file may hold and the feature does not need."""
    feature = built.feature
    if feature.startswith("stage"):
        return tuple(f"layer{number}." for number in range(int(feature[-1]) + 1, len(built.stages) + 1))
    return ("text_model.", "text_projection.", "logit_scale") if feature == "projection" else ()


def _encoder(built: Built) -> Encoder:
    return Encoder(built, _features_dim(built))


def _features_dim(built: Built) -> int:
    trunk: Any = built.trunk
    feature = built.feature
    if feature.startswith("stage"):
        return built.stages[int(feature[-1]) - 1]
    if built.library == "transformers":
        width = int(trunk.config.projection_dim if feature == "projection" else trunk.config.hidden_size)
    else:
        # Some networks widen their features between the pooling and the classifier.
        width = int(getattr(trunk, "head_hidden_size", None) or trunk.num_features)
    return 2 * width if feature == "cls+mean" else width


def _checked(network: Backbone, pixels: Pixels, own_px: int) -> Backbone:
    """Return the network if it takes what it will be given, and gives one vector for it.

    Raises:
        ExportUsageError: it does not.
    """
    side = pixels.preprocessing.image_px
    trunk: Any = network.trunk
    config = getattr(trunk, "config", None)
    patch = getattr(config, "patch_size", None) or getattr(getattr(trunk, "patch_embed", None), "patch_size", None)
    patch_px = int(patch[0] if isinstance(patch, tuple) else patch or 1)
    hint = f"use its own side, {own_px} px, or --resize {own_px} for tiles of another size"
    if side == own_px:
        hint = "say its own side by --tile-px, or by --resize; and check the arguments that it was built with"
    if side % patch_px:
        raise ExportUsageError(
            f"{network.arch} takes no images of {side} px: {side} is no multiple of its patch of {patch_px} px", hint
        )
    try:
        given = shape_given(network.eval(), side)
    except (AssertionError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).split("\n", 1)[0].rstrip(".")
        if side != own_px and getattr(getattr(trunk, "patch_embed", None), "img_size", None):
            hint = f"--arch-arg img_size={side}, which resamples its table of positions, or {hint}"
        raise ExportUsageError(f"{network.arch} takes no images of {side} px: {reason}", hint) from error
    if given != (1, network.features_dim):
        raise ExportUsageError(
            f"{network.arch} gives float{list(given)} for an image, and not a vector of {network.features_dim}",
            f"say by --feature which of its values are the feature: {', '.join(TOKEN_FEATURES)} of a transformer",
        )
    return network


def _pixels_of(recipe: Recipe, stated: Stated) -> Pixels:
    said = f"the catalogue's for {recipe.key} (of its authors' card)"
    own = _with_own(stated, recipe.tile_px, recipe.resize_px, recipe.preprocessing.image_px)
    return arranged(own, recipe.preprocessing, said)


def _with_own(stated: Stated, tile_px: int, resize_px: int, input_px: int) -> Stated:
    """A tile goes through the encoder's own resize and cut, unless it has the size of the input already."""
    if stated.resize_px is not None or stated.crop_px is not None:
        return stated
    tile_px = stated.tile_px or tile_px
    if tile_px == input_px:
        return replace(stated, tile_px=tile_px)
    return replace(stated, tile_px=tile_px, resize_px=resize_px, crop_px=input_px)


def _file(weights: str, preferred: str = "") -> Path:
    folder = Path(weights)
    if folder.is_dir():
        return weights_in(folder, preferred)
    return find_weights_file(weights)


def _front_matter_licence(folder: Path) -> str:
    """What the README.md of a repository states."""
    readme = folder / "README.md"
    if readme.is_file():
        lines = readme.read_text(encoding="utf-8", errors="replace").splitlines()
        stated = next((line for line in lines[1:60] if line.startswith("license:")), "")
        if stated and lines[0].strip() == "---":
            return f"{stated.removeprefix('license:').strip()}, as the README of its folder states"
    return "not stated in the folder"
