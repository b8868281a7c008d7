"""The table of a run's page: a row a slide, what needs a look first; sorted and filtered where scripts run."""

from __future__ import annotations

import html
import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from mtdp_runtime.report import places
from mtdp_runtime.report.page import NOTHING, data_url, link_to, number, plural
from mtdp_runtime.report.rows import DONE, EMPTY, FAILED, UNFINISHED, Row

_ORDER: Final = {FAILED: 0, UNFINISHED: 1, DONE: 3, EMPTY: 4}
_NEEDS_A_LOOK: Final = 2
_KINDS: Final = {FAILED: "bad", UNFINISHED: "warn", DONE: "good"}
_NUMBERS: Final = ("tiles", "tissue mm²", "tiles/s", "bad tiles")
_HEADS: Final = ("slide", "status", "tiles", "tissue mm²", "tiles/s", "engine", "reader", "check", "bad tiles")


def slides_table(rows: Sequence[Row], out: Path) -> str:
    """Return the section with all slides; `out` is the folder that the page is of."""
    if not rows:
        return "<h2>Slides</h2><p>There is no slide in this folder yet.</p>"
    ordered = sorted(rows, key=lambda row: (_rank(row), row.name, row.model))
    folders = {row.folder for row in rows}
    heads = "".join(f"<th scope=col data-sort=1{_number(name)}>{name}" for name in _HEADS)
    body = "\n".join(_row(row, out, folders) for row in ordered)
    return (
        f"<h2 id=all>Slides</h2>{_tools(rows)}"
        "<div class=scroll role=region aria-labelledby=all tabindex=0><table id=slides><thead><tr>"
        f"<td></td>{heads}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def _rank(row: Row) -> int:
    rank = _ORDER[row.status]
    return _NEEDS_A_LOOK if row.needs_a_look and rank > _NEEDS_A_LOOK else rank


def _number(head: str) -> str:
    return " class=number" if head in _NUMBERS else ""


def _tools(rows: Sequence[Row]) -> str:
    counts = Counter(row.status for row in rows)
    options = "".join(f'<option value="{name}">{name} ({counts[name]})' for name in _ORDER if counts[name])
    look = sum(row.needs_a_look for row in rows)
    return (
        "<div id=tools class=tools hidden>"
        "<label>Find <input id=text type=search placeholder='name, engine, reason'></label>"
        f"<label>Status <select id=status><option value=''>all{options}</select></label>"
        f"<label><input id=look type=checkbox> only what needs a look ({look})</label>"
        "<output id=count class=soft></output></div>"
    )


def _row(row: Row, out: Path, folders: Collection[Path]) -> str:
    look = " data-look" if row.needs_a_look else ""
    engine = " ".join(filter(None, (row.engine, row.precision)))
    cells = [
        f"<td>{_picture(row)}",
        f'<td data-v="{html.escape(row.name)}">{_name(row, out, folders)}',
        f"<td class={_KINDS.get(row.status, 'soft')}>{row.status}",
        _numeric("tiles", number(row.tiles) if row.model else NOTHING),
        _numeric("tissue mm²", number(row.tissue_mm2, 2)),
        _numeric("tiles/s", number(row.tiles_per_s, 1)),
        _text("engine", engine),
        _text("reader", row.reader),
        _check(row),
        _numeric("bad tiles", number(row.bad_tiles) if row.model else NOTHING, "bad" if row.bad_tiles else ""),
    ]
    return f'<tr data-s="{row.status}"{look}>{"".join(cells)}'


def _picture(row: Row) -> str:
    return f'<img alt="" loading=lazy src="{data_url(row.picture)}">' if row.picture else "<span class=none></span>"


def _name(row: Row, out: Path, folders: Collection[Path]) -> str:
    """Return the name, linked to the report where there is one, and what is to be said of the slide."""
    shown = html.escape(row.name)
    report = places.slide_report(row.folder, row.name)
    if report.is_file():
        shown = f'<a href="{link_to(os.path.relpath(report, places.run_page(out).parent))}">{shown}</a>'
    if len(folders) > 1 and row.model:
        scale = next((one.name for one in (row.folder, row.folder.parent) if places.is_of_a_scale(one)), "")
        which = f"{row.model} {scale.replace('mpp', '')} µm/px" if scale and row.folder != out else row.model
        shown += f" <span class=soft>{html.escape(which)}</span>"
    said = [html.escape(row.message.removeprefix(f"{row.slide}: "))] if row.message else []
    said += [f"<i>{html.escape(row.hint)}</i>"] if row.hint else []
    said += [f"<span class=warn>{html.escape(row.warning)}</span>"] if row.warning else []
    return f"{shown}<div class=why>{' '.join(said)}</div>" if said else shown


def _numeric(head: str, shown: str, kind: str = "") -> str:
    missing = " no" if shown == NOTHING else ""
    return f'<td data-l="{head}" class="number {kind}{missing}">{shown}'


def _text(head: str, shown: str) -> str:
    return f"<td data-l={head}>{html.escape(shown)}" if shown else f"<td class=no>{NOTHING}"


def _check(row: Row) -> str:
    if not row.check:
        return f"<td class=no>{NOTHING}"
    cosine, tiles = float(row.check.get("min_cosine", 0.0)), int(row.check.get("tiles", 0))
    kind = "warn" if row.warning else "good"
    of = f"<span class=soft>of {plural(tiles, 'tile')}</span>"
    return f'<td data-l=check data-v="{cosine:.8f}" class={kind}>{cosine:.6f} {of}'
