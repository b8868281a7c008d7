"""What `mtdp-extract` says of its slides: lines for a person, or one JSON object a slide."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mtdp_runtime.backends import Backend
from mtdp_runtime.bundle import Bundle
from mtdp_runtime.cohort import estimate
from mtdp_runtime.cohort.attempt import Listeners
from mtdp_runtime.commands.console import printable, tile_progress
from mtdp_runtime.extraction.outcome import Outcome, log_line
from mtdp_runtime.store import run_log
from mtdp_runtime.tiling.plan import Plan


def say_model(bundle: Bundle, engine: Backend, reason: str) -> None:
    """Say which model runs, on what, and why on that."""
    manifest = bundle.manifest
    name = printable(f"{manifest.name} ({manifest.arch}, {manifest.features_dim} features)")
    print(f"model: {name}, digest {bundle.digest[:16]}")
    print(
        f"engine: {engine.name}, {engine.precision}, batches of {engine.batch}; "
        + "; ".join(filter(None, (engine.note, reason)))
    )


def bars_of(bars: ExitStack, shown: bool) -> Listeners:
    """Show a bar for the slide that is worked on; closing `bars` ends it."""
    advance = [lambda tiles: None]

    def on_plan(plan: Plan, done: int) -> None:
        advance[0] = bars.enter_context(tile_progress(plan.info.path.name, len(plan.kept), shown, done))

    return Listeners(on_plan, lambda tiles: advance[0](tiles))


def say_outcomes(
    outcomes: Iterable[Outcome],
    slides: int,
    settled: Iterable[Mapping[str, Any]],
    bars: ExitStack,
    out: Path,
    as_json: bool,
) -> int:
    """Say how each slide went, and what the run did in all; return how many failed.

    Args:
        outcomes: as they come; what failed, and warnings, go to stderr.
        slides: how many there are.
        settled: the counts of those that a process before this one did.
        bars: closed before each line.
        out: the folder of run.jsonl.
        as_json: one JSON object a slide, and no more.
    """
    lines = list(settled)
    for outcome in outcomes:
        bars.close()
        lines.append(run_log.counts(log_line(outcome)))
        _say_outcome(outcome, f"[{len(lines)}/{slides}] " if slides > 1 else "", as_json)
    statuses = [line["status"] for line in lines]
    failures, elsewhere = statuses.count("failed"), statuses.count("claimed")
    if slides > 1 and not as_json:
        others = f", {elsewhere} left to another run" if elsewhere else ""
        print(
            f"{slides - failures - elsewhere} of {slides} slides done, {failures} failed{others}; "
            f"{run_log.totals(lines)}; see {printable(out / run_log.NAME)}"
        )
    return failures


def _say_outcome(outcome: Outcome, prefix: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(log_line(outcome)), flush=True)
    elif outcome.status == "failed":
        print(f"{prefix}failed: {printable(outcome.message)}", file=sys.stderr)
        if outcome.hint:
            print(f"  hint: {printable(outcome.hint)}", file=sys.stderr)
    else:
        for line in _lines(outcome):
            print(f"{prefix}{line}", flush=True)
            prefix = ""
    if outcome.warning:
        print(f"warning: {printable(outcome.warning)}", file=sys.stderr)


def _lines(outcome: Outcome) -> list[str]:
    """Return the lines for a slide that did not fail."""
    lines, name = [], printable(outcome.slide.name)
    if outcome.status == "done" and outcome.times is not None:
        times = outcome.times
        bad = f", {outcome.bad_tiles} bad (NaN, see status)" if outcome.bad_tiles else ""
        if outcome.left_out:
            bad = f", {outcome.left_out} bad ones left out"
        lines.append(
            f"{name}: {outcome.tiles} tiles{bad} in {outcome.seconds:.1f} s, "
            f"{times.tiles_per_s:.1f} tiles/s, bottleneck {times.bottleneck}, "
            f"the engine waited {times.device_idle:.0%} of the time -> {_where(outcome)}"
        )
        if not outcome.reader.startswith("mtdp "):
            lines.append(f"  read by {printable(outcome.reader)}: {printable(outcome.reader_reason)}")
    else:
        where = f" -> {_where(outcome)}" if outcome.output is not None else ""
        lines.append(f"{name}: {outcome.status}: {printable(outcome.message)}{where}")
    if outcome.agreement is not None:
        found = outcome.agreement
        lines.append(f"  checked {found.tiles} tiles with {found.reference}: min cosine {found.min_cosine:.8f}")
    return lines


def _where(outcome: Outcome) -> str:
    return ", ".join(printable(path) for path in outcome.outputs or (outcome.output,))


def say_plans(
    plans: Iterable[tuple[Outcome, Plan | None, dict[str, Any]]],
    slides: int,
    settled: Iterable[Mapping[str, Any]],
    mpp: float,
    as_json: bool,
) -> int:
    """Say what `plan_slides` finds of each slide, for tiles at `mpp` µm a pixel; the rest is as in `say_outcomes`."""
    lines = list(settled)
    for outcome, plan, costs in plans:
        lines.append(run_log.counts(log_line(outcome)) | costs)
        _say_plan(outcome, plan, costs, mpp, as_json)
    if slides > 1 and not as_json:
        print(estimate.total(lines))
    return sum(line["status"] == "failed" for line in lines)


def _say_plan(outcome: Outcome, plan: Plan | None, costs: dict[str, Any], mpp: float, as_json: bool) -> None:
    if as_json:
        print(json.dumps(log_line(outcome) | costs), flush=True)
        return
    if plan is None:
        _say_outcome(outcome, "", as_json)
        return
    info = plan.info
    print(
        f"{printable(info.path.name)}: {len(plan.kept)} tiles of {plan.grid.tile_px} px; "
        f"mpp {info.mpp:.6g} ({printable(info.mpp_source)}) -> {mpp:g}, level {plan.level}, "
        f"x{plan.grid.scale:.4f}; {plan.tissue.area_mm2:.2f} mm² of tissue"
    )
    if "estimated_s" in costs:
        size = costs["bytes"] / 1e6
        print(f"  about {size:.1f} MB and {costs['estimated_s']:g} s ({costs['estimate_from']})", flush=True)
