"""What the page says of a slide: its facts, what can be laid over it, and in words what is not as it should be."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from typing import Any, Final

from mtdp_runtime.errors import RuntimeFailure
from mtdp_runtime.slide import SlideInfo
from mtdp_runtime.store.reader import FeatureFile, open_features
from mtdp_runtime.view.deep_zoom import OVERLAP_PX, TILE_PX, Pyramid
from mtdp_runtime.view.laid import Laid
from mtdp_runtime.view.layers import Layer, as_json, lattice_of, layers_of
from mtdp_runtime.view.session import Shelf, Shown

_NO_FEATURES: Final = (
    "No features of this slide were named. It can be looked at as it is; mtdp-extract SLIDE makes them."
)


def describe(shown: Shown, shelf: Shelf, laid: Laid) -> dict[str, Any]:
    """Return the facts of a slide and of its features, and notices; what cannot be had is a notice, never an error."""
    notices: list[dict[str, str]] = []
    info: SlideInfo | None = None
    try:
        with shelf.lent(shown) as slide:
            info = slide.info
    except RuntimeFailure as error:
        notices.append(_notice("slide", error))
    told: dict[str, Any] = {"name": shown.name, "notices": notices, "slide": info and _facts(info), "layers": []}
    if shown.features is None:
        notices.append({"about": "note", "text": _NO_FEATURES, "hint": ""})
    else:
        try:
            with open_features(shown.features) as file:
                _add_features(told, file, info)
        except (RuntimeFailure, KeyError, ValueError, TypeError, OSError) as error:
            notices.append(_notice("features", error, f"{shown.features}: cannot be shown: "))
    # Scores of rows are nobody's where the features are another slide's.
    if shown.features is None or "features" in told:
        scores, failures = laid.scores_of(shown)
        told["layers"] += [as_json(one.layer) | {"lattice": one.lattice and asdict(one.lattice)} for one in scores]
        notices += [_notice("scores", failure) for failure in failures]
    for number, path in enumerate(laid.session.annotations):
        if path in laid.session.belonging((path,), shown):
            told["layers"].append(as_json(Layer(f"annotations:{number}", path.name, "annotations")))
    return told


def _add_features(told: dict[str, Any], file: FeatureFile, info: SlideInfo | None) -> None:
    notices = told["notices"]
    refusal = _of_another(file, info)
    if refusal:
        notices.append({"about": "features", "text": f"{file.path}: {refusal}", "hint": "Its layers are not shown."})
        return
    if info is None:
        told["slide"] = _remembered(file)
    told["features"] = {
        "path": str(file.path),
        "tiles": len(file),
        "good": int(file.good.sum()),
        "dimensions": int(file.features.shape[1]),
        "model": str(file.attrs.get("model", "unknown")),
        "mpp": file.attrs.get("mpp"),
        "tile_px": int(file.tile_attrs.get("patch_size", 0)),
        "lattice": asdict(lattice_of(file)),
    }
    told["layers"] += [as_json(layer) for layer in layers_of(file)]
    holds = {"tissue mask": file.tissue is not None, "grid": "grid" in file.attrs}
    missing = [what for what, there in holds.items() if not there]
    if missing and len(file):
        version = file.attrs.get("mtdp_version", "another program")
        text = f"{file.path}: an older file, of {version}: it holds no {' and no '.join(missing)}."
        notices.append({"about": "features", "text": text, "hint": "mtdp-extract --overwrite makes it again."})
    if not len(file):
        notices.append({"about": "features", "text": "No tile of this slide has enough tissue.", "hint": ""})


def _of_another(file: FeatureFile, info: SlideInfo | None) -> str:
    """Say why a feature file is not this slide's; empty where nothing shows that."""
    if info is None:
        return ""
    said = str(file.attrs.get("quickhash", ""))
    if said and info.quickhash and said != info.quickhash:
        return (
            f"features of another slide: its quickhash is {said[:12]}..., "
            f"that of {info.path.name} is {info.quickhash[:12]}..."
        )
    size = tuple(int(file.tile_attrs.get(name, 0)) for name in ("level0_width", "level0_height"))
    if all(size) and size != (info.width, info.height):
        return (
            f"features of another slide, of {size[0]} x {size[1]} px; "
            f"{info.path.name} has {info.width} x {info.height} px"
        )
    return ""


def _facts(info: SlideInfo) -> dict[str, Any]:
    return _geometry(info.width, info.height) | {
        "path": str(info.path),
        "mpp": info.mpp,
        "mpp_source": info.mpp_source,
        "bounds": info.bounds,
        "background": info.background,
        "reader": info.reader,
        "reader_reason": info.reader_reason,
        "vendor": info.vendor,
        "there": True,
    }


def _remembered(file: FeatureFile) -> dict[str, Any] | None:
    """Return what a feature file knows of a slide that cannot be opened: enough to draw the layers without it."""
    with suppress(KeyError):
        width, height = (int(file.tile_attrs[name]) for name in ("level0_width", "level0_height"))
        mpp = file.attrs.get("mpp_level0")
        facts = {"path": str(file.attrs.get("slide_path", file.attrs.get("slide", ""))), "mpp": mpp, "there": False}
        return _geometry(width, height) | facts | {"bounds": (0, 0, width, height), "background": (255, 255, 255)}
    return None


def _geometry(width: int, height: int) -> dict[str, Any]:
    pyramid = Pyramid(width, height)
    return {
        "width": width,
        "height": height,
        "tile_px": TILE_PX,
        "overlap_px": OVERLAP_PX,
        "first_level": pyramid.first_level,
        "last_level": pyramid.last_level,
    }


def _notice(about: str, error: Exception, before: str = "") -> dict[str, str]:
    if isinstance(error, RuntimeFailure):
        return {"about": about, "text": str(error), "hint": error.hint}
    text = f"{before}{type(error).__name__}: {error}"
    return {"about": about, "text": " ".join(text.split()), "hint": "It is damaged, or of another program."}
