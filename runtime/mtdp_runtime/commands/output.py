"""What `mtdp-extract` says of its slides: lines for a person, or one JSON object per slide."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from mtdp_runtime.backends.speed import EngineSpeed
from mtdp_runtime.bundle import Bundle
from mtdp_runtime.cohort import failures
from mtdp_runtime.cohort.requests import SlideRequest
from mtdp_runtime.cohort.run import Engine
from mtdp_runtime.commands import exit_codes
from mtdp_runtime.commands.console import detail, hint, result, result_json, say, trouble, warn
from mtdp_runtime.commands.progress import Progress
from mtdp_runtime.extraction.outcome import Outcome, log_line
from mtdp_runtime.store import run_log
from mtdp_runtime.store.causes import Cause
from mtdp_runtime.tiling.plan import Plan
from mtdp_runtime.units import duration, size

_COSTS: Final = ("bytes", "tokens_bytes", "estimated_s")  # that a dry run adds up
_MOST_CAUSES: Final = 10
_MOST_NAMES: Final = 3


def say_model(bundle: Bundle, engine: Engine, reason: str) -> None:
    """Say which model runs, and on what; `-v` also says why on that."""
    manifest = bundle.manifest
    say(f"model: {manifest.name} ({manifest.arch}, {manifest.features_dim} features), digest {bundle.digest[:16]}")
    if bundle.source:
        say(f"  from {bundle.source}")
    say(f"engine: {engine.name}, {engine.precision}, batches of {engine.batch}")
    for why in filter(None, (reason, engine.note)):
        detail(f"  {why}")


def quiet_model(bundle: Bundle, engine: Engine, reason: str) -> None:
    """Say nothing of a model: stdout is for machines."""


def say_outcomes(
    outcomes: Iterable[Outcome],
    requests: Sequence[SlideRequest],
    settled: failures.Lines,
    progress: Progress,
    out: Path,
    as_json: bool,
    passed_over: int = 0,
) -> int:
    """Say how each slide went, and what the run did in all; return the exit code.

    Args:
        outcomes: as they come; what failed, and warnings, go to stderr.
        requests: all slides of the run.
        settled: the counts of those that a process before this one did.
        progress: hears of each.
        out: the folder of run.jsonl.
        as_json: one JSON object per slide, and no more.
        passed_over: how many files and folders were met in folders and are no work.
    """
    by_name, slides = dict(settled), len(requests)
    for outcome in outcomes:
        progress.on_outcome(outcome)
        by_name[outcome.name] = run_log.counts(log_line(outcome))
        _say_outcome(outcome, f"[{len(by_name)}/{slides}] " if slides > 1 else "", as_json)
    lines = list(by_name.values())
    statuses = [line["status"] for line in lines]
    failed, elsewhere = statuses.count("failed"), statuses.count("claimed")
    if slides > 1 and not as_json:
        others = f", {elsewhere} left to another run" if elsewhere else ""
        others += f", {passed_over} passed over" if passed_over else ""
        say(
            f"{slides - failed - elsewhere} of {slides} slides done, {failed} failed{others}; "
            f"{run_log.totals(lines)}; see {out / run_log.NAME}"
        )
        _say_causes(failures.by_cause(requests, by_name))
        if failed and (out / failures.NAME).is_file():
            say(f"{out / failures.NAME}: a manifest of what failed; mend it and give it to mtdp-extract")
    code = exit_codes.of_run(failed, elsewhere)
    if code and slides > 1 and not as_json:
        say(f"exit code {code}: {exit_codes.MEANINGS[str(code)]}")
    return code


def _say_causes(causes: Sequence[Cause]) -> None:
    """Say of what slides failed, each cause once with its hint."""
    for cause in causes[:_MOST_CAUSES]:
        names = ", ".join(cause.slides[:_MOST_NAMES])
        more = len(cause.slides) - _MOST_NAMES
        say(f"{len(cause.slides)} failed: {cause.text}")
        say(f"  {names}{f' and {more} more' if more > 0 else ''}")
        if cause.hint:
            say(f"  hint: {cause.hint}")
    rest = causes[_MOST_CAUSES:]
    if rest:
        say(f"{sum(len(cause.slides) for cause in rest)} failed of {len(rest)} other causes")


def _say_outcome(outcome: Outcome, prefix: str, as_json: bool) -> None:
    if as_json:
        result_json(log_line(outcome))
    elif outcome.status == "failed":
        trouble(f"{prefix}failed: ", outcome.message)
        hint(outcome.hint, "  ")
    else:
        for line in _lines(outcome):
            say(f"{prefix}{line}")
            prefix = ""
        if outcome.own_decoder:
            detail(f"  read by {outcome.reader}: {outcome.reader_reason}")
    if outcome.warning:
        warn(outcome.warning)


def _lines(outcome: Outcome) -> list[str]:
    """Return the lines for a slide that did not fail."""
    lines, name = [], outcome.slide.name
    if outcome.status == "done" and outcome.times is not None:
        times = outcome.times
        bad = f", {outcome.bad_tiles} bad (NaN, see status)" if outcome.bad_tiles else ""
        if outcome.left_out:
            bad = f", {outcome.left_out} bad ones left out"
        if outcome.tiles_before:
            bad += f" ({outcome.tiles_before} were there already)"
        lines.append(
            f"{name}: {outcome.tiles} tiles{bad} in {outcome.seconds:.1f} s, "
            f"{times.tiles_per_s:.1f} tiles/s, bottleneck {times.bottleneck}, "
            f"the engine waited {times.device_idle:.0%} of the time -> {_where(outcome)}"
        )
        if not outcome.own_decoder:
            lines.append(f"  read by {outcome.reader}: {outcome.reader_reason}")
    else:
        where = f" -> {_where(outcome)}" if outcome.output is not None else ""
        lines.append(f"{name}: {outcome.status}: {outcome.message}{where}")
    if outcome.agreement is not None:
        found = outcome.agreement
        lines.append(f"  checked {found.tiles} tiles with {found.reference}: min cosine {found.min_cosine:.8f}")
    return lines


def _where(outcome: Outcome) -> str:
    return ", ".join(str(path) for path in outcome.outputs or (outcome.output,))


def say_speeds(speeds: Sequence[EngineSpeed]) -> None:
    """Say from which speeds, measured now, the times of a dry run follow."""
    for speed in speeds:
        say(f"speed: {speed.tiles_per_s:.3g} tiles/s of {speed.engine}, measured now over {speed.tiles} tiles")


def say_plans(
    plans: Iterable[tuple[Outcome, Sequence[tuple[float, Plan]], dict[str, Any]]],
    slides: int,
    settled: Iterable[Mapping[str, Any]],
    as_json: bool,
) -> int:
    """Say what `plan_slides` finds of each slide, scale by scale; the rest is as in `say_outcomes`."""
    lines = list(settled)
    for outcome, by_scale, costs in plans:
        lines.append(run_log.counts(log_line(outcome)) | costs)
        _say_plan(outcome, by_scale, costs, as_json)
    if slides > 1 and not as_json:
        result(plans_total(lines))
    return exit_codes.of_run(sum(line["status"] == "failed" for line in lines), 0)


def plans_total(lines: Sequence[Mapping[str, Any]]) -> str:
    """Say what a dry run found in all, from the counts of its slides.

    >>> plans_total([{"status": "planned", "tiles": 900, "bytes": 4e9, "estimated_s": 5400.0}, {"status": "failed"}])
    '2 slides: 1 to do with 900 tiles, 4.0 GB, about 1 h 30 min; 1 failed'
    >>> plans_total([{"status": "skipped"}, {"status": "skipped"}])
    '2 slides: 0 to do; 2 done already, 0 failed'
    >>> plans_total([{"status": "planned", "tiles": 900, "bytes": 4e9, "tokens_bytes": 3.9e9}])
    '1 slides: 1 to do with 900 tiles, 4.0 GB, of these 3.9 GB of tokens; 0 failed'
    """
    sums = {name: sum(line.get(name, 0) for line in lines) for name in ("tiles", *_COSTS)}
    tiles, took_s = sums["tiles"], sums["estimated_s"]
    planned, done, failed = (sum(line["status"] == one for line in lines) for one in ("planned", "skipped", "failed"))
    costs = f" with {tiles} tiles, {_sizes(sums)}" if planned or tiles else ""
    if costs and any("estimated_s" in line for line in lines):
        costs += f", about {duration(took_s)}"
    already = f"{done} done already, " if done else ""
    return f"{len(lines)} slides: {planned} to do{costs}; {already}{failed} failed"


def _sizes(costs: Mapping[str, Any]) -> str:
    tokens = costs.get("tokens_bytes", 0)
    return size(costs["bytes"]) + (f", of these {size(tokens)} of tokens" if tokens else "")


def _say_plan(outcome: Outcome, by_scale: Sequence[tuple[float, Plan]], costs: dict[str, Any], as_json: bool) -> None:
    if as_json:
        result_json(log_line(outcome) | costs)
        return
    if not by_scale:
        _say_outcome(outcome, "", as_json)
        return
    for mpp, plan in by_scale:
        info = plan.info
        result(
            f"{info.path.name}: {len(plan.kept)} tiles of {plan.grid.tile_px} px; "
            f"mpp {info.mpp:.6g} ({info.mpp_source}) -> {mpp:g}, level {plan.level}, "
            f"x{plan.grid.scale:.4f}; {plan.tissue.area_mm2:.2f} mm² of tissue"
        )
    if not outcome.tiles and outcome.status != "failed":
        result(f"  nothing to compute: {outcome.message}")
    elif "estimated_s" in costs:
        result(f"  about {_sizes(costs)}, {duration(costs['estimated_s'])}")
        detail(f"  from {costs['estimate_from']}")
    elif "bytes" in costs:
        result(f"  about {_sizes(costs)}")
    if outcome.status == "failed":  # at another scale
        _say_outcome(outcome, "", as_json)
        return
    if outcome.hint:
        result(f"  {outcome.hint}")
    if outcome.warning:
        warn(outcome.warning)
