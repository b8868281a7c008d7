"""What a run's page says of all slides together: totals, causes of failures, time by stage, and what was slow."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from mtdp_runtime.report.page import NOTHING, bar, number, plural
from mtdp_runtime.report.rows import DONE, EMPTY, FAILED, UNFINISHED, Folder, Row
from mtdp_runtime.report.slowness import SlowSlide, slow_slides
from mtdp_runtime.store.causes import by_cause
from mtdp_runtime.units import duration, size
from mtdp_runtime.version import __version__

_MOST_NAMES: Final = 12
_MOST_RUNS: Final = 20
_STAGE_WORDS: Final = {"read": "reading tiles", "infer": "the model", "store": "writing"}


def summary(rows: Sequence[Row], title: str) -> str:
    """Return the head of the page: how it went, in one sentence and a few numbers."""
    slides = len({row.name for row in rows})
    counts = {status: len({row.name for row in rows if row.status == status}) for status in (DONE, EMPTY, FAILED)}
    computed = [row for row in rows if row.tiles_per_s and row.seconds]
    rate_s = sum(row.seconds - row.plan_s for row in computed if row.seconds)
    tiles = sum(row.tiles - row.earlier_tiles for row in computed)
    cards = [
        (number(slides), "slides"),
        (number(counts[FAILED]), "failed"),
        (number(sum(row.tiles for row in rows)), "tiles"),
        (number(_tissue_mm2(rows), 0 if _tissue_mm2(rows) >= 100 else 1), "mm² of tissue"),
        (number(sum(row.bad_tiles for row in rows)), "bad tiles"),
        (number(tiles / rate_s, 1) if rate_s > 0 else NOTHING, "tiles/s while computing"),
        (duration(sum(row.seconds or 0.0 for row in rows)), "of work"),
        (size(sum(row.size_bytes for row in rows)), "of features"),
    ]
    shown = "".join(f"<li><b>{value}</b><span class=soft>{name}</span>" for value, name in cards)
    return f"<h1>{html.escape(title)}</h1><p>{_verdict(rows, counts)}</p><ul class=cards>{shown}</ul>"


def _tissue_mm2(rows: Sequence[Row]) -> float:
    return sum({row.name: row.tissue_mm2 or 0.0 for row in rows}.values())


def _verdict(rows: Sequence[Row], counts: Mapping[str, int]) -> str:
    said = []
    if counts[FAILED]:
        said.append(f"<b class=bad>{plural(counts[FAILED], 'slide')} failed.</b>")
    elif rows:
        said.append("<b class=good>No slide failed.</b>")
    said.append(
        f"{plural(counts[DONE], 'slide')} done" + (f", {counts[EMPTY]} without tissue." if counts[EMPTY] else ".")
    )
    unfinished = sum(row.status == UNFINISHED for row in rows)
    if unfinished:
        said.append(f"<span class=warn>{unfinished} begun and not finished: still worked on, or stopped.</span>")
    look = sum(row.needs_a_look and row.status in (DONE, EMPTY) for row in rows)
    if look:
        said.append(f"<span class=warn>{look} done with bad tiles or a warning.</span>")
    return " ".join(said)


def causes(rows: Sequence[Row]) -> str:
    """Return why slides failed, each cause once, and what to do."""
    failed = {row.name: row.failure for row in rows if row.status == FAILED}
    if not failed:
        return ""
    boxes = []
    for cause in by_cause(failed.values()):
        names = ", ".join(html.escape(name) for name in cause.slides[:_MOST_NAMES])
        more = f" and {len(cause.slides) - _MOST_NAMES:,} more" if len(cause.slides) > _MOST_NAMES else ""
        hint = f"<p><b>{html.escape(cause.hint)}</b></p>" if cause.hint else ""
        boxes.append(
            f"<div class='box bad'><p>{plural(len(cause.slides), 'slide')}: {html.escape(cause.text)}</p>{hint}"
            f"<p class=soft>{names}{more}</p></div>"
        )
    return f"<h2>Why {plural(len(failed), 'slide')} failed</h2>{''.join(boxes)}"


def time_by_stage(rows: Sequence[Row]) -> str:
    """Return where the time of all slides went: a bar for each stage."""
    timed = [row for row in rows if row.stages]
    plan_s = sum(row.plan_s for row in timed)
    total_s = plan_s + sum(
        max(share.busy_s + share.starved_s + share.blocked_s for share in row.stages.values()) for row in timed
    )
    if not timed or total_s <= 0:
        return ""
    lines = _time_line("finding tissue", [("work", plan_s)], total_s, "before the tiles of a slide")
    for stage, words in _STAGE_WORDS.items():
        shares = [row.stages[stage] for row in timed]
        parts = [
            ("work", sum(share.busy_s for share in shares)),
            ("wait", sum(share.starved_s for share in shares)),
            ("block", sum(share.blocked_s for share in shares)),
        ]
        slowest = sum(row.bottleneck == stage for row in timed)
        lines += _time_line(
            words, parts, total_s, f"the slowest stage of {plural(slowest, 'slide')}" if slowest else ""
        )
    return (
        "<h2>Where the time went</h2>"
        "<p>The stages run side by side; the one that works longest decides how long a slide takes."
        "<span class='key work'></span>working<span class='key wait'></span>waiting for tiles"
        "<span class='key block'></span>waiting for the next stage</p>"
        "<table class=time><thead><tr><th scope=col>stage<th scope=col class=number>working"
        f"<th scope=col>share of all time<th scope=col>of how many slides</tr></thead><tbody>{lines}</tbody></table>"
    )


def _time_line(words: str, parts: Sequence[tuple[str, float]], total_s: float, note: str) -> str:
    names = {"work": "working", "wait": "waiting for tiles", "block": "waiting for the next stage"}
    label = f"{words}: " + ", ".join(f"{names[kind]} {seconds / total_s:.0%}" for kind, seconds in parts)
    picture = bar([(kind, seconds / total_s) for kind, seconds in parts], label)
    return (
        f"<tr><th scope=row>{words}<td class=number>{duration(parts[0][1])}, {parts[0][1] / total_s:.0%}"
        f"<td class=wide>{picture}<td class=soft>{note}"
    )


def what_was_slow(rows: Sequence[Row]) -> str:
    """Return the slides that were slow, and why."""
    timed = sum(row.tiles_per_s is not None for row in rows)
    if timed < 2:
        return ""
    found = slow_slides(rows)
    if not found:
        return "<h2>What was slow</h2><p>Nothing: every slide had at least 0.6 of the usual rate.</p>"
    items = "".join(f"<li>{_slow(one)}" for one in found)
    return f"<h2>What was slow</h2><p>Below 0.6 of the usual rate; the most lost time first.</p><ul>{items}</ul>"


def _slow(one: SlowSlide) -> str:
    reasons = html.escape("; ".join(one.reasons))
    return (
        f"<b>{html.escape(one.row.name)}</b>: {number(one.row.tiles_per_s, 1)} tiles/s, "
        f"where {number(one.usual, 1)} are usual. "
        f"{reasons[:1].upper()}{reasons[1:]}."
    )


def how_it_was_made(folder: Folder) -> str:
    """Return which models and engines made the features, the runs of the folder, and what was passed over."""
    made = Counter((row.model, row.digest, row.engine, row.precision) for row in folder.rows if row.model)
    parts = []
    if made:
        lines = "".join(
            f"<tr><td>{html.escape(model)}<td><code>{html.escape(digest[:16])}</code><td>{html.escape(engine)}"
            f"<td>{html.escape(precision)}<td class=number>{count:,}"
            for (model, digest, engine, precision), count in made.most_common()
        )
        parts.append(
            "<h2 id=made>Models and engines</h2>"
            "<div class=scroll role=region aria-labelledby=made tabindex=0><table>"
            "<thead><tr><th scope=col>model<th scope=col>digest<th scope=col>engine<th scope=col>precision"
            f"<th scope=col class=number>files</tr></thead><tbody>{lines}</tbody></table></div>"
        )
        if len({key[1:] for key in made}) > len({key[0] for key in made}):
            parts.append(
                "<p class=warn>Files of one model were made in several ways: their features may differ in the last "
                "digits, or, where the digests differ, altogether.</p>"
            )
    if folder.runs:
        latest = "".join(f"<li>{_run(run)}" for run in folder.runs[: -_MOST_RUNS - 1 : -1])
        more = f"<p class=soft>and {len(folder.runs) - _MOST_RUNS} before</p>" if len(folder.runs) > _MOST_RUNS else ""
        parts.append(f"<h2>Runs</h2><ul>{latest}</ul>{more}")
    if folder.passed_over:
        items = "".join(
            f"<li>{html.escape(str(line.get('slide', '')))}: {html.escape(str(line.get('message', '')))}"
            for line in folder.passed_over[:_MOST_RUNS]
        )
        more = (
            f"<p class=soft>and {len(folder.passed_over) - _MOST_RUNS} more</p>"
            if len(folder.passed_over) > _MOST_RUNS
            else ""
        )
        parts.append(
            f"<h2>Passed over</h2><p>What lay in the folders and is no slide that is read.</p><ul>{items}</ul>{more}"
        )
    return "".join(parts)


def _run(run: Mapping[str, Any]) -> str:
    arguments = run.get("arguments", "")
    command = "a call from Python" if arguments == "api" else f"<code>{html.escape(_command(arguments))}</code>"
    facts = f"{run.get('started', '')}, {run.get('host', '')}, version {run.get('version', '')}"
    return f"{html.escape(facts)}: {command}"


def _command(arguments: Any) -> str:
    return " ".join(map(str, arguments)) if isinstance(arguments, list) else str(arguments)


def footer(made: str) -> str:
    """Return the end of the page: when, by what and how it is made again."""
    return (
        f"<footer><p>Made {html.escape(made)} by mtdp {html.escape(__version__)} from the feature files and run.jsonl "
        "of this folder, as they were then. Features are for research, not for diagnosis.</p></footer>"
    )
