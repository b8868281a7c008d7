"""What the report of a slide says beside its pictures: numbers, tiles, tissue, time, and all facts of the file."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from mtdp_runtime.report.contact_sheet import contact_sheet
from mtdp_runtime.report.page import bar, data_url, number, plural, readable
from mtdp_runtime.report.rows import stage_shares, stage_threads
from mtdp_runtime.report.thumbnails import encoded
from mtdp_runtime.slide import Slide
from mtdp_runtime.store.reader import FeatureFile

_BINS: Final = 20
_TILE_QUALITY: Final = 80


def head(file: FeatureFile) -> str:
    """Return the name of the slide, and what was done with it."""
    attrs = file.attrs
    check = file.fact("check")
    cards = [
        (number(len(file)), "tiles"),
        (number(attrs["tissue_mm2"], 2), "mm² of tissue"),
        (number(attrs["bad_tiles"]), "bad tiles"),
        (f"{attrs['mpp']:g}", "µm/px of the tiles"),
        (html.escape(str(attrs["precision"])), html.escape(str(attrs["backend"]))),
        (html.escape(str(attrs["model"])), "model"),
    ]
    if check:
        cards.append(
            (f"{float(check['min_cosine']):.6f}", f"least cosine of {plural(int(check['tiles']), 'tile')} checked")
        )
    shown = "".join(f"<li><b>{value}</b><span class=soft>{name}</span>" for value, name in cards)
    warning = str(attrs.get("check_warning", ""))
    warned = f"<div class='box warn'><p>{html.escape(warning)}</p></div>" if warning else ""
    title = html.escape(str(attrs["slide"]))
    return f"<h1>{title}</h1><p>{html.escape(_summary(file))}</p><ul class=cards>{shown}</ul>{warned}"


def _summary(file: FeatureFile) -> str:
    attrs = file.attrs
    text = (
        f"{len(file)} tiles of {file.tile_attrs['patch_size']} px at a scale of {attrs['scale']:.4f} from level "
        f"{attrs['level']}; {attrs['tissue_mm2']:.2f} mm² of tissue."
    )
    if not len(file):
        return f"{text} No tile has enough tissue."
    wall_s = file.fact("timing")["wall_s"]
    return f"{text} {wall_s:.1f} s, {attrs['tiles_per_s']:.1f} tiles/s, bottleneck: {attrs['bottleneck']}."


def tiles_seen(file: FeatureFile, slide: Slide | None) -> str:
    """Return tiles that stand for all: one of each group of tiles that look alike to the model."""
    if not file.good.any():
        return ""
    title = "<h2>What the model saw</h2>"
    if slide is None:
        return f"{title}<p>The slide was not at hand when this page was made, so no tiles are shown.</p>"
    sheet = contact_sheet(file, slide)
    unread = f" {plural(sheet.unread, 'tile')} could not be read now, and are left out." if sheet.unread else ""
    figures = "".join(
        f'<figure><img loading=lazy alt="Tile at {x0}, {y0}" src="{data_url(encoded(image, _TILE_QUALITY))}">'
        f"<figcaption>{_part(one.part)}</figcaption></figure>"
        for one, image in sheet.tiles
        for x0, y0 in [file.coords[one.row].tolist()]
    )
    return (
        f"{title}<p>The tiles were put into {len(sheet.tiles) + sheet.unread} groups by their features. This is the "
        f"middle tile of each, with the part of all tiles that its group has; the largest group first.{unread}</p>"
        f"<div class=tiles>{figures}</div>"
    )


def _part(part: float) -> str:
    return f"{part:.0%}" if part >= 0.01 else "below 1%"


def tissue_histogram(file: FeatureFile) -> str:
    """Return how much of each tile is tissue."""
    if not len(file):
        return ""
    fractions = np.clip(file.tissue_fraction.astype(np.float64), 0, 1)
    counts, _ = np.histogram(fractions, bins=_BINS, range=(0, 1))
    tops = counts / counts.max()
    width = 1000 / _BINS
    bars = "".join(
        f'<rect class=work x="{i * width + 2:.0f}" y="{200 - 200 * top:.1f}" width="{width - 4:.0f}" '
        f'height="{200 * top:.1f}" />'
        for i, top in enumerate(tops)
    )
    label = f"Histogram of the part of a tile that is tissue: median {np.median(fractions):.2f}"
    least = float(file.attrs["min_tissue"])
    left_out = f" Tiles with less than {least:.0%} were left out." if least else ""
    return (
        f"<h2>Tissue in the tiles</h2><p>Half of the tiles are at least {np.median(fractions):.0%} tissue; "
        f"{(fractions >= 0.999).mean():.0%} are full of it.{left_out}</p>"
        f'<div class=histogram><svg viewBox="0 0 1000 200" preserveAspectRatio=none role=img aria-label="{label}">'
        f"{bars}</svg>"
        f"<div><span>0</span><span>tissue in a tile; the highest bar has {plural(int(counts.max()), 'tile')}</span>"
        "<span>100%</span></div></div>"
    )


def timing(file: FeatureFile) -> str:
    """Return what each stage did with the time."""
    times = file.fact("timing")
    if not len(file) or times["wall_s"] <= 0:
        return ""
    threads, shares = stage_threads(times), stage_shares(times)
    rows = ""
    for stage, share in shares.items():
        busy_s, starved_s, blocked_s = (times[f"{stage}_{what}"] for what in ("busy_s", "starved_s", "blocked_s"))
        parts = [("work", share.busy_s), ("wait", share.starved_s), ("block", share.blocked_s)]
        picture = bar([(kind, seconds / times["wall_s"]) for kind, seconds in parts], f"{stage}: share of the run")
        rows += (
            f"<tr><th scope=row>{stage}<td class=number>{threads[stage]}<td class=number>{busy_s:.2f}"
            f"<td class=number>{starved_s:.2f}<td class=number>{blocked_s:.2f}<td class=wide>{picture}"
        )
    return (
        "<h2>Time</h2><div class=scroll role=region aria-label='Time of each stage' tabindex=0>"
        "<table class=time><thead><tr>"
        "<th scope=col>stage<th scope=col class=number>threads<th scope=col class=number>busy s"
        "<th scope=col class=number>waited for input s<th scope=col class=number>blocked by the next stage s"
        f"<th scope=col>share of the run</tr></thead><tbody>{rows}</tbody></table></div>"
        f"<p>The engine had nothing to do for {times['device_idle']:.0%} of the run.</p>"
    )


def bad_tiles(file: FeatureFile) -> str:
    """Return how many tiles could not be read, why, and what became of them."""
    bad = file.attrs["bad_tiles"]
    if not bad:
        return ""
    left_out = file.fact("made_of")["on_bad_tile"] == "drop"
    where = "They are left out of the file." if left_out else "Their features are NaN and their status is not 0."
    return (
        f"<div class='box bad'><h2>{bad} tiles could not be read</h2><p>{where}</p>"
        f"<pre>{html.escape(str(file.attrs['bad_tile_reasons']))}</pre></div>"
    )


def facts(attrs: Mapping[str, Any]) -> str:
    """Return all that the file says of itself."""
    rows = "".join(
        f"<tr><th scope=row>{html.escape(key)}<td>{html.escape(readable(value))}"
        for key, value in sorted(attrs.items())
    )
    return f"<h2>Settings and facts</h2><table class=facts>{rows}</table>"
